"""Full float32 products on tensor cores: three TF32 products, split by hand."""

import triton
import triton.language as tl

ROUND = tl.constexpr(1 << 12)
KEPT = tl.constexpr(~((1 << 13) - 1))  # sign, exponent and 10 bits of mantissa


@triton.jit
def high_part(x):
    """x rounded to TF32. The rest x - high_part(x) is exact, and at most 2^-11 of x."""
    bits = x.to(tl.int32, bitcast=True) + ROUND
    return (bits & KEPT).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr, A_FITS: tl.constexpr, B_FITS: tl.constexpr):
    """``sums + a @ b``, [M, K] and [K, N] in float32.

    "tf32x3" is done here and not by tl.dot. tl.dot keeps a second accumulator and sets NaN in it to 0 after each product: a
    third of all instructions, for numbers that the guard throws away (a gradient that is not finite is never applied).

    Args:
        A_FITS, B_FITS: whether the operand was bfloat16 or float16 and so fits into TF32 (float16 numbers have at most 10 bits
            of mantissa, subnormal ones fewer). Each operand that fits saves one product.
    """
    if PRECISION == "tf32x3":
        a_high = a if A_FITS else high_part(a)
        b_high = b if B_FITS else high_part(b)
        if not A_FITS:
            sums = tl.dot(a - a_high, b_high, sums, input_precision="tf32")
        if not B_FITS:
            sums = tl.dot(a_high, b - b_high, sums, input_precision="tf32")
        return tl.dot(a_high, b_high, sums, input_precision="tf32")
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)
