"""Networks compiled by ``torch.compile(backend="resnet_fast")``, for the tests of that backend."""

import copy
import logging
from contextlib import contextmanager

import torch
from helpers.support import randomize_

from resnet_fast import reference
from resnet_fast.compiler import backend
from resnet_fast.compiler.graph import ChainGraph

# By its name where the package is installed; where it only lies on the path, there is no entry point.
BACKEND = "resnet_fast" if "resnet_fast" in torch._dynamo.list_backends() else backend


def compiled(network, **options):
    """A copy of ``network`` whose calls are compiled, by a subclass of its class, so that copies are compiled, too."""
    kind = type(network)
    call = torch.compile(kind.forward, backend=BACKEND, **options)
    made = copy.deepcopy(network)
    made.__class__ = type(f"Compiled{kind.__name__}", (kind,), {"forward": lambda self, *args: call(self, *args)})
    return made


@contextmanager
def graphs():
    """What the backend found in each graph that is compiled meanwhile."""
    seen = []

    class Handler(logging.Handler):
        def emit(self, record):
            seen.extend(arg for arg in record.args if isinstance(arg, ChainGraph))

    log, handler = logging.getLogger("resnet_fast.compiler"), Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield seen
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def counts(seen):
    """Fused convolutions, all of them, and chains."""
    return sum(g.fused for g in seen), sum(g.layers for g in seen), sum(len(g.chains) for g in seen)


def block():
    return randomize_(reference.BasicBlock(4, 4)).eval()
