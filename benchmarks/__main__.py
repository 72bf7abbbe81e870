"""``python -m benchmarks``: the networks fused and eager, checked, timed in turn, as a table."""

from __future__ import annotations

import argparse
import sys

import torch

from . import busy, report, runner, training
from .cases import FUSED, NETWORKS, OPERATORS
from .gpu import device as devices
from .gpu.device import DEVICES, DTYPES
from .gpu.variants import GPU_VARIANTS, SLOW
from .images import KINDS
from .peers import BF16_PEERS, PEERS
from .variants import BASELINE, VARIANTS
from .verify import WrongResultError

QUICK = ("eager", "eager channels_last", "resnet_fast")


def _training(options: argparse.Namespace) -> int:
    """Forward, backward and step of every variant, interleaved; bfloat16 under autocast beside float32."""
    rows: list[training.Result] = []
    wrong = False
    load = busy.Load.now()
    print(report.conditions())
    for case in training.CASES:
        if options.match not in case.group or (case.full and not options.full):
            continue
        print(f"{case.group}, {options.images} ...", flush=True)
        names = [n for n, v in training.VARIANTS.items() if options.all_variants or not v.compiled]
        measured, refused = training.results(case, names, options.images, options.rounds, options.seconds)
        rows += measured
        for name, reason in refused.items():
            print(f"  {name} is not timed, {type(reason).__name__}: {reason}")
            wrong = True
    if not rows:
        sys.exit(f"no case contains {options.match!r}")
    print(f"\nGradients were checked against float64 before a step was timed.\n\n{training.table(rows)}\n")
    print(f"{training.readme_table(rows)}\n")
    baselines = {f"{r.group}, {r.images}": r.seconds["step"] for r in rows if r.variant == training.BASELINE}
    machine = busy.line(load, baselines)
    print(f"{machine}\n")
    print("written:", *map(str, report.save_training(rows, machine)))
    return int(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch and of the kernels (default 2)")
    parser.add_argument(
        "--variants", nargs="+", choices=[*{**VARIANTS, **PEERS, **GPU_VARIANTS}], help=f"default: {', '.join(QUICK)}"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU where one is visible")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the arithmetic (default float16 on a GPU)")
    parser.add_argument("--cold", action="store_true", help="overwrite the GPU's cache before each call")
    parser.add_argument("--all-variants", action="store_true", help="torch.compile too")
    parser.add_argument("--peers", action="store_true", help="ONNX Runtime, OpenVINO, MNN and ncnn too")
    parser.add_argument("--training", action="store_true", help="training steps instead of inference")
    parser.add_argument("--images", choices=KINDS, default="photographs", help="what is timed; all are verified")
    parser.add_argument("--operators", action="store_true", help="single operators, too")
    parser.add_argument("--full", action="store_true", help="resnet18 and resnet50, too")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30.0, help="budget for the samples of a case")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    if options.training:
        return _training(options)
    try:
        device = devices.of("cpu" if options.peers else options.device, options.dtype, options.cold)
    except ValueError as error:
        parser.error(str(error))
    peers = BF16_PEERS if device.dtype == torch.bfloat16 else PEERS
    if options.peers:
        VARIANTS.update(peers)
    known = runner.variants_of(device)
    quick = [*QUICK, *(peers if options.peers else ())]
    if device.dtype == torch.bfloat16:
        quick.append("torch.compile, freezing")  # another peer where engines in bfloat16 are few
    if device.name != "cpu":
        quick = [v for v in known if v not in SLOW]
    variants = options.variants or (list(known) if options.all_variants else quick)
    if unknown := set(variants) - set(known):
        parser.error(f"on {device.name} there is no variant {', '.join(sorted(unknown))}")
    cases = [case for case in (*NETWORKS, *FUSED) if options.full or not case.full]
    if options.operators:
        cases += [case for group in OPERATORS.values() for case in group]
    rows: list[runner.Result] = []
    wrong = False
    load = busy.Load.now()
    print(report.conditions(device))
    for case in cases:
        if options.match not in case.group:
            continue
        kind = options.images if options.images in case.kinds else case.kinds[0]
        print(f"{case.group}, {kind} ...", flush=True)
        measured, refused = runner.results(case, variants, kind, device, rounds=options.rounds, seconds=options.seconds)
        rows += measured
        for name, reason in refused.items():
            print(f"  {name} is not timed, {type(reason).__name__}: {reason}")
            wrong = wrong or isinstance(reason, WrongResultError)
    if not rows:
        sys.exit(f"no case contains {options.match!r}")
    print(f"\nEvery result was checked against float64 before it was timed.\n\n{report.table(rows)}\n")
    machine = busy.line(load, {f"{r.group}, {r.images}": r.seconds for r in rows if r.variant == BASELINE})
    print(f"{machine}\n")
    print("written:", *(str(path) for path in report.save(rows, device, machine)))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
