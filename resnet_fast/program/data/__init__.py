"""What ``--data`` names, as batches of images.

Every kind of data is an index of images, taken in an order by seed and epoch: any process or worker can load any batch
again, and a resumed run sees the same images.
"""

from __future__ import annotations

from pathlib import Path

from ..options import Options, ProgramError
from .archives import digits, read_cifar
from .batches import IGNORED, Batch, Batches, Data, Images, Preparation
from .device import DeviceBatches, loaders
from .folders import Files, folder
from .images import centred, open_image
from .loading import loader, workers_of
from .memory import Samples, in_memory
from .shards import from_shards, shard_paths

__all__ = [
    "IGNORED",
    "Batch",
    "Batches",
    "Data",
    "DeviceBatches",
    "Files",
    "Images",
    "Preparation",
    "Samples",
    "centred",
    "load",
    "loader",
    "loaders",
    "open_image",
    "workers_of",
]


def load(options: Options) -> Data:
    """The data that ``--data`` names: digits shifted by up to 2 pixels, CIFAR by up to 4 and mirrored, photographs."""
    if options.data == "mnist5k":
        return in_memory(digits(), options, padding=2, flip=False)
    path = Path(options.data)
    if path.suffix == ".tar":
        if options.test_data is None:
            raise ProgramError(f"--data is {options.data}: shards to train with; want --test-data, shards to test on")
        train, test = shard_paths("--data", options.data), shard_paths("--test-data", options.test_data)
        return from_shards(train, test, options)
    if options.test_data is not None:
        raise ProgramError(f"--test-data goes with shards, --data *.tar; --data is {options.data}")
    if path.is_dir():
        train, test = sorted(path.glob("train-*.tar")), sorted(path.glob("test-*.tar"))
        if train:
            if not test:
                raise ProgramError(f"--data is {options.data}: has shards train-*.tar, but no test-*.tar")
            return from_shards(train, test, options)
        return folder(path, options)
    if path.is_file():
        return in_memory(read_cifar(path, options.checksum), options, padding=4, flip=True)
    raise ProgramError(
        f"--data is {options.data}: no such file or folder; want mnist5k, a CIFAR archive, a folder or shards"
    )
