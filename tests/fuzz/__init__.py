"""Random trials of the whole: ``make test`` runs some, ``python -m tests.fuzz`` as many as there is time for.

A trial is of a kind and has a number, the seed of all that it draws; it raises where something is wrong.
"""

import faulthandler
import importlib
import traceback
import warnings

import torch

# Each is a module with check(seed).
KINDS = ("operators", "wrong_calls", "networks", "structure", "images", "archives", "shards")


def trial(kind, seed):
    """What is wrong, as text, or None."""
    # Of quantized and complex tensors, of dead filters.
    warnings.simplefilter("ignore")
    try:
        check(kind, seed)
    except Exception:
        return traceback.format_exc()
    return None


def check(kind, seed):
    if kind == "structure":
        importlib.import_module(f"{__name__}.networks").check(seed, structure=True)
    else:
        importlib.import_module(f"{__name__}.{kind}").check(seed)


def begin():
    """In a process for trials: its last words should tell where it was. Small shapes take no more than one thread."""
    faulthandler.enable()
    torch.set_num_threads(1)
