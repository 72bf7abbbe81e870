"""WebDataset shards: what the library wrote and what the program writes, whole and damaged."""

import gzip
import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import webdataset
from helpers.program.support import checkpoint, differences, run
from PIL import Image

from resnet_fast.program import shards as command
from resnet_fast.program.data import Batches, load, loader, shards
from resnet_fast.program.options import Options, ProgramError

CLASSES = ["cat", "$5_$", os.fsdecode(b"\xff")]


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((10, 10, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def photographs(root, count=7):
    """Of brightness 60 for the first class, 70 and so on of the same; 120 for the second."""
    for part in ("train", "test"):
        for label, name in enumerate(CLASSES):
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i}.PNG").write_bytes(png(60 * (label + 1) + i))
    return root


@pytest.fixture
def made(tmp_path):
    assert command.main([str(photographs(tmp_path / "photographs")), str(tmp_path / "shards"), "--samples", "8"]) == 0
    return tmp_path / "shards"


def written(path, samples):
    """A shard by the library, of what a sample holds by suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for key, sample in samples.items():
            writer.write({"__key__": key, **sample})
    return path


def loaded(data, test=None, **options):
    return load(Options(str(data), test_data=None if test is None else str(test), image_size=8, **options))


def contents(images):
    """Label and brightness of each image."""
    return sorted((int(images.labels[i]), int(np.asarray(images.open(i)).mean())) for i in range(len(images)))


def test_shards_of_a_folder_hold_its_images(made, tmp_path):
    data, folder = loaded(made), loaded(tmp_path / "photographs")
    assert len(list(made.glob("train-*.tar"))) == 3
    assert data.preparation == folder.preparation
    assert not data.warnings
    for mine, its in ((data.train, folder.train), (data.test, folder.test)):
        assert contents(mine) == contents(its)
    labels = data.train.labels.tolist()
    assert labels != sorted(labels)  # shuffled once, for programs that stream


def test_the_library_reads_the_shards(made):
    paths = sorted(map(str, made.glob("train-*.tar")))
    found = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("png", "cls"))
    data = loaded(made).train
    assert [label for _, label in found] == data.labels.tolist()
    assert [image.getpixel((0, 0)) for image, _ in found] == [data.open(i).getpixel((0, 0)) for i in range(21)]


def test_the_same_folder_gives_the_same_bytes(made, tmp_path):
    again = tmp_path / "again"
    command.write_shards(tmp_path / "photographs", again, 8)
    one, other = ({path.name: path.read_bytes() for path in place.iterdir()} for place in (made, again))
    assert one == other


def images_of(data, workers=0, first=0, rank=0, world=1):
    batches = Batches(len(data.train), 4 // world, rank, world, seed=data.train.seed)
    batches.epoch, batches.first = 2, first
    return list(loader(data.train, batches, workers, False))


def same(a, b):
    return len(a) == len(b) and all(
        x.images.equal(y.images) and x.labels.equal(y.labels) for x, y in zip(a, b, strict=True)
    )


def test_order_is_of_seed_and_epoch_alone(made):
    """For any number of workers and processes, from any batch on."""
    data = loaded(made, seed=3)
    alone = images_of(data)
    assert len(alone) == 5
    assert same(images_of(data, workers=2), alone)
    assert same(images_of(data, first=2), alone[2:])
    for rank, slots in ((0, slice(2)), (1, slice(2, 4))):
        part = images_of(data, rank=rank, world=2)
        assert all(x.images.equal(y.images[slots]) for x, y in zip(part, alone, strict=True))
    assert not same(images_of(loaded(made, seed=4)), alone)


def test_shards_of_others(tmp_path):
    """No index, no names of classes, more members than wanted, folders and capitals in names."""
    more = {"json": b"{}", "seg.png": b"x"}
    train = {f"a/{i}": {"cls": str(i % 3).encode(), "png": png(9 * i), **more} for i in range(9)}
    written(tmp_path / "x-0.tar", dict(list(train.items())[:4]))
    written(tmp_path / "x-1.tar", dict(list(train.items())[4:]))
    written(tmp_path / "y.tar", {"0": {"cls": b"2", "PNG": png(7)}})
    for pattern in ("x-{0..1}.tar", "x-?.tar", f"x-0.tar::{tmp_path}/x-1.tar"):
        data = loaded(tmp_path / pattern, tmp_path / "y.tar")
        assert data.preparation.classes == ["0", "1", "2"]
        assert contents(data.train) == sorted((i % 3, 9 * i) for i in range(9))
        assert contents(data.test) == [(2, 7)]
    assert data.train.name(4) == f"{tmp_path}/x-1.tar: a/4.png"
    assert len(loaded(tmp_path / "x-?.tar", tmp_path / "y.tar", limit=5).train) == 5
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    assert loaded(tmp_path / "x-?.tar", tmp_path / "y.tar").preparation.classes == CLASSES


def test_broken_samples_are_named_and_counted(tmp_path):
    samples = {
        "fine": {"cls": b" 1\n", "png": png(1)},
        "unlabelled": {"png": png(1)},
        "blind": {"cls": b"1"},
        "double": {"cls": b"1", "png": png(1), "jpg": png(1)},
        "named": {"cls": b"cat", "png": png(1)},
        "negative": {"cls": b"-1", "png": png(1)},
        "huge": {"cls": b"9" * 30, "png": png(1)},
        "first": {"cls": b"0", "png": png(1)},
    }
    test = written(tmp_path / "test.tar", {"strange": {"cls": b"2", "png": png(1)}, "0": {"cls": b"0", "png": png(1)}})
    data = loaded(written(tmp_path / "train.tar", samples), test)
    assert len(data.train) == 2
    assert len(data.test) == 1
    broken, empty = data.warnings
    assert broken.startswith("broken samples, left out: 7 (")
    assert f"{tmp_path}/train.tar: unlabelled: 1 images and 0 .cls, want one and one; " in broken
    assert "blind: 0 images and 1 .cls" in broken
    assert "double: 2 images and 1 .cls" in broken
    assert "named: class b'cat', want a number" in broken
    assert "negative: class -1, want from 0 to 999999" in broken
    assert "huge: class 9999" in broken
    assert "strange: class 2, want from 0 to 1" in broken
    assert empty == "classes without test images: 1 (1)"


def cut(content):
    return content[:-10240]


def bad_header(content):
    """Of the third member: tarfile alone would take it for the end."""
    at = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"][3]
    return content[:at] + b"\xff" + content[at + 1 :]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "damaged or cut off at byte|unexpected end of data"),
        (bad_header, "damaged or cut off at byte|bad checksum"),
        (gzip.compress, "invalid header|truncated header|bad checksum"),
        (lambda _: b"", "empty file"),
        (lambda _: b"x" * 2000, "invalid header|bad checksum|truncated"),
    ],
)
def test_damaged_shards_are_named(damage, message, packed, made, tmp_path):
    path = made / "train-000001.tar"
    if not packed:
        written(path, {str(i): {"cls": b"0", "png": png(i)} for i in range(20)})
    content = damage(path.read_bytes())
    path.write_bytes(content)
    if packed and damage is bad_header:
        path.write_bytes(content + bytes(10240))  # its index is not asked any more
    with pytest.raises(ProgramError, match=rf"train-000001\.tar is no whole, .* tar file: ({message})") as caught:
        loaded(made)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_no_file_is_not_opened(made):
    (made / "train-000001.tar").unlink()
    os.mkfifo(made / "train-000001.tar")
    with pytest.raises(ProgramError, match=r"train-000001\.tar is no .* tar file: is a FIFO, want a file"):
        loaded(made)


def test_an_index_that_does_not_fit_is_not_used(made):
    path = made / "train-000000.tar"
    rows = shards.scan(path, None)[0]
    with tarfile.open(path, "a") as archive:
        for suffix, content in (("cls", b"1"), ("png", png(0))):
            info = tarfile.TarInfo(f"more.{suffix}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert path.stat().st_size == 20480  # tarfile fills up to that
    with path.open("ab") as file:
        file.write(bytes(10240))
    assert len(loaded(made).train) == 22
    for row, wrong in ((rows[0], [-1, 0, 0, 0]), (rows[0], [0, 10**6, 0, 0]), (rows[0], [0, 0, 0, 10**7])):
        content = bytearray(path.read_bytes())
        content[512:1024] = (shards.packed_index(np.array([wrong]), len(content)) + bytes(512))[:512]
        path.write_bytes(content)
        assert len(loaded(made).train) == 22, row


def test_a_sample_taken_out_in_place_is_noticed(made):
    """Padding keeps the size."""
    path = made / "train-000000.tar"
    header, offset, size, _ = shards.scan(path, None)[0][3].tolist()
    content = path.read_bytes()
    end = offset + size + -size % 512
    path.write_bytes(content[: header - 1024] + content[end:] + bytes(end - header + 1024))
    assert path.stat().st_size == len(content)
    data = loaded(made).train
    assert len(data) == 20
    brightness = [60 * (1 + CLASSES.index(name)) for name in sorted(CLASSES)]
    found = [data.open(i).getpixel((0, 0))[0] // 60 * 60 for i in range(20)]
    assert found == [brightness[label] for label in data.labels]


@pytest.mark.parametrize(
    ("given", "problem"),
    [({"png": png(0)}, "a: 1 images and 0 .cls"), ({"txt": b""}, "a: 0 images"), (None, "want KEY.cls")],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_shards_without_a_sample(part, given, problem, made):
    for path in made.glob(f"{part}-*.tar"):
        written(path, {} if given is None else {"a": given})
    with pytest.raises(ProgramError, match=rf"no sample in \d shards, .*{part}-000000.tar the first: .*{problem}"):
        loaded(made)


def test_a_folder_of_shards_wants_both_parts(made):
    for path in made.glob("test-*"):
        path.unlink()
    with pytest.raises(ProgramError, match=r"has shards train-\*\.tar, but no test-\*\.tar"):
        loaded(made)


@pytest.mark.parametrize(
    ("data", "test", "message"),
    [
        ("{}/train-*.tar", None, "shards to train with; want --test-data"),
        ("{}", "{}/test-*.tar", "--test-data goes with shards"),
        ("{}/none-*.tar", "{}/test-*.tar", "--data is .*: no shard .*/none-"),
        ("{}/train-*.tar", "{}/test-{{0..2}}.tar", "--test-data is .*: no shard .*/test-0.tar"),
        ("{}/train-${{NONE}}.tar", "{}/test-*.tar", "missing environment variable"),
    ],
)
def test_patterns_that_lead_nowhere(data, test, message, made):
    with pytest.raises(ProgramError, match=message):
        loaded(data.format(made), test and test.format(made))


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "cannot be read"), ("{}", "no list of class names"), ("[1]", "no list of class names")],
)
def test_names_of_classes_that_are_none(content, message, made):
    (made / "classes.json").write_text(content)
    with pytest.raises(ProgramError, match=f"classes.json .*{message}"):
        loaded(made)


def test_without_the_library(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ProgramError, match=r"shards need webdataset: pip install resnet_fast\[shards\]"):
        loaded(made / "train-*.tar", made / "test-*.tar")
    assert len(loaded(made).train) == 21  # it is asked for patterns, and to write and to scan


def test_a_run_goes_on_at_the_sample(made, tmp_path, capfd):
    """Bit for bit, and the broken image is named and counted."""
    damaged = made / "train-000001.tar"
    content = bytearray(damaged.read_bytes())
    _, offset, size, _ = shards.scan(damaged, None)[0][2].tolist()
    content[offset + 40 : offset + size] = bytes(size - 40)
    damaged.write_bytes(content)
    given = ["--data", made, "--image-size", 8, "--batch", 6, "--epochs", 1, "--workers", 0, "--save-every", 1]
    assert run(*given, "--out", tmp_path / "whole") == 0
    text = capfd.readouterr().out
    assert "broken image 1: " in text
    assert f"{damaged}: 00000010.png: " in text
    assert "1 broken images were left out" in text
    assert run(*given, "--out", tmp_path / "rest", "--resume", tmp_path / "whole/step-00000001.pt") == 0
    first, second = (checkpoint(tmp_path / name / "step-00000003.pt") for name in ("whole", "rest"))
    assert not differences(first, second)


def test_what_the_command_refuses(made, tmp_path, capsys):
    assert command.main([str(tmp_path / "photographs"), str(made)]) == 2
    assert f"{made} holds shards: want an empty folder" in capsys.readouterr().err
    assert command.main([str(tmp_path), str(tmp_path / "new")]) == 2
    assert "has no folder 'train'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command.main([str(tmp_path / "photographs"), str(tmp_path / "file/new")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["a", "b", "--samples", "0"])
    assert "--samples is 0, want at least 1" in capsys.readouterr().err


def test_a_shard_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    root = photographs(tmp_path / "photographs", 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ProgramError, match="No space left on device"):
        command.write_shards(root, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
