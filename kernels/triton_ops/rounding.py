"""Operands of products in TF32, rounded: the units cut the bits off that they do not take.

What is cut is always towards zero: products of positive numbers come out 2^-11 too small, each layer's output is, and a
network of 32 layers errs by percents. Rounded to nearest the errors average out, as in cuDNN's kernels.
"""

import triton
import triton.language as tl


@triton.jit
def to_operand(a, PRECISION: tl.constexpr):
    """``a`` as it enters a product of this precision: "tf32" rounds float32 to 10 bits, halves away from zero."""
    if PRECISION == "tf32":
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [a], dtype=tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)
    else:
        return a
