"""AdamW for bf16 weights without fp32 copies beside them, where small updates would vanish in the rounding.

Which formats and which rounding is decided in the plan. The arithmetic is torch's own AdamW in fp32; the parts made
here are what a bf16 weight needs around it: how the result is rounded back (to nearest, stochastically, or to nearest
with Kahan's compensation, Zamirai et al. 2020, arXiv:2010.06192), in which format the moments lie, and where the random
bits come from.

Why not torchao's `_AdamW(bf16_stochastic_round=True)` (0.18.0, read and run): it draws from the global generator, so
that replicas whose random states differ drift apart without a word; it keeps the moments in the format of the weights,
where a second moment with beta2 0.999 never moves; and it compiles its step.
Imports torch and `rounding` alone, so that both files can be copied as they are.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.optim.adamw import adamw

from mpt.training.precision.rounding import draw_bits, round_stochastically, stream_seed

ROUNDINGS = ("nearest", "stochastic", "kahan")
STATE_DTYPES = (torch.float32, torch.bfloat16)
WEIGHT_DTYPES = (torch.bfloat16, torch.float32)
# Weights updated at a time. Temporary fp32 copies are 64 MiB each on a device; on a CPU they stay in its cache, and the
# allocator keeps them (16 M weights on one core, November 2026: 1.2 ns a weight; 5.5 in one piece).
PART = 2**24
PART_ON_CPU = 2**17


class PureBf16AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2, decoupled decay) for bf16 weights; fp32 ones among them are
    updated as torch's AdamW would, with fp32 moments.

    `rounding`: how an updated bf16 weight is rounded. nearest; stochastic; or kahan, which keeps what nearest cut off
    in a second bf16 number and adds it to the next update (together about 16 significant bits).
    `state_dtype`: the format of both moments of bf16 weights.
    `master_weights`: the state holds an fp32 copy which is updated, and the weight is its rounding to nearest.
    `seed`: of stochastic rounding. `shard`: the rank where ranks hold different weights (ZeRO), 0 where they hold
    replicas: those must round alike, and different weights should not.

    The random bits follow from (seed, shard, step, the order in which the optimizer first saw the weight) alone. They
    neither read nor move torch's random state, and a state_dict resumes bit for bit.

    Raises ValueError for an option that is none of these, and TypeError for weights of another format.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: str = "nearest",
        state_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        seed: int = 0,
        shard: int = 0,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr {lr}, eps {eps}, weight_decay {weight_decay} must be >= 0, betas {betas} in [0, 1)")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {rounding!r}, and must be one of {', '.join(ROUNDINGS)}")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype is {state_dtype}, and must be torch.float32 or torch.bfloat16")
        if master_weights and rounding != "nearest":
            raise ValueError(f"rounding is {rounding!r}, and fp32 master weights lose nothing that it could keep")
        self.rounding = rounding
        self.state_dtype = state_dtype
        self.master_weights = master_weights
        self.seed = seed
        self.shard = shard
        self._generators: dict[torch.device, torch.Generator] = {}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does."""
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            if weight.dtype not in WEIGHT_DTYPES:
                raise TypeError(f"a weight of shape {tuple(weight.shape)} is {weight.dtype}, neither bf16 nor fp32")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient (bf16 or fp32, never sparse)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state as it was saved.

        torch's own would cast each tensor to the format of its weight: fp32 moments and master weights to bf16
        (torch/optim/optimizer.py, `_process_value_according_to_param_policy`). Raises ValueError where the state was
        made with other options.
        """
        super().load_state_dict(state_dict | {"state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, weight in zip(numbers, weights, strict=True):
            if number in state_dict["state"]:
                self.state[weight] = self._restored(weight, state_dict["state"][number])

    def _restored(self, weight: torch.Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        formats = self._formats(weight)
        found = {key: value.dtype for key, value in saved.items() if key not in ("step", "index")}
        if found != formats:
            raise ValueError(f"the saved optimizer state is {found}, and this optimizer's is {formats}")
        tensors = {key: saved[key].to(weight.device) for key in formats}
        return {"step": int(saved["step"]), "index": int(saved["index"])} | tensors

    def _formats(self, weight: torch.Tensor) -> dict[str, torch.dtype]:
        """Say which tensors a weight's state holds; each has the weight's shape."""
        if weight.dtype == torch.float32:
            return {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        formats = {"exp_avg": self.state_dtype, "exp_avg_sq": self.state_dtype}
        if self.master_weights:
            formats["master"] = torch.float32
        if self.rounding == "kahan":
            formats["compensation"] = torch.bfloat16
        return formats

    def _state_of(self, weight: torch.Tensor) -> dict[str, Any]:
        # Made at the first step: DeepSpeed puts its partitions in the place of the weights before it. And it lends the
        # groups one partition at a time, so a place among them says nothing; the order of first sight does.
        state: dict[str, Any] = self.state[weight]
        if not state:
            state |= {"step": 0, "index": len(self.state) - 1}
            for key, dtype in self._formats(weight).items():
                state[key] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            if "master" in state:
                state["master"].copy_(weight)
        return state

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(weight)
        state["step"] += 1
        rounds = self.rounding == "stochastic" and weight.dtype == torch.bfloat16
        generator = self._generator(weight.device, state) if rounds else None
        flat = weight.reshape(-1)  # a copy where the weight is not contiguous
        tensors = {"weight": flat, "grad": weight.grad.reshape(-1)}  # type: ignore[union-attr]
        tensors |= {key: state[key].view(-1) for key in self._formats(weight)}
        for part in _parts(tensors):
            exact = self._exact(part)
            _adamw(exact, part, group, state["step"])
            self._round_back(exact, part, generator)
        if flat.data_ptr() != weight.data_ptr():
            weight.copy_(flat.view_as(weight))

    def _generator(self, device: torch.device, state: dict[str, Any]) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(stream_seed(self.seed, self.shard, state["step"], state["index"]))

    def _exact(self, part: dict[str, torch.Tensor]) -> torch.Tensor:
        """Give the fp32 weights that are updated: themselves, their master copy, or a copy for this step."""
        if "master" in part:
            return part["master"]
        exact = part["weight"].float()
        return exact.add_(part["compensation"]) if "compensation" in part else exact

    def _round_back(
        self, exact: torch.Tensor, part: dict[str, torch.Tensor], generator: torch.Generator | None
    ) -> None:
        weight = part["weight"]
        if weight is exact:  # fp32
            return
        if generator is not None:
            weight.copy_(round_stochastically(exact, draw_bits(exact.shape, generator)))
            return
        weight.copy_(exact)
        if "compensation" in part:
            part["compensation"].copy_(exact.sub_(weight))


def _adamw(exact: torch.Tensor, part: dict[str, torch.Tensor], group: dict[str, Any], step: int) -> None:
    """Update fp32 weights in place by torch's AdamW, and the moments, which are rounded to nearest where bf16."""
    moments = [part[key].float() for key in ("exp_avg", "exp_avg_sq")]
    adamw(
        [exact],
        [part["grad"].float()],
        [moments[0]],
        [moments[1]],
        [],
        [torch.full((), float(step - 1), device=exact.device)],  # torch adds 1
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
    for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        if part[key] is not moment:
            part[key].copy_(moment)


def _parts(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Cut flat tensors of one length into parts, so that a large ZeRO partition needs no fp32 copy of the whole."""
    size = PART_ON_CPU if tensors["weight"].device.type == "cpu" else PART
    for pieces in zip(*(tensor.split(size) for tensor in tensors.values()), strict=True):
        yield dict(zip(tensors, pieces, strict=True))
