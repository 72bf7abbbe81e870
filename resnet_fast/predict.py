"""``python -m resnet_fast.predict CHECKPOINT IMAGE...``: classes and probabilities of image files.

Exit status: 0 all images read, 1 some not readable, 2 the checkpoint cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    from .program import checkpoints, data, networks
    from .program.options import ProgramError
    from .program.text import printable
except ModuleNotFoundError as error:
    sys.exit(f"resnet_fast.predict needs {error.name}: pip install resnet_fast[train]")

__all__ = ["load", "main", "predict"]


def load(checkpoint: Path) -> tuple[nn.Module, data.Preparation]:
    """The network of a checkpoint in eval mode, with averaged weights if it has them, and how to prepare its input.

    Raises:
        ProgramError: the file cannot be loaded, or ``resnet_fast.train`` did not write it.
    """
    state = checkpoints.load(checkpoint)
    preparation = data.Preparation(**state["preparation"])
    network = networks.build(state["options"]["model"], preparation)
    weights = state["model"]
    if state["ema"] is not None:
        weights = {name.removeprefix("module."): t for name, t in state["ema"].items() if name != "n_averaged"}
    network.load_state_dict(weights)
    return network.eval().to(memory_format=torch.channels_last), preparation  # type: ignore[call-overload]


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
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes shown for each image (default 3)")
    given = parser.parse_args(arguments)
    if given.top < 1:
        parser.error(f"--top is {given.top}, want at least 1")
    try:
        network, preparation = load(given.checkpoint)
    except ProgramError as error:
        print(f"resnet_fast.predict: {error}", file=sys.stderr)
        return 2
    status = 0
    for image in given.images:
        try:
            best = predict(network, preparation, image).topk(min(given.top, len(preparation.classes)))
        except (OSError, ValueError) as error:
            print(f"{image}: cannot be read: {error}", file=sys.stderr)  # escapes what it cannot take
            status = 1
            continue
        answers = (
            f"{preparation.classes[i]} {share:.1%}"
            for i, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        print(printable(f"{image}: {', '.join(answers)}"))
    return status


if __name__ == "__main__":
    sys.exit(main())
