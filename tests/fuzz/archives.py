"""Damaged archives: they are read, or raise ProgramError in one line."""

import functools
import gzip
import io
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from helpers.program.support import archive_members, make_archive

from fuzz.mutations import mutated
from resnet_fast.program.data.archives import checksum, read_cifar
from resnet_fast.program.options import ProgramError

KINDS = ("cifar-10-python", "cifar-10-binary", "cifar-100-python", "cifar-100-binary")
STRANGE = (None, 1.5, -1, 2**70, "x", b"\xff", [], [[1], [2, 3]], {}, np.zeros(3), np.zeros((2, 2), object), ["a", "b"])


@functools.cache
def members(kind):
    return archive_members(kind, 5)


def _strange_pickle(content, dice):
    """One entry of a pickle is something else."""
    entries = pickle.loads(content)
    entries[list(entries)[dice.integers(len(entries))]] = STRANGE[dice.integers(len(STRANGE))]
    return pickle.dumps(entries, 4)


def damaged(kind, dice):
    content = dict(members(kind))
    name = list(content)[dice.integers(len(content))]
    match dice.integers(5):
        case 0:
            return mutated(make_archive(io.BytesIO(), content).getvalue(), dice, harmless=int(dice.choice([0, 10])))
        case 1:  # the tar in it, rather than its compression
            return gzip.compress(mutated(gzip.decompress(make_archive(io.BytesIO(), content).getvalue()), dice), 1)
        case 2 if "python" in kind:
            content[name] = _strange_pickle(content[name], dice)
        case 3:
            links = tarfile.TarInfo(name)
            links.type = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE][dice.integers(4)]
            links.linkname = [os.path.basename(name), name][dice.integers(2)]
            content[name] = links
        case _:
            content[name] = mutated(content[name], dice)
    return make_archive(io.BytesIO(), content).getvalue()


def check(seed):
    dice = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{kind}.tar.gz")
        path.write_bytes(damaged(kind, dice))
        try:
            arrays = read_cifar(path, checksum(path))
        except ProgramError as error:
            lines = str(error).splitlines()
            if len(lines) == 1:
                return
            raise AssertionError(f"{len(lines)} lines") from error
    assert arrays.train_images.shape == (len(arrays.train_labels), 3, 32, 32)
    assert arrays.test_labels.dtype == np.int64
    assert len(arrays.classes) in (10, 100)
