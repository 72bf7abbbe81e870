"""The command line of ``python -m resnet_fast.train``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import backends, models
from . import config

__all__ = ["AMP", "MODELS", "Options", "ProgramError", "parse"]

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = [name for name in models.__all__ if name not in ("CifarResNet", "ResNet")]


class ProgramError(Exception):
    """An error that the user can fix: the program prints the message without a traceback and exits with status 2."""


# Options that the trained weights do not depend on.
_NO_RESULT = {
    *("data", "test_data", "out", "checksum", "device", "threads", "workers", "save_every", "keep", "resume"),
    *("config", "evaluate", "tensorboard", "profile", "data_on", "checkpoints"),
    *("allow_world_change", "allow_nan"),
}


@dataclass(frozen=True)
class Options:
    """The options of the command line with their defaults; ``parse`` holds their help texts."""

    data: str
    out: str = "runs/last"
    config: str | None = None
    test_data: str | None = None
    checksum: str | None = None
    image_size: int = 224
    limit: int | None = None
    validation: float = 0.0
    model: str = "cifar_resnet20"
    recipe: str = "onecycle"
    epochs: int | None = None
    lr: float | None = None
    batch: int = 128
    accumulate: int = 1
    weight_decay: float | None = None
    warmup: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    init: str | None = None
    seed: int = 0
    amp: str = "off"
    ema: float = 0.0
    channels_last: bool = True
    compile: bool = False
    cuda_graph: str = "off"
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    strategy: str = "ddp"
    sync_bn: bool = False
    workers: int = 2
    data_on: str = "auto"
    save_every: int = 0
    keep: int = 3
    checkpoints: str = "whole"
    resume: str | None = None
    evaluate: str | None = None
    tensorboard: bool = False
    profile: bool = False
    allow_world_change: bool = False
    allow_nan: bool = False

    def result(self) -> dict[str, Any]:
        """The options that the trained weights depend on; a resumed run must have the same."""
        return {name: value for name, value in asdict(self).items() if name not in _NO_RESULT}

    def as_yaml(self) -> str:
        """The options as a file for ``--config``, but for what is of one call only."""
        return config.text(
            {name: v for name, v in asdict(self).items() if name not in ("config", "resume", "evaluate")}
        )

    def check(self) -> None:
        """Raises ProgramError for a value out of range or options that exclude each other."""
        at_least = {"batch": 1, "accumulate": 1, "keep": 1, "workers": 0, "save_every": 0, "image_size": 1, "seed": 0}
        for name, least in [*at_least.items(), ("epochs", 1), ("limit", 1), ("threads", 1)]:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ProgramError(f"--{name.replace('_', '-')} is {value}, want at least {least}")
        at_most = {"seed": 2**64 - 1, "threads": 1024, "image_size": 16384}
        for name, most in at_most.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise ProgramError(f"--{name.replace('_', '-')} is {value}, want at most {most}")
        for name in ("lr", "weight_decay", "warmup", "mixup", "cutmix"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ProgramError(f"--{name.replace('_', '-')} is {value}, want a number from 0")
        for name in ("label_smoothing", "validation"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ProgramError(
                    f"--{name.replace('_', '-')} is {value}, want a share from 0 to below 1, such as 0.1"
                )
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise ProgramError(f"--batch is {self.batch}, want an even one: --mixup and --cutmix mix images in pairs")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ProgramError("--tensorboard needs tensorboard: pip install resnet_fast[tensorboard]")
        if not 0 <= self.ema < 1:
            raise ProgramError(f"--ema is {self.ema}, want a decay from 0 (off) to below 1, such as 0.999")
        if self.strategy == "fsdp" and self.ema:
            raise ProgramError("--ema does not run with --strategy fsdp: the average is kept whole on each process")
        if self.checkpoints == "sharded" and self.strategy != "fsdp" and self.evaluate is None:
            raise ProgramError("--checkpoints sharded is for sharded weights: want --strategy fsdp")
        if self.strategy == "fsdp" and self.amp == "fp16":
            raise ProgramError("--amp fp16 does not run with --strategy fsdp: want --amp bf16, which needs no scaler")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ProgramError(f"{message} (--help lists the options)")


def _parser(exit_on_error: bool = True) -> _Parser:
    """The command line's parser; ``--data`` may come from ``--config``, so :func:`parse` asks for it."""
    parser = _Parser(
        prog="python -m resnet_fast.train",
        description="Trains a residual network; under torchrun, on many devices or machines.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=exit_on_error,
        epilog=(
            "python -m resnet_fast.train --data mnist5k --out runs/digits\n"
            "python -m resnet_fast.train --data cifar-10-python.tar.gz --model cifar_resnet32 --recipe he\n"
            "torchrun --nproc-per-node 2 -m resnet_fast.train --data photos/ --model resnet50 --amp bf16\n"
            "python -m resnet_fast.train --config runs/digits/config.yaml --seed 1 --out runs/again"
        ),
    )
    defaults = {field.name: field.default for field in fields(Options)}

    def option(group: Any, name: str, **kwargs: Any) -> None:
        group.add_argument(name, default=defaults[name.removeprefix("--").replace("-", "_")], **kwargs)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        help="mnist5k, a CIFAR archive, a folder (train/CLASS/*, test/CLASS/*), or WebDataset shards: a folder of "
        "train-*.tar and test-*.tar, or a pattern such as 'train-{000..146}.tar'",
    )
    option(data, "--test-data", metavar="PATTERN", help="shards to test on, where --data is a pattern")
    option(data, "--checksum", metavar="MD5", help="of an archive of one's own in CIFAR's format")
    option(data, "--image-size", type=int, metavar="PIXELS", help="to which photographs are cut (default 224)")
    option(data, "--limit", type=int, metavar="N", help="train on N images only")
    option(
        data,
        "--validation",
        type=float,
        metavar="SHARE",
        help="keep a share of each class's training images back to choose best.pt by; the test images are then used "
        "once, at the end",
    )
    option(data, "--workers", type=int, metavar="N", help="processes that load (default 2)")
    option(
        data,
        "--data-on",
        choices=["auto", "device", "workers"],
        help="who prepares images: the device, from its memory, where they fit (auto: if so), or the workers",
    )
    how = parser.add_argument_group("training")
    option(how, "--model", choices=MODELS, metavar="MODEL", help=", ".join(MODELS) + " (default cifar_resnet20)")
    option(how, "--recipe", choices=["he", "onecycle"], help="steps as He et al., or one cosine cycle (default)")
    option(how, "--epochs", type=int, metavar="N", help="default: 164 for he, 10 for onecycle")
    option(how, "--lr", type=float, help="highest learning rate (default: the recipe's)")
    option(how, "--batch", type=int, metavar="N", help="images a process and pass (default 128)")
    option(how, "--accumulate", type=int, metavar="N", help="passes a step (default 1)")
    option(how, "--weight-decay", type=float, help="default: the recipe's")
    option(
        how,
        "--warmup",
        type=float,
        metavar="EPOCHS",
        help="the learning rate rises for so long (default: a quarter of onecycle's epochs, none of he's)",
    )
    option(how, "--label-smoothing", type=float, metavar="SHARE", help="of probability spread over all classes")
    option(how, "--mixup", type=float, metavar="ALPHA", help="mix pairs of images by a share of Beta(ALPHA, ALPHA)")
    option(how, "--cutmix", type=float, metavar="ALPHA", help="paste boxes of a share of Beta(ALPHA, ALPHA)")
    option(
        how,
        "--init",
        metavar="FILE",
        help="start from the weights of a checkpoint or a state_dict, torchvision's too; the last layer may differ",
    )
    option(how, "--seed", type=int)
    option(how, "--ema", type=float, metavar="DECAY", help="evaluate a moving average of the weights")
    run = parser.add_argument_group("how it runs")
    option(run, "--amp", choices=["off", "bf16", "fp16"], help="autocast; fp16 with loss scaling")
    option(run, "--channels-last", action=argparse.BooleanOptionalAction)
    option(run, "--compile", action=argparse.BooleanOptionalAction, help="torch.compile")
    option(
        run,
        "--cuda-graph",
        choices=["auto", "on", "off"],
        help="a step as one CUDA graph (auto: on one GPU, without --compile and fp16; default off)",
    )
    option(run, "--backend", choices=list(backends.NAMES), help="eager: PyTorch's own operators, to compare")
    option(run, "--device", choices=["auto", "cpu", "cuda"])
    option(run, "--threads", type=int, metavar="N", help="default: as many as PyTorch takes")
    option(run, "--strategy", choices=["ddp", "fsdp"], help="with several processes: replicate, or shard (FSDP2)")
    option(
        *(run, "--sync-bn"),
        action=argparse.BooleanOptionalAction,
        help="batch statistics over all processes (default: each its own, as torchvision and timm)",
    )
    kept = parser.add_argument_group("what is kept")
    option(kept, "--out", metavar="FOLDER", help="checkpoints, log.csv, curves.png, confusion.png (default runs/last)")
    option(kept, "--save-every", type=int, metavar="STEPS", help="also between epochs")
    option(kept, "--keep", type=int, metavar="N", help="newest checkpoints kept, besides the best (default 3)")
    option(
        kept,
        "--checkpoints",
        choices=["whole", "sharded"],
        help="one file (default), or with --strategy fsdp a folder into which each process writes its shards",
    )
    option(
        kept,
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from FILE, or the newest in --out; auto: the newest in --out, or start where there is none",
    )
    option(
        kept,
        "--allow-world-change",
        action=argparse.BooleanOptionalAction,
        help="--resume with another number of processes, --batch or --accumulate",
    )
    option(kept, "--allow-nan", action=argparse.BooleanOptionalAction, help="go on although the loss is not finite")
    option(
        kept,
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        help="also a log for TensorBoard, in --out/tensorboard",
    )
    option(
        kept,
        "--profile",
        action=argparse.BooleanOptionalAction,
        help="trace ten steps into --out/trace-PROCESS.json.gz",
    )
    other = parser.add_argument_group("instead of training, and before it")
    option(other, "--evaluate", metavar="FILE", help="test the checkpoint FILE on --data, write nothing")
    option(
        other, "--config", metavar="FILE", help="YAML of options, as --out/config.yaml; the command line goes before"
    )
    return parser


def parse(arguments: list[str] | None = None) -> Options:
    """The options of the command line and of the file that its ``--config`` names.

    Raises:
        ProgramError: an option is unknown, not a value of its kind, out of range, or excluded by another; or the file
            is not good.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.config is not None:
        kinds = {field.name: str(field.type) for field in fields(Options)}
        try:
            file = config.arguments(Path(given.config), _parser(exit_on_error=False), kinds)
        except ValueError as error:
            raise ProgramError(str(error)) from error
        given = parser.parse_args([*file, *arguments])
    if given.data is None:
        parser.error("the following arguments are required: --data")
    options = Options(**vars(given))
    options.check()
    return options
