"""Damaged shards: what is whole is read, what is not is named: a shard by ProgramError, an image by OSError."""

import functools
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fuzz.mutations import mutated
from resnet_fast.program.data import shards
from resnet_fast.program.options import ProgramError


@functools.cache
def whole(packed):
    """Four samples; ``packed``: with an index in front."""
    png = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(png, "PNG")
    parts = {"cls": b"1", "png": png.getvalue()}
    samples = {f"{i}.{suffix}": parts[suffix] for i in range(4) for suffix in parts}
    rows = np.array([[2048 * i + 2048, 2048 * i + 2560, len(parts["png"]), 1] for i in range(4)])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        index = {shards.INDEX: shards.packed_index(rows, 10240)} if packed else {}
        for name, content in {**index, **samples}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def check(seed):
    dice = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        if seed < 2:  # the undamaged ones
            path.write_bytes(whole(seed == 0))
            assert (shards._packed_rows(path) is not None) == (seed == 0)
            assert shards.scan(path, 2)[0].shape == (4, 4)
        content = whole(seed % 2 == 0)[: int(dice.choice([9000, 10240]))]
        if dice.random() < 0.3:  # a damaged number of the index; of a shard without one, something in its first sample
            at = 544 + 8 * int(dice.integers(16))
            content = content[:at] + mutated(content[at : at + 8], dice)[:8].ljust(8, b"\xff") + content[at + 8 :]
        else:
            content = mutated(content, dice)
        path.write_bytes(content)
        try:
            index, broken = shards._indexed([path], int(dice.integers(1, 3)))
        except ProgramError as error:
            if str(path) in str(error) and "\n" not in str(error):
                return
            raise
        images = shards.Shards([path], index, 4, None)
        for i in range(len(images)):
            if not images.name(i).startswith(f"{path}: "):
                raise AssertionError(images.name(i))
        batch = images.__getitems__([(0, i) for i in range(len(images))])
    assert len(batch.broken) == int((batch.labels < 0).sum())
    assert len(images) + len(broken) <= 8
