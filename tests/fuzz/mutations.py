"""Files with damage."""

import numpy as np


def mutated(content, dice, harmless=0):
    """``content`` with one to four random faults; the first ``harmless`` bytes stay, so that it is still opened."""
    data = bytearray(content)
    for _ in range(dice.integers(1, 5)):
        if len(data) <= harmless + 1:
            break
        at = int(dice.integers(harmless, len(data)))
        length = int(min(len(data) - at, 1 << dice.integers(0, 8)))
        match dice.integers(6):
            case 0:
                data[at] ^= 1 << dice.integers(8)
            case 1:
                data[at : at + length] = dice.bytes(length)
            case 2:
                data[at : at + length] = bytes([int(dice.choice([0, 255]))]) * length
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                del data[at:]
    return bytes(data)


def small_array(dice, shape, dtype):
    """Smooth, as photographs are, so that every part of a coder is used."""
    ramp = np.add.outer(np.linspace(0, 0.5, shape[0]), np.linspace(0, 0.5, shape[1]))
    noise = dice.random(shape) * 0.1
    pixels = (ramp[..., None] if len(shape) == 3 else ramp) + noise
    return (pixels * (np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1)).astype(dtype)
