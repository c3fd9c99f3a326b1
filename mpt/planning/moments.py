"""How far from its average a moment of Adam's may stay when it is kept in bf16. Pure; called where the plan chooses the
format of the optimizer's state.

A step moves a moment by the share 1 - beta of its distance to the new value. bf16 has 8 significant bits, so that a
move of less than half a unit in the last place, which is up to 2^-8 of the moment, rounds to none: the moment stops
short, on its way down and on its way up. At beta 0.999 it never moves; at 0.99 a second moment stays up to 64 % too
high for good. No rounding of the weights repairs that: every step is divided by the root of the second moment.
"""

HALF_A_UNIT = 2.0**-8  # of a bf16, at most: half of 2^-7, the distance of the floats just above a power of two
MAX_ERROR = 0.1  # of a moment. Under the root of the second moment that is 5 % of a step; met up to beta 0.957.


def moment_error(beta: float) -> float:
    """Bound the share of a constant by which a bf16 average of it may stay off, coming from far above; inf: it stops
    anywhere.

    It stops at a moment m of a constant c where (1 - beta) * (m - c) is HALF_A_UNIT * m. Coming from below it stays
    nearer. Raises ValueError for a beta outside [0, 1).

    >>> [round(moment_error(beta), 3) for beta in (0.9, 0.95, 0.98, 0.99, 0.999)]
    [0.041, 0.085, 0.243, 0.641, inf]
    """
    if not 0 <= beta < 1:
        raise ValueError(f"a beta of Adam's is {beta}, and must be in [0, 1)")
    share = HALF_A_UNIT / (1 - beta)
    return share / (1 - share) if share < 1 else float("inf")


def moments_fit_bf16(beta1: float, beta2: float) -> bool:
    """Say whether both moments follow the gradients to MAX_ERROR in bf16.

    >>> moments_fit_bf16(0.9, 0.95), moments_fit_bf16(0.9, 0.99), moments_fit_bf16(0.99, 0.95)
    (True, False, False)
    """
    return max(moment_error(beta1), moment_error(beta2)) <= MAX_ERROR
