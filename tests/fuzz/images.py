"""Damaged image files: they are read, or raise OSError."""

import functools
import io

import numpy as np
from PIL import Image

from fuzz.mutations import mutated, small_array
from resnet_fast.program.data.images import centred, open_image

COLOUR = ("AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
GREY = (("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("TIFF", np.float32), ("PPM", np.uint16))
FORMS = [*((name, np.uint8, 3) for name in COLOUR), *((name, dtype, 1) for name, dtype in GREY)]


@functools.cache
def whole(form, number):
    """The file as it should be."""
    name, dtype, channels = form
    dice = np.random.default_rng(number)
    image = Image.fromarray(small_array(dice, (24, 32, 3) if channels == 3 else (24, 32), dtype))
    exif = Image.Exif()
    exif[274] = 1 + number
    options = {"exif": exif} if name in ("AVIF", "JPEG", "PNG", "WEBP") else {}
    if name == "TIFF":
        options["compression"] = [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"][number % 4]
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def check(seed):
    dice = np.random.default_rng(seed)
    content = whole(FORMS[seed % len(FORMS)], int(dice.integers(8)))
    # What a file is, its first bytes say: damaged ones are damaged elsewhere, mostly.
    damaged = mutated(content, dice, harmless=int(dice.choice([0, 16])))
    for channels in (1, 3):
        try:
            pixels = centred(open_image(io.BytesIO(damaged), channels), 8)
        except OSError:
            continue
        assert pixels.shape == (channels, 8, 8)
        assert pixels.dtype == np.uint8
