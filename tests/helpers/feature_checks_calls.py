"""Checks of the rows of docs/features.md about calls: images and gradients. See feature_support.py."""

import torch
from helpers.feature_support import SIZE, block, check, fresh
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

CPU = "cpu"


# Numbers and images


@check("float64")
def _(m, x):
    return m.double()(x.double()), m


# Gradients of bfloat16 differ by the ReLUs whose sign rounding turns; test_training.py has the error rule.
@check("bfloat16 weights", tolerance=0.3)
def _(m, x):
    return m.bfloat16()(x.bfloat16()), m


@check("float16 on CPUs", tolerance=0.02)
def _(m, x):
    return m.half()(x.half()), m


@check("bfloat16 convolutions with float32 batch norms", tolerance=0.3, networks=block)
def _(m, x):
    for part in m.modules():
        if isinstance(part, nn.Conv2d):
            part.bfloat16()
    return m(x.bfloat16()), m


@check("integer or complex images", error="expected scalar type")
def _(m, x):
    return m(x.int())


@check("an input of another dtype than the weights", error="expected scalar type Double but found Float")
def _(m, x):
    return m(x.double())


@check("`torch.autocast` to bfloat16", tolerance=0.3)
def _(m, x):
    with torch.autocast(CPU, torch.bfloat16):
        return m(x)


@check("`torch.autocast` to float16 on CPUs", tolerance=0.02)
def _(m, x):
    with torch.autocast(CPU, torch.float16):
        return m(x)


@check("`torch.amp.GradScaler`")
def _(m, x):
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    scaler = torch.amp.GradScaler(CPU, init_scale=2.0)
    scaler.scale(m(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    m.zero_grad()
    return m(x)


@check("`channels_last` images and weights")
def _(m, x):
    return m.to(memory_format=torch.channels_last).features(x.contiguous(memory_format=torch.channels_last))


@check("strided, sliced and expanded images")
def _(m, x):
    wide = torch.randn(3, 3, SIZE + 2, 2 * SIZE)
    return [m(wide[:2, :, 1:-1, ::2]), m(x[:1].expand(3, -1, -1, -1)), m(x.transpose(2, 3))]


@check("images of another size")
def _(m, x):
    return [m(torch.randn(1, 3, 13, 10)), m(torch.randn(3, 3, 7, 9))]


@check("NaN and infinite pixels")
def _(m, x):
    x[0, 1, 2, 2], x[1, 0, 7, 7] = torch.nan, torch.inf
    y = m.features(x)
    return torch.stack([y.isnan(), y.isinf()]).double(), nn.Identity()


@check("an empty batch")
def _(m, x):
    return m.features(x[:0])


@check("an image without a batch", error="expected 4D input")
def _(m, x):
    return m(x[0])


@check("one value per channel", error="Expected more than 1 value per channel")
def _(m, x):
    return m(x[:1, :, :1, :1])


@check("an image of other channels", error="expected input.*to have 3 channels, but got 2")
def _(m, x):
    return m(x[:, :2])


@check("sparse images", error="spars|Spars")
def _(m, x):
    return m(x.to_sparse())


class Marked(torch.Tensor):
    pass


@check("subclasses of `Tensor` as images")
def _(m, x):
    return m(x.as_subclass(Marked)).as_subclass(torch.Tensor), m


@check("subclasses of `Tensor` as weights", gradients=False)
def _(m, x):
    for part in m.modules():
        if isinstance(part, nn.Conv2d):
            part.weight = nn.Parameter(part.weight.detach().as_subclass(Marked))
    return m(x).as_subclass(torch.Tensor), m


@check("meta tensors", gradients=False)
def _(m, x):
    y = m.to("meta")(x.to("meta"))
    return torch.tensor([*y.shape, *m.features(x.to("meta")).stride()])


@check("`view` of results: memory formats")
def _(m, x):
    return [m.features(i).view(-1) for i in (x, x[:1])]


# Gradients


@check("`torch.no_grad`", gradients=False)
def _(m, x):
    with torch.no_grad():
        return m(x)


@check("`torch.inference_mode`", gradients=False)
def _(m, x):
    with torch.inference_mode():
        y = m(x) + fresh(m)(x)  # of weights made in it
    return y.clone()


@check("gradients of images and weights")
def _(m, x):
    x.requires_grad_()
    wanted = [x, *m.parameters()]
    return torch.autograd.grad(m(x).square().sum(), wanted), m


@check("frozen weights")
def _(m, x):
    m.layer1.requires_grad_(False)
    m.conv1.requires_grad_(False)
    return m(x), m


@check("accumulated gradients, `retain_graph`")
def _(m, x):
    loss = m(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return [p.grad.clone() for p in m.parameters()], m


@check("double backward, `create_graph=True`", gradients=False)
def _(m, x):
    x.requires_grad_()
    (grad,) = torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), [x, *m.parameters()]), m


@check("`is_grads_batched`", gradients=False)
def _(m, x):
    y = m(x.requires_grad_())
    return torch.autograd.grad(y, x, torch.stack([torch.ones_like(y), y.detach()]), is_grads_batched=True), m


@check("`torch.autograd.functional`", gradients=False)
def _(m, x):
    return torch.autograd.functional.jvp(m, x, torch.ones_like(x))[1]


@check("forward-mode AD", gradients=False)
def _(m, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def without_statistics(m):
    """``torch.func`` refuses to change captured statistics."""
    for part in m.modules() if m.training else ():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = part.running_var = part.num_batches_tracked = None
    return m


@check("`torch.func`: grad, vjp, jvp, jacrev", gradients=False)
def _(m, x):
    m = without_statistics(m)
    first = torch.func.grad(lambda i: m(i).square().sum())(x)
    return [first, torch.func.jvp(m, (x,), (x,))[1], torch.func.jacrev(lambda i: m(i).sum(0))(x)], m


@check("`torch.vmap`", gradients=False)
def _(m, x):
    return torch.vmap(without_statistics(m))(torch.stack([x, 2 * x])), m


@check("`torch.func.functional_call`", gradients=False)
def _(m, x):
    given = {name: p.detach() * 1.1 for name, p in m.named_parameters()}
    return torch.func.functional_call(m, given, x), m


@check("activation checkpointing")
def _(m, x):
    y = checkpoint(m.stem, x, use_reentrant=False)
    return m.fc(m.flat(checkpoint(lambda y: m.layer3(m.layer2(m.layer1(y))), y, use_reentrant=False)))


@check("saved-tensor hooks, `save_on_cpu`")
def _(m, x):
    with saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t), save_on_cpu():
        return m(x)


def triple(p):
    p.grad.mul_(3)


@check("hooks of tensors and of gradients")
def _(m, x):
    m.conv1.weight.register_hook(lambda g: 2 * g)
    m.layer1[0].conv1.weight.register_post_accumulate_grad_hook(triple)
    y = m.features(x)
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return y


@check("changes in place of what a backward pass needs", gradients=False, error="modified by an inplace operation")
def _(m, x):
    y = m(x.requires_grad_())
    with torch.no_grad():
        m.layer2[0].conv1.weight.mul_(2)
    return torch.autograd.grad(y.sum(), x)


@check("`detect_anomaly`, deterministic algorithms")
def _(m, x):
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            y = m(x)
            if y.requires_grad:
                torch.autograd.grad(y.sum(), m.fc.weight, retain_graph=True)
            return y
    finally:
        torch.use_deterministic_algorithms(False)
