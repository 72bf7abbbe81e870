"""Convolutions that no kernel runs, with groups or dilation: what the operators promise holds for them, too."""

import pytest
import torch

from resnet_fast import ops

UNFUSED = ({"groups": 2}, {"dilation": 2})


def tensors(device="cpu", **kwargs):
    """x, weight, bias, bn_weight, bn_bias, running_mean, running_var."""
    torch.manual_seed(0)
    vectors = [torch.rand(8, dtype=torch.float64) + 0.5 for _ in range(5)]
    x, weight = torch.randn(2, 8, 7, 6), torch.randn(8, 8 // kwargs.get("groups", 1), 3, 3)
    return [t.double().to(device) for t in (x, weight, *vectors)]


@pytest.mark.parametrize("kwargs", UNFUSED, ids=str)
def test_meta_tensors_give_shapes(kwargs):
    """Autocast knows nothing of their device."""
    real, shape = (ops.conv_bn_relu(*tensors(device, **kwargs), **kwargs) for device in ("cpu", "meta"))
    assert (shape.shape, shape.dtype, shape.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize("kwargs", UNFUSED, ids=str)
def test_gradients_of_everything(kwargs):
    """Of the statistics, too, of which F.batch_norm has none."""
    leaves = [t.requires_grad_() for t in tensors(**kwargs)]
    assert torch.autograd.gradcheck(lambda *given: ops.conv_bn(*given, **kwargs), leaves)


@pytest.mark.parametrize("kwargs", UNFUSED, ids=str)
@pytest.mark.parametrize("which", ["bn_weight", "bn_bias", "running_mean", "running_var"])
def test_gradients_with_strided_vectors(which, kwargs):
    """PyTorch's own read a strided vector as if it were contiguous where channels come last."""
    i = ["bn_weight", "bn_bias", "running_mean", "running_var"].index(which) + 3
    given, strided = tensors(**kwargs), tensors(**kwargs)
    strided[i] = torch.stack([strided[i], torch.full((8,), torch.nan)], 1)[:, 0]
    results = []
    for call in (given, strided):
        call[0] = call[0].contiguous(memory_format=torch.channels_last)
        leaves = [t.requires_grad_() for t in call[:5]]
        y = ops.conv_bn(*call, **kwargs)
        grad = torch.ones_like(y).contiguous(memory_format=torch.channels_last)
        results.append(torch.autograd.grad(y, leaves, grad))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected)
