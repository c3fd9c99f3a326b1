"""Which learning rates people report for AdamW, by method and size. Pure.

From scratch: Kaplan et al. 2020 (arXiv:2001.08361, appendix D.6), 0.003239 - 0.0001395 ln(N), up to 125 million
parameters, where it meets GPT-3's table 2.1 (Brown et al. 2020, arXiv:2005.14165), which goes on to 175 billion.
Every weight of a checkpoint: 2e-5 to 5e-5 (BERT: Devlin et al. 2019, appendix A.3), 2e-5 (Llama 2's chat models:
Touvron et al. 2023, section 3.1), 5e-6 at 8 billion and 2e-6 at 70 (Tulu 3: Lambert et al. 2024, arXiv:2411.15124,
its supervised fine-tuning). Continued pretraining goes back up to the rate of the pretraining (Ibrahim et al. 2024,
arXiv:2403.08763).
Adapters: 2e-4, and 1e-4 from 33 billion on (Dettmers et al. 2023, table 9); about ten times the rate of full
fine-tuning at any size (Schulman et al. 2025, "LoRA Without Regret").
Lion: 3 to 10 times lower than AdamW (Chen et al. 2023, arXiv:2302.06675, section 5).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from mpt.terms import Method, Task

GPT3 = (
    (125e6, 6.0e-4), (350e6, 3.0e-4), (760e6, 2.5e-4), (1.3e9, 2.0e-4),
    (2.7e9, 1.6e-4), (6.7e9, 1.2e-4), (13e9, 1.0e-4), (175e9, 0.6e-4),
)  # fmt: skip
FAR = 3.0
"""Beyond the range by this factor is far off: seeds, batch sizes and schedules explain less."""
LION = 5.0


@dataclass(frozen=True, slots=True)
class UsualRates:
    """The range that is reported, the rate to begin with, and who reports it."""

    low: float
    high: float
    first: float
    source: str

    def is_far(self, rate: float) -> bool:
        return not self.low / FAR <= rate <= self.high * FAR


def usual_rates(
    method: Method, task: Task, parameters: int, optimizer: str, *, is_from_scratch: bool
) -> UsualRates | None:
    """Give the usual rates; None for an optimizer that has others, such as sgd."""
    if optimizer.removeprefix("paged_").startswith("lion"):
        divisor, more = LION, "; lion: a fifth of AdamW's (Chen et al. 2023)"
    elif optimizer.removeprefix("paged_").startswith(("adam", "ademamix")):
        divisor, more = 1.0, ""
    else:
        return None
    low, high, first, source = _of_adamw(method, task, parameters, is_from_scratch=is_from_scratch)
    return UsualRates(low / divisor, high / divisor, first / divisor, source + more)


def _of_adamw(method: Method, task: Task, parameters: int, *, is_from_scratch: bool) -> tuple[float, float, float, str]:
    if is_from_scratch:
        rate = from_scratch(parameters)
        return rate / 3, rate * 3, rate, "GPT-3's table 2.1 (Brown et al. 2020) and Kaplan et al. 2020, D.6"
    if method is not Method.FULL:
        first = 1e-4 if parameters > 30e9 else 2e-4
        return 1e-4, 5e-4, first, "QLoRA's table 9 (Dettmers et al. 2023), LoRA Without Regret (Schulman et al. 2025)"
    if task in (Task.CAUSAL_LM, Task.MASKED_LM):
        source = "full fine-tuning (Touvron et al. 2023) up to the pretraining's own rate (Ibrahim et al. 2024)"
        return 5e-6, max(5e-5, from_scratch(parameters)), 2e-5, source
    if parameters < 1e9:
        return 5e-6, 1e-4, 2e-5, "BERT (Devlin et al. 2019, A.3)"
    low, first = (2e-6, 1e-5) if parameters > 30e9 else (5e-6, 2e-5)
    return low, 5e-5, first, "Llama 2 (Touvron et al. 2023), Tulu 3 (Lambert et al. 2024)"


def from_scratch(parameters: int) -> float:
    """Read the tables, between their rows in proportion.

    >>> [f"{from_scratch(int(size)):.1e}" for size in (2e6, 125e6, 1.3e9, 7e9, 1e12)]
    ['1.2e-03', '6.0e-04', '2.0e-04', '1.2e-04', '6.0e-05']
    """
    if parameters < GPT3[0][0]:
        return 0.003239 - 0.0001395 * math.log(max(parameters, 1))
    for (size, rate), (larger, lower) in pairwise(GPT3):
        if parameters <= larger:
            place = math.log(parameters / size) / math.log(larger / size)
            return float(rate * (lower / rate) ** place)
    return GPT3[-1][1]
