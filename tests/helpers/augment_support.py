"""Calls of the operator augment, and what they give by the NumPy path of the training program's workers."""

import numpy as np
import torch

from resnet_fast.program.data.augment import crop_and_flip, draws, stream

SEED, EPOCH = 2**63 + 5, 7

# set, channels, height, width, channels of the result, padding, flip: odd sizes, grey, one pixel, more padding than
# image, and an image larger than one block of the GPU's kernel.
CASES = [
    (9, 3, 7, 5, 3, 2, True),
    (5, 1, 5, 9, 3, 1, True),
    (4, 1, 6, 6, 1, 2, False),
    (3, 2, 1, 1, 2, 0, True),
    (2, 3, 3, 4, 3, 5, True),
    (3, 3, 19, 23, 3, 4, True),
]


def arguments(count, channels, height, width, outputs, padding, flip, dtype=torch.float32, random=True):
    """Every image, the first one twice, and an empty slot; a table whose entries all differ."""
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)
    index = torch.tensor([*range(count), -1, 0])
    table = (torch.arange(outputs * 256).reshape(outputs, 256) - 300).to(dtype)
    return images, index, table, stream(SEED, EPOCH) if random else None, padding, flip


def expected(images, index, table, chosen, padding, flip):
    pixels = images.numpy()[index.numpy()]
    pixels[index.numpy() < 0] = 0
    if chosen is not None:
        pixels = crop_and_flip(pixels, draws(SEED, EPOCH, index.numpy(), 3), padding, flip)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels)).long().expand(-1, len(table), -1, -1)
    return torch.stack([table[k][pixels[:, k]] for k in range(len(table))], 1)
