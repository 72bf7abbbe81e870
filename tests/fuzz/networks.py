"""Random networks, fused, beside the same in plain PyTorch: whatever is done to both, they stay the same network."""

import copy
import io
import pickle
import random
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast import blocks, reference
from resnet_fast.ops.conv_gradient import convolution_backward

from .modules import Network

# How far results may be apart, as parts of their norm. In float64 ten layers and a step leave some 1e-13, in float32
# 1e-5: what is beyond is wrong, not rounded. Accuracy has tests of its own.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1}
# In float32 rounding turns a ReLU now and then, which is a gradient more or less: one of some thousand.
FLIPPED = 5e-2


def check(seed, structure=False):
    """``structure``: also with blocks that stand twice or share layers, and with modules that change places later."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice((torch.float64, torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16))
    twins = (native_twins if rng.random() < 0.15 else fused_twins)(rng, structure)
    trial = Trial(rng, dtype, structure, *twins)
    try:
        for _ in range(rng.randint(2, 5)):
            trial.step()
    except PlainRaisesError:
        pass  # a map smaller than its padding, a ReLU in place of what the backward pass wants, variance of one pixel


def fused_twins(rng, reuse):
    plain = trained(Network(rng, reuse)).eval()
    return resnet_fast.fuse(plain), plain, 3


def native_twins(rng, reuse):
    """A stage of the package's own blocks, and of their twins."""
    kind, width, out = (
        rng.choice(("Block", "BasicBlock", "Bottleneck")),
        rng.choice((8, 16, 17)),
        rng.choice((4, 8, 16)),
    )
    count, stride = rng.randint(1, 3), rng.choice((1, 2))
    stages = []
    for module, stage in ((blocks, blocks.Stage), (reference, nn.Sequential)):
        make = getattr(module, kind)
        inner = out * getattr(make, "expansion", 1)
        stages.append(stage(make(width, out, stride), *(make(inner, out, 1) for _ in range(count - 1))))
    for stage in stages if reuse and count > 1 else ():
        stage.append(stage[1])
    ours, plain = stages
    ours.load_state_dict(trained(plain).state_dict())
    return ours.eval(), plain.eval(), width


def trained(network):
    """With batch norms as after training: statistics and parameters that are not zeros and ones."""
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, nn.BatchNorm2d):
                for name, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)):
                    if name != "num_batches_tracked":
                        positive = name in ("weight", "running_var")
                        t.copy_(torch.rand_like(t) + 0.5 if positive else torch.randn_like(t) * 0.2)
    return network


def enlarge(module, args, y):
    return y * 1.5


class PlainRaisesError(Exception):
    """The plain network cannot do what was asked of both: there is nothing to compare with."""


class TameGradients(TorchDispatchMode):
    """Weights' gradients in float32 by which oneDNN would overwrite memory, as ops/conv_gradient.py says: the
    plain network asks PyTorch for them, and so do the layers of ours that no kernel runs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            grad, x, weight, bias, stride, padding, _, _, _, groups, mask = args
            if groups == 1 and weight.shape[2:] == (1, 1) and x.dtype == torch.float32:
                return convolution_backward(grad, x, weight, bias, stride, padding, mask)
        return function(*args, **(kwargs or {}))


class Trial:
    """Ours and the plain network, and what is done to both."""

    def __init__(self, rng, dtype, structure, ours, plain, channels):
        self.rng, self.dtype, self.structure, self.channels = rng, dtype, structure, channels
        self.ours, self.plain = ours.to(dtype), plain.to(dtype)
        self.done = []

    def step(self):
        actions = [self.change, self.copied, self.stored, self.again, self.settings]
        actions += [self.rebuild] * 2 if self.structure else []
        # bfloat16 rounds too much for gradients to be compared.
        actions += [self.train_step] * 3 if self.dtype != torch.bfloat16 else []
        action = self.rng.choice(actions)
        self.done.append(action.__name__)
        action()
        self.compare()

    def images(self):
        n, h, w = self.rng.choice((1, 2, 3)), self.rng.randint(9, 20), self.rng.randint(9, 20)
        layout = self.rng.choice((torch.contiguous_format, torch.channels_last))
        return torch.randn(n, self.channels, h, w).to(self.dtype).contiguous(memory_format=layout)

    def of_both(self, function):
        """What ``function`` makes of ours and of the plain network."""
        try:
            theirs = function(self.plain)
        except (RuntimeError, ValueError) as error:
            raise PlainRaisesError from error
        return function(self.ours), theirs

    # What is done.

    def change(self):
        """Parameters and statistics, by one of the ways of changing them."""
        way = self.rng.choice(("in place", "data", "load", "new parameter"))
        self.done[-1] += f" ({way})"
        state = {k: v * 1.1 if v.is_floating_point() else v for k, v in self.plain.state_dict().items()}

        def changed(net):
            if way == "load":
                net.load_state_dict(state)
                return
            for module in net.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    if way == "in place":
                        with torch.no_grad():
                            p.mul_(0.9)
                    elif way == "data":
                        p.data = p.data * 0.9
                    else:
                        setattr(module, name, nn.Parameter(p.detach() * 0.9))

        self.of_both(changed)

    def train_step(self):
        """Forward, backward, a step of an optimizer; results, gradients and statistics are compared."""
        x, frozen, kind = self.images(), self.rng.random() < 0.2, self.rng.choice((torch.optim.SGD, torch.optim.AdamW))
        seed = self.rng.randrange(1 << 30)

        def stepped(net):
            net.train()
            for m in net.modules() if frozen else ():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
            optimizer = kind(net.parameters(), lr=1e-3)
            optimizer.zero_grad()
            torch.manual_seed(seed)  # of dropout
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = net(given)
            torch.manual_seed(seed)
            with TameGradients() if self.dtype == torch.float32 else nullcontext():
                (y * torch.randn(y.shape).to(y.dtype)).sum().backward()
            gradients = {"input": given.grad, **{k: p.grad for k, p in net.named_parameters()}}
            result = {"output": y, **gradients, **{k: b.clone() for k, b in net.named_buffers()}}
            optimizer.step()
            return result

        self.same(*self.of_both(stepped), "training step")
        # What rounding did must not grow from step to step.
        self.ours.load_state_dict(self.plain.state_dict())

    def copied(self):
        way = self.rng.choice(("deepcopy", "pickle", "torch.save"))
        self.done[-1] += f" ({way})"
        if way == "deepcopy":
            self.ours = copy.deepcopy(self.ours)
        elif way == "pickle":
            self.ours = pickle.loads(pickle.dumps(self.ours))
        else:
            file = io.BytesIO()
            torch.save(self.ours, file)
            file.seek(0)
            self.ours = torch.load(file, weights_only=False)

    def stored(self):
        """state_dicts are exchanged, both ways."""
        ours, theirs = self.ours.state_dict(), self.plain.state_dict()
        assert list(ours) == list(theirs), f"keys {list(ours)}, want {list(theirs)}"
        assert all(ours[k].equal(theirs[k]) for k in ours), "state_dicts differ"
        self.plain.load_state_dict(ours)
        self.ours.load_state_dict(theirs)

    def again(self):
        """Unfused, which gives the classes back; fused once more, now and then twice."""
        if not isinstance(self.ours, Network):
            return
        self.ours = resnet_fast.unfuse(self.ours, inplace=self.rng.random() < 0.5)
        theirs = [type(m) for m in self.plain.modules()]
        assert [type(m) for m in self.ours.modules()] == theirs, "classes did not come back"
        x = self.images()
        with torch.no_grad():
            back, plain = self.of_both(lambda net: net(x))
        assert back.equal(plain), "unfused, it is another network"
        for _ in range(self.rng.choice((1, 1, 2))):
            self.ours = resnet_fast.fuse(self.ours, inplace=self.rng.random() < 0.5)

    def settings(self):
        """Of modules, hooks among them, and of tensors."""
        kinds = ("eps", "momentum", "hook", "frozen", "channels_last", *["double"] * (self.dtype == torch.float32))
        kind = self.rng.choice(kinds)
        self.done[-1] += f" ({kind})"

        def set_in(net):
            norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
            convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
            if kind == "eps" and norms:
                norms[-1].eps = 0.01
            elif kind == "momentum" and norms:
                norms[0].momentum = 0.2
            elif kind == "hook":
                convs[0].register_forward_hook(enlarge)
            elif kind == "frozen":
                convs[-1].requires_grad_(False)
            elif kind == "channels_last":
                net.to(memory_format=torch.channels_last)
            elif kind == "double":
                net.double()

        self.of_both(set_in)
        self.dtype = torch.float64 if kind == "double" else self.dtype

    def rebuild(self):
        """Other modules, or the same in other places."""
        way = self.rng.choice(("slice", "moved", "twice", "norm", "conv", "gone"))
        self.done[-1] += f" ({way})"
        draws = [self.rng.random() for _ in range(3)]

        def pick(choices, i):
            return choices[int(draws[i] * len(choices))]

        def rebuilt(net):
            rows = [m for m in net.modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) > 1]
            convs = [m for m in net.modules() if isinstance(getattr(m, "conv", None), nn.Conv2d)]
            if way == "slice" and isinstance(net, Network):
                net.stages[0] = net.stages[0][: -(len(net.stages[0]) > 1) or None]
            elif way in ("norm", "conv") and convs:
                owner = pick(convs, 0)
                if way == "norm" and hasattr(owner, "norm"):
                    owner.norm = nn.Identity()
                else:
                    torch.manual_seed(int(draws[1] * 1e6))
                    owner.conv = copy.deepcopy(owner.conv)
                    nn.init.normal_(owner.conv.weight, std=0.1)
            elif rows:
                row = pick(rows, 0)
                if way == "moved":
                    row[0], row[len(row) - 1] = row[len(row) - 1], row[0]
                elif way == "twice":
                    row.append(pick(list(row), 1))
                elif way == "gone":
                    del row[int(draws[1] * len(row))]

        self.of_both(rebuilt)

    # What must hold.

    def compare(self):
        """In eval mode, with gradients and without."""
        x, grad = self.images(), self.rng.random() < 0.3

        def run(net):
            with torch.set_grad_enabled(grad):
                y = net.eval()(x)
            leaves = {k: p for k, p in net.named_parameters() if p.requires_grad} if grad else {}
            if self.dtype != torch.float64 or not y.requires_grad or not leaves:
                return {"output": y}
            grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
            return {"output": y, **dict(zip(leaves, grads, strict=True))}

        self.same(*self.of_both(run), "eval mode")

    def same(self, ours, theirs, what):
        limit, buffers = TOLERANCE[self.dtype], dict(self.plain.named_buffers())
        # Sums that are zero but for rounding, as a bias's gradient in front of batch norm: small against the others.
        largest = max(b.double().norm().item() for b in theirs.values() if b is not None)
        assert list(ours) == list(theirs), f"{what}: {list(ours)}, want {list(theirs)}"
        for name, a in ours.items():
            b, where = theirs[name], f"{self.plain}\n{what} after {', '.join(self.done)}: {name}"
            assert (a is None) == (b is None), f"{where} is {'None' if a is None else 'not None'}"
            if b is None:
                continue
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{where}: {a.shape} {a.dtype}, want {b.shape} {b.dtype}"
            gradient = name != "output" and name not in buffers
            relative = FLIPPED if self.dtype == torch.float32 and gradient else limit
            error, size = ((t.double() - s).norm().item() for t, s in ((a, b.double()), (b, 0)))
            assert error <= relative * size + limit * largest, f"{where} is off by {error:.3g} of {size:.3g}"
