"""``python -m resnet_fast.predict CHECKPOINT IMAGE...``: classes and probabilities of image files.

Exit status: 0 all images read, 1 some not readable, 2 the checkpoint cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    from .program import data, networks
    from .program.options import ProgramError
    from .program.reports.text import printable
except ModuleNotFoundError as error:
    sys.exit(f"resnet_fast.predict needs {error.name}: pip install resnet_fast[train]")

__all__ = ["load", "main", "predict"]


def load(checkpoint: Path) -> tuple[nn.Module, data.Preparation]:
    """The network of a checkpoint in eval mode, with averaged weights if it has them, and how to prepare its input.

    Raises:
        ProgramError: the file cannot be loaded, or ``resnet_fast.train`` did not write it.
    """
    return networks.of_checkpoint(checkpoint)


@torch.no_grad()
def predict(network: nn.Module, preparation: data.Preparation, image: Path) -> Tensor:
    """``softmax(network(image))``: class probabilities, ``[classes]``.

    Raises:
        OSError, ValueError: the image cannot be read.
    """
    pixels = data.centred(data.open_image(image, preparation.channels), preparation.size)
    like = torch.empty(())
    x = networks.prepare(torch.tensor(pixels)[None], preparation, like, torch.channels_last)
    return network(x)[0].softmax(0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fast.predict", description="Classes and probabilities of image files."
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, nargs="+", metavar="image")
    parser.add_argument("--top", type=int, metavar="N", help="classes shown for each image (default 3; --json: all)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each image, probabilities from 0 to 1")
    given = parser.parse_args(arguments)
    if given.top is not None and given.top < 1:
        parser.error(f"--top is {given.top}, want at least 1")
    try:
        network, preparation = load(given.checkpoint)
    except ProgramError as error:
        print(f"resnet_fast.predict: {error}", file=sys.stderr)
        return 2
    classes = preparation.classes
    top = min(given.top or (len(classes) if given.json else 3), len(classes))
    status = 0
    for image in given.images:
        try:
            best = predict(network, preparation, image).topk(top)
        except (OSError, ValueError) as error:
            print(f"{image}: cannot be read: {error}", file=sys.stderr)  # escapes what it cannot take
            if given.json:
                print(json.dumps({"image": str(image), "error": str(error)}))
            status = 1
            continue
        answers = [(classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        if given.json:
            found = [{"class": name, "probability": probability} for name, probability in answers]
            print(json.dumps({"image": str(image), "classes": found}))
        else:
            print(printable(f"{image}: {', '.join(f'{name} {probability:.1%}' for name, probability in answers)}"))
    return status


if __name__ == "__main__":
    sys.exit(main())
