"""Data sets in WebDataset's tar shards: members ``KEY.SUFFIX`` of the image and ``KEY.cls`` with its class number.

https://github.com/webdataset/webdataset. The library streams shards: it shuffles within a buffer, and does not know
where a stream stood when a run is resumed. A local, uncompressed tar file can be read anywhere: its headers are read
once, and from then on it is an array of images. Order, split over processes and workers, and resuming are those of all
other data: exact, and the same for any number of workers. The price is a seek an image, as in a folder. Of the library
are the patterns of names, the rule of what belongs to a sample, and the writer (:mod:`..shards`).
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..options import Options, ProgramError
from ..reports.text import one_line
from .batches import Data
from .images import check_regular, open_image
from .photographs import SUFFIXES, Photographs, abridged, data_of

__all__ = ["CLASS_NAMES", "INDEX", "Shards", "from_shards", "library", "packed_index", "scan", "shard_paths"]

CLASS_NAMES = "classes.json"  # beside the training shards: a list of names; without it, numbers are names


def library():  # type: ignore[no-untyped-def]
    """The package webdataset, an optional one."""
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise ProgramError(f"shards need {error.name}: pip install resnet_fast[shards]") from error
    return webdataset


def shard_paths(option: str, pattern: str) -> list[Path]:
    """The shards of ``pattern``, braces and wildcards expanded; each once."""
    try:
        expanded = library().shardlists.expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # braces, or a variable, that cannot be expanded
        raise ProgramError(f"{option} is {pattern}: {one_line(error)}") from error
    found: dict[Path, None] = {}
    for name in expanded:
        matches = sorted(glob.glob(name)) or ([name] if Path(name).exists() else [])
        if not matches:
            raise ProgramError(f"{option} is {pattern}: no shard {name}")
        found.update(dict.fromkeys(map(Path, matches)))
    return list(found)


# Scanning a million headers takes minutes: shards that we write begin with what a scan finds. The library skips it.
INDEX = "__index__/rows.i8"
_INDEX_FORMAT = 1
_MOST_CLASSES = 1_000_000  # where nothing says how many there are: larger numbers are damage
_META = re.compile(r"__[^/]*__($|/)")  # members that are no samples


class _Sample(NamedTuple):
    """Where the image of a sample lies in its shard, in bytes; ``problem`` instead of an image and a class."""

    header: int = 0
    offset: int = 0
    size: int = 0
    label: int = 0
    problem: str = ""


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The regular files of a shard, of ``.cls`` with content.

    Raises:
        ProgramError: it is no whole, uncompressed tar file.
    """
    try:
        check_regular(path)
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # a list of all that it saw
                if member.isreg() and not _META.match(member.name):
                    content = b""
                    if member.name.lower().endswith(".cls"):
                        file.seek(member.offset_data)
                        content = file.read(min(member.size, 99))
                    yield member, content
            # tarfile takes a damaged header for the end.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ProgramError(f"{path} is no whole, uncompressed tar file: {reason}") from error


def _sample(parts: list[tuple[str, tarfile.TarInfo, bytes]], classes: int | None) -> _Sample:
    """The sample of members with one key: suffixes, entries, content of ``.cls``."""
    images = [member for suffix, member, _ in parts if f".{suffix}" in SUFFIXES]
    labels = [content for suffix, _, content in parts if suffix == "cls"]
    if len(images) != 1 or len(labels) != 1:
        return _Sample(problem=f"{len(images)} images and {len(labels)} .cls, want one and one")
    try:
        number = int(labels[0])
    except ValueError:
        return _Sample(problem=f"class {labels[0][:20]!r}, want a number")
    most = (classes or _MOST_CLASSES) - 1
    if not 0 <= number <= most:
        return _Sample(problem=f"class {number}, want from 0 to {most}")
    return _Sample(images[0].offset, images[0].offset_data, images[0].size, number)


def _samples(path: Path, classes: int | None) -> Iterator[_Sample]:
    """What the shard holds: neighbours with one key are a sample."""
    split = library().tariterators.base_plus_ext
    members = ((*split(member.name), member, content) for member, content in _members(path))
    for key, group in itertools.groupby(members, key=lambda part: part[0]):
        if key is not None:
            sample = _sample([(suffix.lower(), member, content) for _, suffix, member, content in group], classes)
            yield sample._replace(problem=f"{path}: {key}: {sample.problem}") if sample.problem else sample


def _member_at(path: Path, header: int) -> tarfile.TarInfo | None:
    """The member whose header begins at that byte, or None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(header)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                return archive.next()
    except (tarfile.TarError, OSError, ValueError):
        return None


class Shards(Photographs):
    """Images in shards."""

    def __init__(self, paths: list[Path], index: np.ndarray, size: int, seed: int | None) -> None:
        """index: ``int64 [images, 5]``: shard, header, offset, size, label."""
        super().__init__(index[:, 4], size, seed)
        self.paths, self.index = paths, index

    def name(self, index: int) -> str:
        shard, header = self.index[index, :2].tolist()
        member = _member_at(self.paths[shard], header)  # None: the shard is another by now
        return f"{self.paths[shard]}: {f'byte {header}' if member is None else member.name}"

    def open(self, index: int) -> Image.Image:
        shard, _, offset, size, _ = self.index[index].tolist()
        with self.paths[shard].open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        return open_image(io.BytesIO(content), 3)


def scan(path: Path, classes: int | None) -> tuple[np.ndarray, list[str]]:
    """``int64 [samples, 4]``: header, offset, size and label; and what is wrong with samples that are left out."""
    samples = list(_samples(path, classes))
    rows = [sample[:4] for sample in samples if not sample.problem]
    return np.array(rows, np.int64).reshape(-1, 4), [sample.problem for sample in samples if sample.problem]


def packed_index(rows: np.ndarray, shard_size: int) -> bytes:
    """The content of the member ``INDEX`` in a shard of so many bytes."""
    return np.concatenate([[[_INDEX_FORMAT, shard_size, len(rows), 0]], rows]).astype("<i8").tobytes()


def _packed_rows(path: Path) -> np.ndarray | None:
    """The rows that the shard's first member holds, or None if there are none, or the shard has changed since."""
    try:
        check_regular(path)
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            member = archive.next()
            content = archive.extractfile(member) if member is not None and member.name == INDEX else None
            numbers = np.frombuffer(content.read() if content is not None else b"", "<i8").reshape(-1, 4)
    except (tarfile.TarError, OSError, ValueError):  # scanning the shard will say what is wrong with it
        return None
    rows, size = numbers[1:], path.stat().st_size
    if not len(numbers) or numbers[0].tolist() != [_INDEX_FORMAT, size, len(rows), 0]:
        return None
    if not (rows >= 0).all() or not (rows[:, :3] <= size).all() or not (rows[:, 3] < _MOST_CLASSES).all():
        return None
    # What was taken out of a shard, or put in, moved the last sample, even if padding kept the shard's size.
    last = _member_at(path, int(rows[-1, 0])) if len(rows) else None
    return rows if last is not None and [last.offset_data, last.size] == rows[-1, 1:3].tolist() else None


def _indexed(paths: list[Path], classes: int | None) -> tuple[np.ndarray, list[str]]:
    """Rows of :class:`Shards`' index, and what is wrong with samples that are left out."""
    found, broken = [np.empty((0, 5), np.int64)], []
    for number, path in enumerate(paths):
        rows = _packed_rows(path)
        if rows is None or (classes is not None and len(rows) and rows[:, 3].max() >= classes):
            rows, problems = scan(path, classes)
            broken += problems
        found.append(np.insert(rows, 0, number, axis=1))
    if sum(map(len, found)) == 0:
        wish = f"want KEY.cls and KEY.SUFFIX of {', '.join(sorted(SUFFIXES))}"
        raise ProgramError(f"no sample in {len(paths)} shards, {paths[0]} the first: {broken[0] if broken else wish}")
    return np.concatenate(found), broken


def _class_names(path: Path) -> list[str] | None:
    try:
        names = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ProgramError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ProgramError(f"{path} is no list of class names")
    return names


def from_shards(train: list[Path], test: list[Path], options: Options) -> Data:
    """The data in shards."""
    classes = _class_names(train[0].with_name(CLASS_NAMES))
    rows, broken = _indexed(train, None if classes is None else len(classes))
    if classes is None:
        classes = [str(number) for number in range(int(rows[:, 4].max()) + 1)]
    test_rows, more = _indexed(test, len(classes))
    if options.limit is not None:
        rows = rows[np.random.default_rng(0).permutation(len(rows))[: options.limit]]
    size = options.image_size
    return data_of(
        Shards(train, rows, size, options.seed),
        Shards(test, test_rows, size, None),
        classes,
        abridged("broken samples, left out", broken + more),
    )
