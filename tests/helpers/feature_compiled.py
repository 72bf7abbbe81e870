"""How a feature of PyTorch meets a network whose calls ``torch.compile(backend="resnet_fast")`` compiled."""

import copy
import functools

import torch
from helpers.compiler_support import counts, graphs
from helpers.feature_support import assert_close, counted, images, outcome

from resnet_fast import backends
from resnet_fast.compiler import backend as resnet_fast_backend

# What runs as a network: layers that a check calls one by one are as they were.
METHODS = ("forward", "features", "stem")
# Static shapes and every recompilation: a row must not depend on those before it. Hooks count whenever they are set.
SETTINGS = {
    "automatic_dynamic_shapes": False,
    "recompile_limit": 64,
    "fail_on_recompile_limit_hit": True,
    "skip_nnmodule_hook_guards": False,
}

# Of each call of a compiled graph: its fused convolutions, and all of them.
ran: list[tuple[int, int]] = []


def noting(graph_module, inputs):
    """The backend; ``ran`` has what its graphs found, each time that they are called."""
    with graphs() as seen:
        call = resnet_fast_backend(graph_module, inputs)

    def noted(*args):
        ran.append(counts(seen)[:2])
        return call(*args)

    return noted


def _calling(method, compiler):
    call = torch.compile(method, backend=compiler)
    return lambda self, *args, **kwargs: call(self, *args, **kwargs)


@functools.cache
def _compiled_class(kind, compiler):
    methods = {name: _calling(getattr(kind, name), compiler) for name in METHODS if hasattr(kind, name)}
    name = f"{kind.__name__} by {getattr(compiler, '__name__', compiler)}"
    globals()[name] = made = type(name, (kind,), {"__module__": __name__, **methods})  # where pickle finds it
    return made


def compiled(network, compiler=noting):
    """A copy whose calls are compiled."""
    made = copy.deepcopy(network)
    made.__class__ = _compiled_class(type(network), compiler)
    return made


def compiled_way(check, in_training):
    """The outcome for a network that is compiled, after it was compared with the network as it was."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = check.networks()[1].train(in_training)
    fast, plainly = compiled(eager), compiled(eager, "eager")
    x = images()
    theirs = outcome(check, eager, x.clone())
    backends.fallbacks(clear=True)
    ran.clear()
    with torch._dynamo.config.patch(SETTINGS), counted() as chains:
        ours = outcome(check, fast, x.clone())
        if isinstance(ours, Exception):
            assert check.error, ours
            assert isinstance(theirs, Exception), ours
            again = outcome(check, plainly, x.clone())
            return "raises as eager" if type(again) is type(ours) else "raises"
    assert not isinstance(theirs, Exception), theirs
    assert_close(ours, theirs, check.tolerance)
    left = any(fused < convolutions for fused, convolutions in ran)
    return "fused" if chains and not left and not backends.fallbacks() else "unfused"
