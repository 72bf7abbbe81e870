"""Data of the training program: archives, folders, augmentation, order."""

import gzip
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import zlib
from itertools import chain

import numpy as np
import pytest
import torch
from helpers.program.support import CLASSES, archive_members, environment, make_archive, random_images
from PIL import Image

from resnet_fast.program import data
from resnet_fast.program.data import Batches, Files, Samples, load, loader
from resnet_fast.program.data.archives import checksum, digits, read_cifar
from resnet_fast.program.data.augment import crop_and_flip, draws, random_box
from resnet_fast.program.options import Options, ProgramError

TRAIN, TEST = random_images(23), random_images(11, seed=1)


ARCHIVES = [f"cifar-{classes}-{form}.tar.gz" for classes in (10, 100) for form in ("python", "binary")]


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive(name, tmp_path):
    path = make_archive(tmp_path / name, archive_members(name.removesuffix(".tar.gz"), 23))
    arrays = read_cifar(path, checksum(path))
    order = np.concatenate([np.arange(23)[i::5] for i in range(5)]) if "-10-" in name else np.arange(23)
    np.testing.assert_array_equal(arrays.train_images, TRAIN[0][order])
    np.testing.assert_array_equal(arrays.train_labels, TRAIN[1][order])
    np.testing.assert_array_equal(arrays.test_images, TEST[0])
    np.testing.assert_array_equal(arrays.test_labels, TEST[1])
    assert arrays.classes == (CLASSES if "-10-" in name else [f"fine{i}" for i in range(100)])


def test_another_checksum_is_refused(tmp_path):
    path = make_archive(tmp_path / "cifar-10-python.tar.gz", archive_members("cifar-10-python", 23))
    with pytest.raises(ProgramError, match=r"has the checksum .* want c58f30108f718f92721af3b95e74349a"):
        read_cifar(path)


def test_another_name_is_refused(tmp_path):
    path = make_archive(tmp_path / "pictures.tar.gz", {})
    with pytest.raises(ProgramError, match=r"want one of cifar-10-python\.tar\.gz"):
        read_cifar(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_that_calls_is_refused(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "made")
    members = {**archive_members("cifar-10-python", 23), "cifar-10-batches-py/test_batch": pickle.dumps(evil)}
    path = make_archive(tmp_path / "cifar-10-python.tar.gz", members)
    with pytest.raises(ProgramError, match=r"asks for posix\.mkdir"):
        read_cifar(path, checksum(path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (b"not a pickle", "not a readable pickle"),
        (pickle.dumps([1]), "holds a list, want a dictionary"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}), "lacks"),
        (pickle.dumps({b"data": np.zeros((2, 99), np.uint8), b"labels": [0, 1]}), r"want uint8 \[N, 3072\]"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "want from 0 to 9"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}), r"labels <U3 .* integers \[N\]"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1.5]}), r"labels float64 \[1\]"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [[1], [2, 3]]}), "make no array"),
        (pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}), "holds an array of f8, want u1"),
        (pickle.dumps({b"data": [[1] * 3072], b"labels": [1]}), "has pixels int64"),
        (pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": np.zeros(0, np.uint8)}), "no test images"),
    ],
)
def test_damaged_part(part, message, tmp_path):
    members = {**archive_members("cifar-10-python", 23), "cifar-10-batches-py/test_batch": part}
    path = make_archive(tmp_path / "cifar-10-python.tar.gz", members)
    with pytest.raises(ProgramError, match=message):
        read_cifar(path, checksum(path))


@pytest.mark.parametrize("names", [None, "cat", ["cat"], {b"label_names": b"cat"}, {b"label_names": [1]}])
def test_names_that_are_none(names, tmp_path):
    members = {**archive_members("cifar-10-python", 5), "cifar-10-batches-py/batches.meta": pickle.dumps(names)}
    path = make_archive(tmp_path / "cifar-10-python.tar.gz", members)
    with pytest.raises(ProgramError, match=r"batches.meta (holds a \w+, want a dictionary|has no list of class names)"):
        read_cifar(path, checksum(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_part_that_is_no_file(kind, tmp_path):
    """tarfile would follow a link to itself for ever."""
    link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    link.type, link.linkname = kind, "test_batch" if kind == tarfile.SYMTYPE else link.name
    path = make_archive(tmp_path / "cifar-10-python.tar.gz", {**archive_members("cifar-10-python", 5), link.name: link})
    with pytest.raises(ProgramError, match="test_batch is not a file"):
        read_cifar(path, checksum(path))


def test_damaged_compression(tmp_path):
    path = make_archive(tmp_path / "cifar-10-binary.tar.gz", archive_members("cifar-10-binary", 23))
    whole = gzip.decompress(path.read_bytes())
    packer = zlib.compressobj(wbits=31)
    path.write_bytes(packer.compress(whole[:60_000]) + packer.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 99)
    with pytest.raises(ProgramError, match=r"cannot be read: .*Error -3 while decompressing data: invalid block type"):
        read_cifar(path, checksum(path))


def test_truncated_archive(tmp_path):
    path = make_archive(tmp_path / "cifar-10-binary.tar.gz", archive_members("cifar-10-binary", 23))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ProgramError, match="cannot be read"):
        read_cifar(path, checksum(path))


def test_digits():
    arrays = digits()
    assert arrays.train_images.shape == (4000, 1, 28, 28)
    assert np.bincount(arrays.train_labels).tolist() == [400] * 10
    assert np.bincount(arrays.test_labels).tolist() == [100] * 10
    rows = {image.tobytes() for image in arrays.train_images}
    assert sum(image.tobytes() in rows for image in arrays.test_images) == 0
    # Ink has its place: the middle of a nought is empty, that of a one is not.
    middles = [arrays.train_images[arrays.train_labels == d, 0, 12:16, 12:16].mean() for d in (0, 1)]
    assert middles[0] < 20 < 100 < middles[1]


def photographs(folder, broken=()):
    dice = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = dice.integers(0, 40, (30 + i, 50, 3), dtype=np.uint8) + np.uint8(150 * label)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                content = buffer.getvalue()
                path = place / f"{i}.png"
                path.write_bytes(content[: len(content) // 2] if f"{part}/{name}/{i}" in broken else content)
    return folder


def batch_of(dataset, batch, world=1, seed=None):
    return list(loader(dataset, Batches(len(dataset), batch, 0, world, seed=seed), 0, False))


def test_folder(tmp_path):
    data = load(Options(str(photographs(tmp_path)), image_size=16))
    assert data.preparation.classes == ["cat", "dog"]
    assert len(data.train) == 12
    (batch,) = batch_of(data.test, 6)
    assert batch.images.shape == (6, 3, 16, 16)
    # Dogs are brighter: the pictures go with their labels.
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [bool(image.float().mean() > 100) for image in batch.images] == [False] * 3 + [True] * 3
    (batch,) = batch_of(data.train, 12, seed=0)
    assert [int(image.float().mean() > 100) for image in batch.images] == batch.labels.tolist()


def test_broken_images_are_named_and_replaced_or_left_out(tmp_path):
    data = load(Options(str(photographs(tmp_path, broken=("train/cat/2", "test/dog/1"))), image_size=16))
    (batch,) = batch_of(data.train, 12, seed=0)
    assert sorted(batch.labels.tolist()) == [0] * 6 + [1] * 6  # cat/3 twice
    assert len(batch.broken) == 1
    assert "train/cat/2.png" in batch.broken[0]
    (batch,) = batch_of(data.test, 6)
    assert batch.labels.tolist() == [0, 0, 0, 1, -1, 1]
    assert "test/dog/1.png" in batch.broken[0]


def test_last_image_broken(tmp_path):
    """The first one takes its place."""
    data = load(Options(str(photographs(tmp_path, broken=("train/dog/5",))), image_size=16))
    batch = data.train.__getitems__([(0, 11)])
    assert batch.labels.tolist() == [0]
    assert "train/dog/5.png" in batch.broken[0]


def test_places_without_an_image_are_ignored(tmp_path):
    files = load(Options(str(photographs(tmp_path)), image_size=16)).test
    for dataset in (files, Samples(*random_images(6), 0, False, None)):
        labels = torch.cat([batch.labels for batch in batch_of(dataset, 4)])
        assert len(labels) == 8
        assert labels[6:].tolist() == [-1, -1]
        assert labels[:6].min() >= 0


def test_folder_without_test(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    with pytest.raises(ProgramError, match="has no folder 'test'"):
        load(Options(str(tmp_path)))


def test_no_such_data():
    with pytest.raises(ProgramError, match=r"--data is /nowhere: no such file"):
        load(Options("/nowhere"))


def test_dice_are_uniform_and_independent():
    dice = draws(3, 5, np.arange(20000), 3)
    assert dice.min() >= 0
    assert dice.max() < 1
    # A mean of n uniform numbers has deviation sqrt(1 / 12 n) = 0.002, a correlation 1 / sqrt(n) = 0.007: five of each.
    np.testing.assert_allclose(dice.mean(0), 0.5, atol=0.0102)
    others = np.concatenate(
        [dice[:, :2], draws(3, 6, np.arange(20000), 3), draws(4, 5, np.arange(20000), 3), dice[1:][[*range(19999), 0]]],
        1,
    )
    off_diagonal = np.corrcoef(others.T) - np.eye(others.shape[1])
    assert np.abs(off_diagonal).max() < 0.036


def test_dice_do_not_depend_on_the_batch():
    together = draws(1, 2, np.array([5, 7, 9]), 3)
    np.testing.assert_array_equal(together[1:2], draws(1, 2, np.array([7]), 3))
    assert len(np.unique(together)) == 9


def test_crop_and_flip():
    images = np.arange(2 * 1 * 3 * 3, dtype=np.uint8).reshape(2, 1, 3, 3) + 1
    # The window's corner at (0, 2) of the padded image, mirrored; and in the middle.
    out = crop_and_flip(images, np.array([[0.0, 0.99, 0.0], [0.5, 0.5, 0.9]]), 1, True)
    np.testing.assert_array_equal(out[0, 0], [[0, 0, 0], [0, 3, 2], [0, 6, 5]])
    np.testing.assert_array_equal(out[1], images[1])
    np.testing.assert_array_equal(crop_and_flip(images, np.full((2, 3), 0.4), 1, False), images)


def test_random_box_lies_within():
    for dice in draws(0, 0, np.arange(500), 4):
        left, top, right, bottom = random_box(50, 20, dice)
        assert 0 <= left < right <= 50 + 1e-9
        assert 0 <= top < bottom <= 20 + 1e-9


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_the_order_of_one(accumulate):
    alone = Batches(53, 8, seed=4, accumulate=accumulate)
    parts = [Batches(53, 4, rank, 2, seed=4, accumulate=accumulate) for rank in (0, 1)]
    for batches in (alone, *parts):
        batches.epoch = 3
    joined = [a + b for a, b in zip(*parts, strict=True)]
    assert joined == list(alone)
    assert len(joined) == len(alone) == 6
    keys = [*chain(*joined)]
    assert len(set(keys)) == 48
    alone.epoch = 4
    assert [i for _, i in chain(*alone)] != [i for _, i in keys]


def test_order_is_taken_up_anywhere():
    whole = list(Batches(50, 8, seed=1))
    rest = Batches(50, 8, seed=1)
    rest.first = 2
    assert list(rest) == whole[2:]


def test_tests_see_every_image_once():
    keys = [[*chain(*Batches(21, 4, rank, 4))] for rank in range(4)]
    assert len({len(k) for k in keys}) == 1
    assert sorted(i for k in keys for _, i in k if i >= 0) == list(range(21))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_pictures(workers):
    images, labels = random_images(40)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    found = list(loader(Samples(images, labels, 4, True, 7), Batches(40, 8, seed=7), workers, False))
    assert torch.get_rng_state().equal(before)
    one_by_one = Samples(images, labels, 4, True, 7)
    for batch, keys in zip(found, Batches(40, 8, seed=7), strict=True):
        for image, label, key in zip(batch.images, batch.labels, keys, strict=True):
            assert image.equal(one_by_one.__getitems__([key]).images[0])
            assert label == labels[key[1]]


def test_workers_end_with_their_block_whatever_happens():
    before = multiprocessing.active_children()
    loaded = loader(Samples(*random_images(40), 4, True, 7), Batches(40, 8, seed=7), 2, False)
    kept = iter(loaded)  # as a traceback would keep it

    def fail():
        with data.workers_of(loaded):
            next(kept)
            assert len(multiprocessing.active_children()) == len(before) + 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert multiprocessing.active_children() == before


def test_a_worker_left_behind_does_not_keep_the_interpreter():
    """Its end terminates children, once, and waits for them."""
    script = """
import torch
from resnet_fast.program import data
data.loading.GRACE = 1
images, labels = torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.zeros(40, dtype=torch.long)
samples = data.Samples(images.numpy(), labels.numpy(), 4, True, 7)
batches = iter(data.loader(samples, data.Batches(40, 8, seed=7), 1, False))
next(batches)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment())


def test_files_are_counted(tmp_path):
    loaded = load(Options(str(photographs(tmp_path)), image_size=8, limit=5))
    assert isinstance(loaded.train, Files)
    assert len(loaded.train) == 5
