"""Power-of-two quantiser with a shared exponent a group (PAPER.md section 5, [R]).

For the elements of one group that are sent in this step, with M = max |r_i| over them [C]:

1. e = floor(log2 M).
2. |r_i| is rounded to the nearer of 2^floor(log2|r_i|) and 2^ceil(log2|r_i|), a tie to the
   larger [C]; what would exceed 2^e becomes 2^e.
3. d_i = e - log2(rounded). Codes 0 to 7 travel in three bits; d_i > 7 cannot be represented.

Everything is integer arithmetic on the parts that ``frexp`` yields, so it is exact, holds for
denormals, and gives the same bits on NumPy and CuPy. For every value that can be represented
the result is within a factor [2/3, 4/3] of it, but for those above 2^e, which are cut to it and
lose less than half.
"""

import numpy as np

MAX_CODE = 7

#: Exponent that stands in the table for a group that sends nothing.
NO_EXPONENT = np.int16(-32768)


def scatter_max(xp, out, ids, values):
    """``out[ids] = max(out[ids], values)`` with repeated ids; integers only, so order is free."""
    if hasattr(xp.maximum, 'at'):
        xp.maximum.at(out, ids, values)
    else:  # CuPy before 11
        import cupyx

        cupyx.scatter_max(out, ids, values)


def quantize(values, groups, n_groups, xp):
    """Quantise the selected elements of all groups at once.

    Args:
        values: Selected residuals, shape (n,), finite and non-zero.
        groups: Group of each, shape (n,), int64.
        n_groups: Number of groups.
        xp: numpy or cupy.

    Returns:
        ``(exponents, d)``: exponents int16 of shape (n_groups,), `NO_EXPONENT` where a group has
        no element; d int32 of shape (n,), to be sent where ``d <= MAX_CODE``.
    """
    mantissa, exponent = xp.frexp(values)  # |value| = |mantissa| * 2^exponent, mantissa >= 1/2
    floor = exponent.astype(np.int32) - 1
    table = xp.full(n_groups, int(NO_EXPONENT), np.int32)
    scatter_max(xp, table, groups, floor)
    rounded = floor + (xp.abs(mantissa) >= 0.75)  # 3/2 of the lower power: half way
    top = table[groups]
    d = top - xp.minimum(rounded, top)
    return table.astype(np.int16), d.astype(np.int32)


def dequantize(negative, codes, exponents, groups, dtype, xp):
    """Values of quantised elements: ``(-1)^negative * 2^(exponent of the group - code)``.

    Args:
        negative: bool, shape (n,). codes: int32, shape (n,). exponents: int16, a group each.
        groups: int64, shape (n,). dtype: of the result.
    """
    # Eight powers a group, looked up: an ldexp an element would cost more than all the rest.
    powers = exponents.astype(np.int32)[:, None] - xp.arange(MAX_CODE + 1, dtype=np.int32)
    values = xp.ldexp(xp.ones((), dtype), powers)[groups, codes]
    return xp.where(negative, -values, values)
