"""Operands of tensor cores in TF32, rounded to nearest, as cuDNN's kernels round them.

Tensor cores truncate float32 towards zero. Products of positive numbers then come out 2^-11 too small, and so does each
layer's output; a network of 32 layers errs by percents. Errors of rounding to nearest average out.
"""

import triton
import triton.language as tl


@triton.jit
def to_operand(a, PRECISION: tl.constexpr):
    """``a`` as it enters a GEMM of this precision: "tf32" rounds float32 to 10 bits, halves away from zero."""
    if PRECISION == "tf32":
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [a], dtype=tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)
    else:
        return a
