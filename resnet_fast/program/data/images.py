"""Image files as pixels: every kind of grey, upright, and one error for all that can be wrong with a file."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from ..reports.text import one_line

__all__ = ["centred", "check_regular", "open_image"]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258  # TIFF tag


def check_regular(path: Path) -> None:
    """Raises OSError for what is no file: opening a FIFO would wait for a writer."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        tests = {"folder": stat.S_ISDIR, "FIFO": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
        kind = next((name for name, test in tests.items() if test(mode)), "device")
        raise OSError(f"is a {kind}, want a file")


def _grey(image: Image.Image) -> Image.Image:
    """8 bits of a grey image with 16 or 32 bits a pixel, which Pillow would clip.

    16-bit pixels have a range, 0 to ``2**bits - 1``. 32-bit integers and floats have none: it is the image's own, with
    0 and the usual white in it (255, of floats 1), so that an image in the usual range keeps its brightness.
    """
    pixels = np.asarray(image)
    if not np.isfinite(pixels).all():
        raise ValueError("has pixels that are not finite")
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        low, high = 0.0, float(2**bits - 1)
    elif image.format == "PPM" and image.mode == "I":  # Pillow scales it to 16 bits
        low, high = 0.0, 65535.0
    else:
        low, high = min(0.0, float(pixels.min())), max(1.0 if image.mode == "F" else 255.0, float(pixels.max()))
    return Image.fromarray(np.rint((pixels.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8))


def open_image(source: Path | BinaryIO, channels: int) -> Image.Image:
    """The image, upright as its EXIF orientation says, in colour, or in grey if ``channels`` is 1.

    Raises:
        OSError: it is no file, or a broken one, of whatever kind.
    """
    if isinstance(source, Path):
        check_regular(source)
        # Not by its path: Pillow would map an uncompressed TIFF into memory, and mix up its sides when it turns it.
        with source.open("rb") as file:
            return open_image(file, channels)
    try:
        with Image.open(source) as image:
            image.load()  # a TIFF turns itself
            orientation = None
            # A photograph with damaged EXIF data is whole.
            with contextlib.suppress(Exception):
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            grey = _grey(image) if image.mode in ("I", "F") or image.mode.startswith("I;16") else image
            result = grey.convert("L" if channels == 1 else "RGB")
            return result.transpose(_TURNS[orientation]) if orientation in _TURNS else result
    # Pillow's decoders raise any exception for damaged files.
    except Exception as error:
        raise OSError(one_line(error)) from error


def centred(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop, 7/8 of the shorter side, resized to ``[C, size, size]``; images of that size are unchanged."""
    if image.size != (size, size):
        side = min(image.size) * 7 / 8
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
