"""Folders of images as people have them: every kind of grey, turned, damaged, strange names, and what is no image."""

import io
import json
import os
import socket

import numpy as np
import pytest
import torch
from helpers.program.support import checkpoint, run
from PIL import Image

from resnet_fast import predict
from resnet_fast.program import report
from resnet_fast.program.data import load, open_image
from resnet_fast.program.data.photographs import Photographs, check_readable
from resnet_fast.program.options import Options, ProgramError
from resnet_fast.program.reports.text import chart_labels, printable

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def image_file(path, pixels, form="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, form, **options)
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("form", "pixels"),
    [
        ("PNG", (RAMP * 65535).astype(np.uint16)),
        ("TIFF", (RAMP * 65535).astype(np.uint16)),
        ("PPM", (RAMP * 65535).astype(np.uint16)),
        ("TIFF", (RAMP * 65535).astype(np.int32)),
        ("TIFF", (RAMP * 200).astype(np.int32)),
        ("TIFF", RAMP.astype(np.float32)),
        ("TIFF", (RAMP * 0.5).astype(np.float32)),
        ("TIFF", (RAMP * 3000 - 1000).astype(np.float32)),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.dtype}-{v.max():.0f}",
)
def test_grey_of_every_depth_is_scaled(form, pixels, channels, tmp_path):
    found = np.asarray(open_image(image_file(tmp_path / "x", pixels, form), channels)).reshape(16, 16, -1)
    assert found.shape[2] == channels
    # The usual white stays white: 0 to 200 of integers is not stretched, nor 0 to 0.5 of floats.
    top = {200: 200, 0.5: 127.5}.get(float(pixels.max()), 255)
    assert np.abs(found[..., 0] - RAMP * top).max() <= 1.01  # the integers' own rounding, and one of 8 bits


def test_twelve_bits_have_a_range_of_their_own(tmp_path):
    """Two pixels in three bytes, as TIFF packs them."""
    values = [0, 4095, 2048, 1024]
    packed = bytes(
        b for a, c in zip(values[::2], values[1::2], strict=True) for b in (a >> 4, (a & 15) << 4 | c >> 8, c & 255)
    )
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(packed))]
    content = b"II*\0" + (8 + len(packed)).to_bytes(4, "little") + packed + len(tags).to_bytes(2, "little")
    for tag, value in tags:
        content += b"".join(n.to_bytes(k, "little") for n, k in ((tag, 2), (4, 2), (1, 4), (value, 4)))
    found = np.asarray(open_image(io.BytesIO(content + bytes(4)), 1))
    assert found.tolist() == [[0, 255, 128, 64]]


def test_pixels_that_are_not_finite_are_an_error(tmp_path):
    path = image_file(tmp_path / "x.tif", np.array([[0, np.nan]], np.float32), "TIFF")
    with pytest.raises(OSError, match="not finite"):
        open_image(path, 3)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_images_stand_upright(form, tmp_path):
    """Each orientation of EXIF: the file holds what a camera held that way saw."""
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    held = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in held.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        options = {"lossless": True} if form == "WEBP" else {}
        path = image_file(tmp_path / f"{orientation}", np.ascontiguousarray(pixels), form, exif=exif, **options)
        assert np.abs(np.asarray(open_image(path, 1)).astype(int) - upright).max() <= 1, orientation


def test_damaged_exif_data_leave_the_photograph(tmp_path):
    path = image_file(tmp_path / "x.png", np.full((4, 4), 9, np.uint8), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.asarray(open_image(path, 1)).max() == 9


def photographs(root, classes=("cat", "dog"), count=4):
    for part, name in ((part, name) for part in ("train", "test") for name in classes):
        for i in range(count):
            image_file(root / part / name / f"{i}.png", np.full((12, 12), 20 * i, np.uint8))
    return root


def loaded(root):
    return load(Options(str(root), image_size=8))


def test_what_is_no_image_is_named_and_skipped(tmp_path):
    root = photographs(tmp_path / "data")
    cat = root / "train/cat"
    os.mkfifo(cat / "fifo.png")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(cat / "socket.png"))
    (cat / "loop.png").symlink_to("loop.png")
    (cat / "gone.png").symlink_to("nowhere")
    (cat / "above").symlink_to("..")
    (root / "train/whole").symlink_to("..")
    (cat / "far").symlink_to(tmp_path)
    (root / "train/stray.png").write_bytes(b"")
    image_file(cat / ".ipynb_checkpoints/0.png", RAMP.astype(np.uint8))
    image_file(root / "train/.cache/0.png", RAMP.astype(np.uint8))
    image_file(cat / "deeper/0.png", RAMP.astype(np.uint8))
    with listening:
        data = loaded(root)
    assert data.preparation.classes == ["cat", "dog"]
    assert len(data.train) == 9
    (warning,) = data.warnings
    for name, reason in {
        "fifo.png": "is a FIFO, want a file",
        "socket.png": "is a socket, want a file",
        "loop.png": "Too many levels of symbolic links",
        "gone.png": "No such file",
        "cat/above": "leads back to a folder",
        "far/data": "leads back to a folder",
        "train/whole": "leads back to a folder",
        "stray.png": "in no class",
        ".ipynb_checkpoints": "hidden",
        ".cache": "hidden",
    }.items():
        assert any(name in part and reason in part for part in warning.split("; ")), name
    assert f"skipped in {root}: 10 (" in warning


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_file_is_opened_that_is_none(make, tmp_path):
    """Not in training, where it may have come later, nor by predict: opening a FIFO would wait."""
    make(tmp_path / "x.png")
    with pytest.raises(OSError, match=r"is a \w+, want a file"):
        open_image(tmp_path / "x.png", 3)


def test_classes_that_teach_nothing(tmp_path):
    root = photographs(tmp_path, ["cat"])
    assert [*loaded(root).warnings] == ["there is one class only, cat: every answer will be right"]
    (root / "train/dog").mkdir()
    assert [*loaded(root).warnings] == [f"classes without {part} images: 1 (dog)" for part in ("training", "test")]


@pytest.mark.parametrize("part", ["train", "test"])
def test_no_readable_image_ends_the_run_before_the_first_epoch(part, tmp_path):
    for path in photographs(tmp_path).glob(f"{part}/*/*.png"):
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ProgramError, match=rf"no {part}\w* image can be read .*{part}/dog/3.png: image file is trunc"):
        loaded(tmp_path)


def test_one_readable_image_will_do():
    class Last(Photographs):
        def name(self, index):
            return str(index)

        def open(self, index):
            if index < 2:
                raise OSError("no")

    check_readable(Last(np.zeros(3), 8, None), "test")
    with pytest.raises(ProgramError, match="the last, 1: no"):
        check_readable(Last(np.zeros(2), 8, None), "test")


NAMES = ["$5_$", "a\\b{", "x\ny", os.fsdecode(b"caf\xe9"), "猫"]


def test_class_names_of_any_bytes_survive_a_run(tmp_path, capfd):
    root = photographs(tmp_path / "data", NAMES, 1)
    out = tmp_path / "run"
    given = ["--data", root, "--out", out, "--image-size", 8, "--batch", 5, "--epochs", 1, "--workers", 0]
    assert run(*given) == 0
    text = capfd.readouterr()
    assert "is not drawn" not in text.out
    assert "Glyph" not in text.err
    assert (out / "confusion.png").stat().st_size > 1000
    assert checkpoint(out / "step-00000001.pt")["preparation"]["classes"] == sorted(NAMES)
    assert run(*given, "--resume") == 0
    assert json.loads(json.dumps(NAMES)) == NAMES
    images = [str(root / "test" / name / "0.png") for name in NAMES]
    capfd.readouterr()
    assert predict.main([str(out / "step-00000001.pt"), *images, "--top", "5"]) == 0
    shown = capfd.readouterr().out
    assert shown.count("$5_$ ") == shown.count("caf\\udce9 ") == shown.count("猫 ") == 5


def test_labels_of_charts_tell_classes_apart():
    labels, _ = chart_labels([*NAMES, "y" * 200])
    assert labels[:4] == ["$5_$", "a\\b{", "x\\ny", "caf\\udce9"]
    assert labels[4] in ("猫", "\\u732b")  # with a font that has it, or without
    assert len(labels[5]) == 40


def test_output_that_knows_ascii_only(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert printable("猫 é") == "\\u732b \\xe9"
    report.say("猫")


def test_a_chart_that_fails_ends_no_run(tmp_path, monkeypatch, capfd):
    def broken(*_, **__):
        raise ValueError("first\nsecond")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    rows = [{"epoch": 1, **{f"{part}_{what}": 0.5 for part in ("train", "test") for what in ("loss", "accuracy")}}]
    for chart, content in ((report.curves, {"run": rows}), (report.confusion_chart, torch.eye(2))):
        report.draw(chart, tmp_path / "x.png", content, *([["a", "b"]] if chart is report.confusion_chart else []))
        assert f"warning: {tmp_path}/x.png is not drawn: first second" in capfd.readouterr().out
