"""``[relu](batch_norm(conv2d(x)) [+ residual])`` with fixed statistics on PyTorch's own operators: the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .arguments import DTYPES, MOST_TAPS, is_autocast

__all__ = ["channel", "taps_reason", "unfused_conv", "unfused_reason"]


def unfused_reason(op: str, x: Tensor) -> str | None:
    """Why the kernel cannot run, or None. Autocast is left to the operator."""
    kind = backends.kind(x)
    reason = backends.unfused_reason(op, kind)
    # The CUDA kernel of add_relu takes float64, too; on meta any dtype will do.
    if reason is None and x.dtype not in DTYPES.get(kind, (x.dtype,)) and (op, kind) != ("add_relu", "cuda"):
        return f"no kernel for {x.dtype}"
    if reason is None and not torch.compiler.is_compiling():
        return backends.transform_reason()
    return reason


def taps_reason(weight: Tensor) -> str | None:
    """Why no kernel takes a filter of this size, or None."""
    *_, rows, columns = weight.shape
    return f"a filter of {rows} x {columns}, more than {MOST_TAPS} taps" if rows * columns > MOST_TAPS else None


BatchNorm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]


def unfused_conv(
    op: str,
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNorm,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """``[relu](batch_norm(conv2d(x)) [+ residual])``; ``inputs``: x, and the residual if there is one."""
    # Kernels take vectors of another dtype than the images; F.conv2d does not.
    bias = bias if bias is None or is_autocast(weight) else bias.to(weight.dtype)
    y = F.conv2d(inputs[0], weight, bias, stride, padding, dilation, groups)
    bn_weight, bn_bias, running_mean, running_var = _batch_norm_vectors(y, bn[:4])
    eps = bn[4]
    if running_mean is not None and not _differentiates(running_mean, running_var):
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training=False, eps=eps)
    elif running_mean is not None and running_var is not None:
        # F.batch_norm has no derivatives with respect to the statistics; these operators do.
        scale = torch.rsqrt(running_var + eps)
        scale = scale if bn_weight is None else scale * bn_weight
        wide = (y - channel(running_mean)) * channel(scale)
        y = (wide if bn_bias is None else wide + channel(bn_bias)).to(y.dtype)
    if len(inputs) > 1:
        y = y + inputs[1]
    return y if op == "conv_bn" else F.relu(y)


def _differentiates(*statistics: Tensor | None) -> bool:
    """Whether derivatives with respect to the statistics may be asked for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in statistics):
        return True
    return not torch.compiler.is_compiling() and backends.transform_reason() is not None


def _batch_norm_vectors(y: Tensor, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The vectors as F.batch_norm takes them: in the dtype of ``y``, or all in float32 beside a 16-bit ``y``.

    Contiguous: PyTorch's channels_last gradient reads them so.
    """
    narrow = y.dtype in (torch.bfloat16, torch.float16)
    if narrow and all(t is None or t.dtype == y.dtype for t in vectors):
        return [t if t is None else t.contiguous() for t in vectors]
    dtype = torch.float32 if narrow else y.dtype
    return [t if t is None else t.to(dtype).contiguous() for t in vectors]


def channel(t: Tensor) -> Tensor:
    """A vector of one value a channel, shaped to broadcast over images."""
    return t[None, :, None, None]
