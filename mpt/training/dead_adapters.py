"""Adapters that get no gradient: seen after the first backward pass, before anything is updated.

Reentrant checkpointing over frozen weights leaves them without one (huggingface/peft#1142), a module that is cut off
the graph does, and a first step without a label to learn. The loss then falls a little all the same, by the other
layers, or rests. Called by the audit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mpt.errors import UnsupportedError
from mpt.terms import Method
from mpt.training.adapters import adapted_layers

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer

NAMED = 5
UNREACHED = "the backward pass never came there: something before it cuts the graph"
ZERO = "their gradients are exactly 0: what they put out changes no loss"
NOTHING = "every gradient is exactly 0 and so is the loss: no token of the first step has a label to learn"


def dead_adapters(trainer: "PlanTrainer") -> tuple[list[str], str]:
    """Name the layers neither of whose adapter matrices has a gradient, and say why. Every rank takes part.

    A fresh adapter has B = 0, so that A gets no gradient in the first step; B does. Experts of a mixture to which no
    token was sent are no dead ones.
    """
    layers = {name: layer for name, layer in adapted_layers(trainer.model).items() if "expert" not in name}
    weights = {
        name: [weight for part in ("lora_B", "lora_A") for weight in getattr(layer, part).parameters()]
        for name, layer in layers.items()
    }
    sizes = _sizes([weight for pair in weights.values() for weight in pair], by_deepspeed=trainer.is_deepspeed_enabled)
    seen = {name: [sizes[id(weight)] for weight in pair] for name, pair in weights.items()}
    dead = [name for name, pair in seen.items() if not any(size is not None and size != 0 for size in pair)]
    if not dead and all(not pair[0] for pair in seen.values()):
        dead = list(seen)  # no B moves: whatever A does is multiplied by what it was
    plain = [name.removeprefix("base_model.model.") for name in dead]
    if any(size is None for name in dead for size in seen[name]):
        return plain, UNREACHED
    loss = trainer.watch.step.loss if trainer.watch.step is not None else None
    return plain, NOTHING if len(dead) == len(seen) and loss == 0 else ZERO


def dead_error(dead: list[str], layers: int, cause: str) -> UnsupportedError:
    """Make the error that ends the run."""
    listed = ", ".join(dead[:NAMED]) + (f" and {len(dead) - NAMED} more" if len(dead) > NAMED else "")
    remedy = (
        "Look at the labels: `mpt check` counts the rows that teach nothing."
        if cause == NOTHING
        else "Leave use_reentrant and your own hooks out, or leave these layers out by lora.exclude_modules."
    )
    return UnsupportedError(f"{len(dead)} of {layers} adapters get no gradient, {listed}: {cause}", remedy=remedy)


@contextmanager
def unreached_adapters(trainer: "PlanTrainer") -> Iterator[None]:
    """Turn torch's word for a loss that hangs on no trained weight at all into that error."""
    try:
        yield
    except RuntimeError as error:
        has_adapters = trainer.plan.value("method") != Method.FULL
        if not has_adapters or "does not require grad and does not have a grad_fn" not in str(error):
            raise
        layers = [name.removeprefix("base_model.model.") for name in adapted_layers(trainer.model)]
        raise dead_error(layers, len(layers), UNREACHED) from error


def _sizes(weights: list[Any], *, by_deepspeed: bool) -> dict[int, float | None]:
    """Give the largest number of each gradient, NaN where one is not finite, None without a gradient; one look at the
    device."""
    gradients: dict[int, torch.Tensor] = {}
    for weight in weights:
        gradient = weight.grad
        if by_deepspeed:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(weight)
        if gradient is not None:
            gradients[id(weight)] = gradient
    sizes: dict[int, float | None] = {id(weight): None for weight in weights}
    if gradients:
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()), torch.inf)])
        sizes |= dict(zip(gradients, norms.tolist(), strict=True))
    return sizes
