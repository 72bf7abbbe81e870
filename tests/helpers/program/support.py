"""Small data sets and runs of the training program."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

from resnet_fast import models, train
from resnet_fast.program import data, distributed, evaluation, loop, recipes
from resnet_fast.program.data.archives import checksum
from resnet_fast.program.data.augment import crop_and_flip, draws, stream
from resnet_fast.program.options import parse

ROOT = Path(__file__).parents[3]
CLASSES = [f"class{i}" for i in range(10)]


def make_archive(path, members):
    """A tar.gz at ``path``, which may be an open file, of bytes, or whole entries, by name."""
    place = {"name" if isinstance(path, Path) else "fileobj": path}
    with tarfile.open(**place, mode="w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def cifar_members(images, labels, test_images, test_labels):
    """CIFAR-10's python form: pixels in rows, keys as bytes."""

    def part(images, labels):
        return pickle.dumps({b"data": images.reshape(-1, 3072), b"labels": labels.tolist()}, protocol=4)

    members = {f"cifar-10-batches-py/data_batch_{i + 1}": part(images[i::5], labels[i::5]) for i in range(5)}
    members["cifar-10-batches-py/test_batch"] = part(test_images, test_labels)
    members["cifar-10-batches-py/batches.meta"] = pickle.dumps({b"label_names": [c.encode() for c in CLASSES]}, 4)
    return members


def _binary_members(train, test, label_bytes):
    def part(images, labels):
        head = np.stack([*(np.full_like(labels, 7),) * (label_bytes - 1), labels], 1).astype(np.uint8)
        return np.concatenate([head, images.reshape(-1, 3072)], 1).tobytes()

    if label_bytes == 2:
        names = "\n".join(f"fine{i}" for i in range(100))
        folder = "cifar-100-binary/"
        return {
            folder + "train.bin": part(*train),
            folder + "test.bin": part(*test),
            folder + "fine_label_names.txt": names.encode(),
        }
    folder = "cifar-10-batches-bin/"
    images, labels = train
    members = {f"{folder}data_batch_{i + 1}.bin": part(images[i::5], labels[i::5]) for i in range(5)}
    return {
        **members,
        folder + "test_batch.bin": part(*test),
        folder + "batches.meta.txt": ("\n".join(CLASSES) + "\n\n").encode(),
    }


def _cifar_100_members(train, test):
    def part(images, labels):
        return pickle.dumps({b"data": images.reshape(-1, 3072), b"fine_labels": labels.tolist()}, 4)

    names = pickle.dumps({b"fine_label_names": [f"fine{i}".encode() for i in range(100)]}, 4)
    folder = "cifar-100-python/"
    return {folder + "train": part(*train), folder + "test": part(*test), folder + "meta": names}


def archive_members(kind, count):
    """What an archive of ``count`` and half as many images of noise holds; kind: its name without ``.tar.gz``."""
    train, test = random_images(count), random_images(count // 2, seed=1)
    if kind == "cifar-10-python":
        return cifar_members(*train, *test)
    if kind == "cifar-100-python":
        return _cifar_100_members(train, test)
    return _binary_members(train, test, 1 if "-10-" in kind else 2)


def random_images(count, seed=0):
    dice = np.random.default_rng(seed)
    return dice.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), dice.integers(0, 10, count)


def small_cifar(folder, count=80, seed=0):
    """Options for a run on ``count`` images of noise in CIFAR-10's form."""
    path = make_archive(
        folder / "cifar-10-python.tar.gz", cifar_members(*random_images(count, seed), *random_images(20, seed=1))
    )
    return ["--data", str(path), "--checksum", checksum(path), "--batch", "8", "--workers", "0"]


def eight_layers(monkeypatch):
    """Makes cifar_resnet20 a network of eight layers, for tests of what surrounds it."""
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))


def trainer_for(folder, *given, **kwargs):
    """A trainer on 80 images of noise, with ``folder/run`` for what it writes."""
    options = parse([*small_cifar(folder), "--out", str(folder / "run"), *map(str, given)])
    return loop.Trainer(options, data.load(options), distributed.Processes(options), **kwargs)


def evaluated(loss, right):
    """The result of an evaluation of two images, so many of them right."""
    return evaluation.Result(loss, torch.tensor([[right, 2 - right], [0, 0]]), None)


def run(*options):
    """The program in this process; its exit status."""
    return train.main([str(option) for option in options])


def environment():
    # One thread a process: two cores carry up to four of them.
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


def start(*options, launcher=(sys.executable, "-m")):
    """The program in a process, and a group, of its own."""
    command = [*launcher, "resnet_fast.train", *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)


def torchrun(processes, *more):
    given = ("--nproc-per-node", str(processes), *(more or ("--standalone",)))
    return (sys.executable, "-m", "torch.distributed.run", *given, "-m")


def checkpoint(path):
    return torch.load(path, weights_only=True)


def differences(a, b, name=""):
    """Names of what is not the same, bit for bit, in two checkpoints; the clock may differ."""
    if name.endswith((".images_per_s", ".seconds")):
        return []
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and a.shape == b.shape and a.equal(b) else [name]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [name]
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [name]
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{name}.{i}")]
    return [] if a == b else [name]


AUGMENT_STREAM = (2**63 + 5, 7)  # seed and epoch
# set, channels, height, width, channels of the result, padding, flip: odd sizes, grey, one pixel, more padding than
# image, and an image larger than one block of the GPU's kernel.
AUGMENT_CASES = [
    (9, 3, 7, 5, 3, 2, True),
    (5, 1, 5, 9, 3, 1, True),
    (4, 1, 6, 6, 1, 2, False),
    (3, 2, 1, 1, 2, 0, True),
    (2, 3, 3, 4, 3, 5, True),
    (3, 3, 19, 23, 3, 4, True),
]


def augment_arguments(count, channels, height, width, outputs, padding, flip, dtype=torch.float32, random=True):
    """Of augment: every image, the first one twice, and an empty slot; in float32 all entries of the table differ."""
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)
    index = torch.tensor([*range(count), -1, 0])
    table = (torch.arange(outputs * 256).reshape(outputs, 256) - 300).to(dtype)
    return images, index, table, stream(*AUGMENT_STREAM) if random else None, padding, flip


def augmented(images, index, table, chosen, padding, flip):
    """What augment gives, by the NumPy path of the workers."""
    pixels = images.numpy()[index.numpy()]
    pixels[index.numpy() < 0] = 0
    if chosen is not None:
        pixels = crop_and_flip(pixels, draws(*AUGMENT_STREAM, index.numpy(), 3), padding, flip)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels)).long().expand(-1, len(table), -1, -1)
    return torch.stack([table[k][pixels[:, k]] for k in range(len(table))], 1)


def rates(options, steps):
    """The learning rate of each step."""
    optimizer = recipes.optimizer(torch.nn.Linear(1, 1), recipes.of(options))
    schedule = recipes.schedule(optimizer, options, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found
