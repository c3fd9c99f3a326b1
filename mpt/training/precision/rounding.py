"""Rounding fp32 to bf16 at random, so that the mean of many roundings is the value itself.

Rounding to nearest loses every weight update below half a unit in the last place of the weight (Zamirai et al. 2020,
arXiv:2010.06192). Rounding up with the probability of the part that is cut off keeps it on average. These are functions
of tensors and random bits alone: where the bits come from is `stream_seed`'s business, never the global generator's.
Imports nothing but torch, so that the file can be copied as it is.
"""

import hashlib

import torch

BF16_MAX = torch.finfo(torch.bfloat16).max
LOW_BITS = 16  # what bf16 cuts off fp32's mantissa; sign and exponent are the same


def round_stochastically(values: torch.Tensor, random_bits: torch.Tensor) -> torch.Tensor:
    """Round fp32 `values` to one of their two bf16 neighbours, to the farther from zero with the probability of the
    fraction cut off.

    `random_bits` is int32, of the same shape, uniform over [0, 2**16). Adding them to the bit pattern carries into the
    upper half exactly that often, for both signs and for subnormals, because neighbouring floats of one sign have
    neighbouring patterns. What bf16 can hold stays as it is, inf and nan too. A value beyond the largest finite bf16
    becomes that: noise alone must not make an infinity.

    >>> quarter = torch.full((4,), 1.0 + 2**-7 / 4)  # a quarter of the way from 1 to the next bf16
    >>> round_stochastically(quarter, torch.tensor([0, 49151, 49152, 65535], dtype=torch.int32)).tolist()
    [1.0, 1.0, 1.0078125, 1.0078125]
    """
    pattern = values.contiguous().view(torch.int32) + random_bits
    kept = pattern.bitwise_and_(-(1 << LOW_BITS)).view(torch.float32).clamp_(-BF16_MAX, BF16_MAX)
    # Of a nan's pattern the sum may be anything; and clamp_ takes infinities away. (isfinite is slower on a CPU.)
    return torch.where(values.abs() < torch.inf, kept, values).to(torch.bfloat16)


def draw_bits(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Draw the random bits that `round_stochastically` takes, on the generator's device."""
    return torch.randint(0, 1 << LOW_BITS, shape, dtype=torch.int32, device=generator.device, generator=generator)


def stream_seed(seed: int, shard: int, step: int, index: int) -> int:
    """Derive the seed of one tensor's random bits at one step, from what a resumed run knows again.

    Hashed, because torch's generator on a CPU looks at the seed's low 32 bits alone (ATen/core/MT19937RNGEngine.h), and
    neighbouring seeds must not give related streams.

    >>> stream_seed(0, 0, 1, 0) == stream_seed(0, 0, 1, 0)
    True
    >>> len({stream_seed(0, shard, step, index) for shard in range(2) for step in range(9) for index in range(9)})
    162
    """
    text = f"{seed} {shard} {step} {index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
