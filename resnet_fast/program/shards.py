"""``python -m resnet_fast.program.shards FOLDER OUT``: WebDataset shards from a folder of images.

``OUT/train-000000.tar`` and so on, ``OUT/test-000000.tar`` and so on, and ``OUT/classes.json``. Files are copied as
they are, in an order shuffled once, so that programs that stream shards see all classes, too. The same folder gives the
same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np

from .data.folders import list_images
from .data.photographs import class_warnings
from .data.shards import CLASS_NAMES, INDEX, library, packed_index, scan
from .options import ProgramError
from .reports.text import printable

__all__ = ["main", "write_shards"]


def _write(path: Path, files: list[tuple[Path, int]], first: int) -> None:
    """One shard, under its name only once it is whole; keys are numbers from ``first``."""
    temporary = path.with_suffix(".writing")
    try:
        with temporary.open("wb") as file:
            with library().TarWriter(file, encoder=False, mtime=0) as shard:
                key, suffix = INDEX.rsplit(".", 1)
                shard.write({"__key__": key, suffix: packed_index(np.zeros((len(files), 4)), 0)})  # takes its place
                for number, (image, label) in enumerate(files, first):
                    content = {image.suffix[1:].lower(): image.read_bytes(), "cls": str(label).encode()}
                    shard.write({"__key__": f"{number:08d}", **content})
            size = file.tell()
            file.flush()
            rows, broken = scan(temporary, None)
            if broken or len(rows) != len(files):
                raise AssertionError(f"{path}: {len(rows)} of {len(files)} samples, {broken}")
            file.seek(tarfile.BLOCKSIZE)
            file.write(packed_index(rows, size))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shards(folder: Path, out: Path, samples: int = 1000) -> list[str]:
    """Writes the images of ``folder`` into shards of ``samples`` images; returns warnings.

    Raises:
        ProgramError: ``folder`` is not as ``--data`` wants it, ``out`` holds shards, or a file cannot be read or
            written.
    """
    library()
    classes, files, warnings = list_images(folder)
    warnings += class_warnings(classes, {part: np.array([n for _, n in files[part]]) for part in files})
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.glob("*.tar")):
            raise ProgramError(f"{out} holds shards: want an empty folder")
        for part, listed in files.items():
            order = np.random.default_rng(0).permutation(len(listed))
            for number, first in enumerate(range(0, len(order), samples)):
                chosen = [listed[i] for i in order[first : first + samples]]
                _write(out / f"{part}-{number:06d}.tar", chosen, first)
        (out / CLASS_NAMES).write_text(json.dumps(classes) + "\n")
    except OSError as error:
        raise ProgramError(f"{error.filename or out}: {error.strerror}") from error
    return warnings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fast.program.shards", description="WebDataset shards from a folder of images."
    )
    parser.add_argument("folder", type=Path, help="holds train/CLASS/* and test/CLASS/*")
    parser.add_argument("out", type=Path, help="where to write: --data of resnet_fast.train")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="images a shard (default 1000)")
    given = parser.parse_args(arguments)
    if given.samples < 1:
        parser.error(f"--samples is {given.samples}, want at least 1")
    try:
        for warning in write_shards(given.folder, given.out, given.samples):
            print(printable(f"warning: {warning}"))
    except ProgramError as error:
        print(f"resnet_fast.program.shards: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
