"""The command line of ``python -m resnet_fast.train``."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

from .. import backends, models

__all__ = ["MODELS", "Options", "ProgramError", "parse"]

MODELS = [name for name in models.__all__ if name not in ("CifarResNet", "ResNet")]


class ProgramError(Exception):
    """An error that the user can fix: the program prints the message without a traceback and exits with status 2."""


@dataclass(frozen=True)
class Options:
    """The options of the command line with their defaults; ``parse`` holds their help texts."""

    data: str
    out: str = "runs/last"
    test_data: str | None = None
    checksum: str | None = None
    image_size: int = 224
    limit: int | None = None
    model: str = "cifar_resnet20"
    recipe: str = "onecycle"
    epochs: int | None = None
    lr: float | None = None
    batch: int = 128
    accumulate: int = 1
    weight_decay: float | None = None
    seed: int = 0
    amp: str = "off"
    ema: float = 0.0
    channels_last: bool = True
    compile: bool = False
    cuda_graph: str = "auto"
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    strategy: str = "ddp"
    sync_bn: bool = True
    workers: int = 2
    data_on: str = "auto"
    save_every: int = 0
    keep: int = 3
    resume: str | None = None

    def result(self) -> dict[str, Any]:
        """The options that the trained weights depend on; a resumed run must have the same."""
        where = ("data", "test_data", "out", "checksum", "device", "threads", "workers", "data_on", "cuda_graph")
        others = (*where, "save_every", "keep", "resume")
        return {name: value for name, value in asdict(self).items() if name not in others}

    def check(self) -> None:
        """Raises ProgramError for a value out of range or options that exclude each other."""
        at_least = {"batch": 1, "accumulate": 1, "keep": 1, "workers": 0, "save_every": 0, "image_size": 1, "seed": 0}
        for name, least in [*at_least.items(), ("epochs", 1), ("limit", 1), ("threads", 1)]:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ProgramError(f"--{name.replace('_', '-')} is {value}, want at least {least}")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ProgramError(f"--{name.replace('_', '-')} is {value}, want a number from 0")
        if not 0 <= self.ema < 1:
            raise ProgramError(f"--ema is {self.ema}, want a decay from 0 (off) to below 1, such as 0.999")
        if self.strategy == "fsdp" and self.ema:
            raise ProgramError("--ema does not run with --strategy fsdp: the average is kept whole on each process")
        if self.strategy == "fsdp" and self.amp == "fp16":
            raise ProgramError("--amp fp16 does not run with --strategy fsdp: want --amp bf16, which needs no scaler")


def parse(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fast.train",
        description="Trains a residual network; under torchrun, on many devices or machines.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "python -m resnet_fast.train --data mnist5k --out runs/digits\n"
            "python -m resnet_fast.train --data cifar-10-python.tar.gz --model cifar_resnet32 --recipe he\n"
            "torchrun --nproc-per-node 2 -m resnet_fast.train --data photos/ --model resnet50 --amp bf16"
        ),
    )
    defaults = {field.name: field.default for field in fields(Options)}

    def option(group: Any, name: str, **kwargs: Any) -> None:
        group.add_argument(name, default=defaults[name.removeprefix("--").replace("-", "_")], **kwargs)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        help="mnist5k, a CIFAR archive, a folder (train/CLASS/*, test/CLASS/*), or WebDataset shards: a folder of "
        "train-*.tar and test-*.tar, or a pattern such as 'train-{000..146}.tar'",
    )
    option(data, "--test-data", metavar="PATTERN", help="shards to test on, where --data is a pattern")
    option(data, "--checksum", metavar="MD5", help="of an archive of one's own in CIFAR's format")
    option(data, "--image-size", type=int, metavar="PIXELS", help="to which photographs are cut (default 224)")
    option(data, "--limit", type=int, metavar="N", help="train on N images only")
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
    option(how, "--seed", type=int)
    option(how, "--ema", type=float, metavar="DECAY", help="evaluate a moving average of the weights")
    run = parser.add_argument_group("how it runs")
    option(run, "--amp", choices=["off", "bf16", "fp16"], help="autocast; fp16 with loss scaling")
    option(run, "--channels-last", action=argparse.BooleanOptionalAction)
    option(run, "--compile", action="store_true", help="torch.compile")
    option(
        run,
        "--cuda-graph",
        choices=["auto", "on", "off"],
        help="a step as one CUDA graph (auto: on one GPU, without --compile and fp16)",
    )
    option(run, "--backend", choices=list(backends.NAMES), help="eager: PyTorch's own operators, to compare")
    option(run, "--device", choices=["auto", "cpu", "cuda"])
    option(run, "--threads", type=int, metavar="N", help="default: as many as PyTorch takes")
    option(run, "--strategy", choices=["ddp", "fsdp"], help="with several processes: replicate, or shard (FSDP2)")
    option(
        run, "--sync-bn", action=argparse.BooleanOptionalAction, help="batch statistics over all processes (default)"
    )
    kept = parser.add_argument_group("what is kept")
    option(kept, "--out", metavar="FOLDER", help="checkpoints, log.csv, curves.png, confusion.png (default runs/last)")
    option(kept, "--save-every", type=int, metavar="STEPS", help="also between epochs")
    option(kept, "--keep", type=int, metavar="N", help="newest checkpoints kept, besides the best (default 3)")
    option(kept, "--resume", nargs="?", const="", metavar="FILE", help="go on from FILE, or the newest in --out")
    options = Options(**vars(parser.parse_args(arguments)))
    options.check()
    return options
