"""Image files as pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["centred", "open_image"]


def open_image(path: Path, channels: int) -> Image.Image:
    """The image in colour, or in grey if ``channels`` is 1; raises OSError or ValueError if it is broken."""
    try:
        with Image.open(path) as image:
            return image.convert("L" if channels == 1 else "RGB")
    # Pillow's decoders raise these for damaged files, too.
    except (SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def centred(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop, 7/8 of the shorter side, resized to ``[C, size, size]``; images of that size are unchanged."""
    if image.size != (size, size):
        side = min(image.size) * 7 / 8
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
