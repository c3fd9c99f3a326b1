"""Whether Adam's second moment can decay when it is kept in bf16. Pure; called where the optimizer's state is planned.

A step with a zero gradient multiplies the second moment v by beta2. bf16 has 8 significant bits, and a product that is
nearer to v than to the bf16 below it rounds back to v: from then on v never falls, and the steps of every weight that
once saw a large gradient stay small. No rounding of the weights repairs that.
"""

SIGNIFICANDS = range(128, 256)  # of bf16, as integers: 8 bits of which the first is 1


def second_moment_decays(beta2: float) -> bool:
    """Say whether beta2 * v, rounded to the nearest bf16, differs from v for every normal v.

    True up to 257/258 = 0.9961 and False above. The first to stick is the significand 129 (just above a power of two,
    where a unit in the last place is the largest share of the value): half a unit is 1/258 of it, and a tie goes to the
    even 128. 128 itself falls more easily, for the floats below it are twice as dense. At 0.999 all 128 stick. (Where
    the product is first rounded to fp32, as optimizers do, the threshold lies less than 1e-7 higher.) Raises ValueError
    for a beta2 outside [0, 1).

    >>> second_moment_decays(0.95), second_moment_decays(0.995), second_moment_decays(0.999)
    (True, True, False)
    """
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2 is {beta2}, and must be in [0, 1)")
    return all(_round_near(beta2 * significand) != significand for significand in SIGNIFICANDS)


def _round_near(product: float) -> float:
    """Round half to even among the floats of 8 significant bits around [128, 256); below 128 they lie 1/2 apart.

    Smaller products are far from every significand whatever they round to.
    """
    return float(round(product)) if product >= 128 else round(2 * product) / 2
