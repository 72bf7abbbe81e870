"""Checks of the rows of docs/features.md that are about modules and weights. See feature_support.py."""

import copy
import tempfile
import warnings

import torch
import torch.distributed as dist
from helpers.feature_support import check, foreign, fresh
from helpers.support import twins
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import resnet_fast
from resnet_fast import reference


def convolutions(m):
    return [part for part in m.modules() if isinstance(part, nn.Conv2d)]


def norms(m):
    return [part for part in m.modules() if isinstance(part, nn.BatchNorm2d)]


# Hooks


@check("hooks of a network or a stage")
def _(m, x):
    m(x)
    m.register_forward_hook(lambda _, i, y: y * 2)
    m.layer2.register_forward_pre_hook(lambda _, i: (i[0] * 2,))
    m.layer2.register_forward_hook(lambda _, i, y: y.view(y.shape[0], -1).view(y.shape) * 2)
    m.layer3.register_full_backward_hook(lambda _, i, o: tuple(g * 2 for g in i))
    return m(x), m


@check("hooks of a layer: forward, pre, backward")
def _(m, x):
    m(x)
    first, second, third = (m.get_submodule(f"layer{i}.0.conv2") for i in (1, 2, 3))
    first.register_forward_hook(lambda _, i, y: y * 2)
    second.register_forward_pre_hook(lambda _, i: (i[0].view(i[0].shape[0], -1).view(i[0].shape) * 2,))
    third.register_full_backward_hook(lambda _, i, o: tuple(g * 2 for g in i))
    return m(x), m


@check("global module hooks")
def _(m, x):
    hook = nn.modules.module.register_module_forward_hook(
        lambda part, i, y: y * 2 if isinstance(part, nn.Conv2d) else None
    )
    try:
        return m(x)
    finally:
        hook.remove()


@check("hooks of a `state_dict`")
def _(m, x):
    m.register_load_state_dict_pre_hook(lambda part, state, *_: state.update({k: v * 1.1 for k, v in state.items()}))
    m.load_state_dict(m.state_dict())
    return m(x)


# Layers


@check("`parametrize`: weight norm, spectral norm")
def _(m, x):
    parametrizations.weight_norm(m.layer1[0].conv1)
    with torch.no_grad():
        m.layer1[0].conv1.parametrizations.weight.original0.mul_(2)
    return m(x), m


@check("pruning")
def _(m, x):
    prune.l1_unstructured(m.layer1[0].conv1, "weight", 0.5)
    return m(x), m


@check("pruning, made permanent")
def _(m, x):
    for conv in convolutions(m):
        prune.l1_unstructured(conv, "weight", 0.5)
        prune.remove(conv, "weight")
    return m(x), m


@check("frozen batch norms: `eval()` of them alone")
def _(m, x):
    for norm in norms(m):
        norm.eval()
    return m(x), m


class Frozen(nn.Module):
    """As detection networks have it."""

    def __init__(self, n):
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.2), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


def frozen():
    eager = reference.CifarResNet(1).eval()
    for part in list(eager.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(part, name, Frozen(child.num_features))
    return resnet_fast.fuse(eager), eager


@check("`fuse`: frozen batch norms written out with buffers", networks=frozen)
def _(m, x):
    return m(x), m


@check("batch norms in training mode of a network in eval mode")
def _(m, x):
    for norm in norms(m):
        norm.train()
    return m(x), m


@check("`momentum=None`")
def _(m, x):
    for norm in norms(m):
        norm.momentum = None
    return [m(x), m(2 * x)], m


@check("`track_running_stats=False`")
def _(m, x):
    for norm in norms(m):
        norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, *[None] * 3
    return m(x), m


@check("`affine=False`")
def _(m, x):
    for norm in norms(m):
        norm.affine, norm.weight, norm.bias = False, None, None
    return m(x), m


def block_with_dropout():
    return twins(resnet_fast.blocks.Block, reference.Block, 3, 8, 1, 0.4)


@check("dropout behind a block", networks=block_with_dropout)
def _(m, x):
    return m(x), m


@check("groups, dilation, other padding modes")
def _(m, x):
    m.layer1[0].conv1.padding_mode = "circular"
    return m(x), m


@check("another activation, another norm")
def _(m, x):
    m.layer1[0].relu = nn.GELU()
    m.layer2[0].bn1 = nn.GroupNorm(4, 32)
    return m(x), m


@check("`SyncBatchNorm`", gradients=False)
def _(m, x):
    m = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    return m(x), m


@check("lazy modules, at the first call")
def _(m, x):
    torch.manual_seed(0)
    m.layer1[0].conv1 = nn.LazyConv2d(16, 3, padding=1, bias=False)
    m.layer1[0].conv1.train(m.training)
    return m(x), m


@check("lazy modules, from the second call on")
def _(m, x):
    torch.manual_seed(0)
    m.layer1[0].conv1 = nn.LazyConv2d(16, 3, padding=1, bias=False)
    with resnet_fast.backends.use("eager"):
        m(x)
    resnet_fast.backends.fallbacks(clear=True)
    return m(x), m


@check("dynamic quantisation of the classifier", gradients=False)
def _(m, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = quantize_dynamic(m, {nn.Linear})
    return m(x).detach(), m


# Weights


@check("optimizers: `fused`, `foreach`, plain", gradients=False)
def _(m, x):
    results = []
    for settings in ({"fused": True}, {"foreach": True}, {}):
        optimizer = torch.optim.SGD(m.parameters(), 0.05, **settings)
        m(x).square().mean().backward()
        optimizer.step()
        results.append(m(x).detach())
    return results, m


@check("`load_state_dict`, strict, both ways")
def _(m, x):
    m(x)
    state = {k: v * 1.1 for k, v in copy.deepcopy(m.state_dict()).items()}
    m.load_state_dict(state, strict=True)
    y = m(x)
    m.load_state_dict(state, strict=True, assign=True)
    return [y, m(x)], m


@check("weights changed in place, replaced, tied")
def _(m, x):
    m(x)
    with torch.no_grad():
        m.layer1[0].conv1.weight.mul_(1.5)
    m.layer1[0].conv2.weight = nn.Parameter(m.layer1[0].conv2.weight.detach() * 2)
    first = m(x)
    m.layer1[0].conv2.weight = m.layer1[0].conv1.weight
    return [first, m(x)], m


@check("changes that PyTorch does not count: `.data`, NumPy, shared memory")
def _(m, x):
    m(x)
    results = []
    for change in (
        lambda w: w.data.mul_(1.5),
        lambda w: w.detach().numpy().__imul__(1.5),
        lambda w: w.share_memory_().data.add_(0.1),
    ):
        change(m.layer1[0].conv1.weight)
        results.append(m(x))
    return results, m


@check("averaged weights: `AveragedModel`", gradients=False)
def _(m, x):
    average = AveragedModel(m)
    with torch.no_grad():
        m.conv1.weight.mul_(2)
    average.update_parameters(m)
    return average(x).detach(), m


@check("`deepcopy`, `copy.copy`")
def _(m, x):
    m(x)
    copied, shallow = copy.deepcopy(m), copy.copy(m)
    with torch.no_grad():
        m.conv1.weight.mul_(2)
    return [copied(x), shallow(x), m(x)], m


@check("made on `meta`, `to_empty`, loaded")
def _(m, x):
    state = {k: v.clone() for k, v in m.state_dict().items()}
    m = m.to("meta").to_empty(device="cpu")
    m.load_state_dict(state)
    return m(x), m


# Many processes


def in_a_group(run):
    def alone(m, x):
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            try:
                return run(m, x)
            finally:
                dist.destroy_process_group()

    return alone


@check("`DistributedDataParallel`", gradients=False)
@in_a_group
def _(m, x):
    y = DistributedDataParallel(m)(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in m.parameters())], m


@check("FSDP2: `fully_shard`", gradients=False)
@in_a_group
def _(m, x):
    m = fresh(m)
    fully_shard(m, mesh=init_device_mesh("cpu", (1,)))
    y = m(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.full_tensor() for p in m.parameters())], nn.Identity()


@check("`DataParallel` on CPUs")
def _(m, x):
    return nn.DataParallel(m)(x), m


# Structure


@check("a layer replaced after the first call")
def _(m, x):
    m(x)
    torch.manual_seed(0)
    m.layer2[0].conv1 = nn.Conv2d(16, 32, 5, stride=2, padding=2).train(m.training)
    return m(x), m


@check("`forward` of an instance or a subclass")
def _(m, x):
    m(x)
    block = m.layer2[0]
    block.forward = lambda y: type(block).forward(block, y) * 2
    return m(x), m


@check("`fuse`: attributes that the code asks for", networks=foreign)
def _(m, x):
    m(x)
    m.layer2[0].relu = nn.Hardtanh()
    return m(x), m


@check("modules of your own between the stages")
def _(m, x):
    m.layer2 = nn.Sequential(m.layer2, View())
    return m(x), m


class View(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1).view(x.shape) * 2


@check("`fuse_conv_bn_eval`: batch norms folded by hand", gradients=False)
def _(m, x):
    part = m.layer1[0]
    part.conv1 = nn.utils.fusion.fuse_conv_bn_eval(part.conv1.eval(), part.bn1.eval())
    part.bn1 = nn.Identity()
    return m(x).detach(), m


@check("a block twice in a network")
def _(m, x):
    m.layer1 = type(m.layer1)(m.layer1[0], m.layer1[0]).train(m.training)
    return [m(x), m(2 * x)], m


@check("layers taken away: `del model.fc`")
def _(m, x):
    m(x)
    del m.fc
    with torch.set_grad_enabled(m.training):
        return m.features(x), m


@check("a method of a network of its own: `stem`")
def _(m, x):
    m(x)
    m.stem = lambda i: m.bn1(m.conv1(i)).tanh()
    return m(x), m
