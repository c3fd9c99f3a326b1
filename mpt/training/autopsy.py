"""Find where bad numbers come from: compute the very batch again, with an eye on every module, and say which one left
the format first. Called when an attempt ends for its numbers, while the weights are still those from before the update.

Nothing here changes a weight. A batch that is finite the second time points to the machine, or to an operation that
does not repeat; one that is not points to the run. Where numbers went bad without ceasing to be finite (a loss that
rose, a model that learns no more), the largest weight and the largest output are what can be told.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mpt.training import findings
from mpt.training.precision.watching import DTYPE_NAMES
from mpt.training.random_state import RandomState, set_random_state
from mpt.training.verdict import Code

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer

EXCERPT = 200  # characters of a sample's text
# A weight this large has been thrown there: those of trained language models stay below 100 or so.
THROWN = 1e4


@dataclass(slots=True)
class Autopsy:
    """What the second computation showed. `module` None: none of them, the loss itself or nothing at all.

    `reproduced`: something is not finite again.

    `direction` is forward or backward; `largest_input` and `largest_output` are the largest finite magnitudes there,
    the output's in fp32 where it could be computed so. `limit` is the largest number of `format`.
    """

    reproduced: bool
    rank: int = 0
    micro_batch: int | None = None
    direction: str | None = None
    module: str | None = None
    kind: str | None = None
    largest_input: float | None = None
    largest_output: float | None = None
    largest_weight: float | None = None
    format: str | None = None
    limit: float | None = None
    cause: str = ""

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return asdict(self)


def examine(trainer: "PlanTrainer", batches: list[Any], items: Any, random_state: RandomState, code: str) -> Autopsy:
    """Compute a step's micro batches again on this rank, and stop at the first that is not finite.

    Every rank calls it with as many micro batches: under ZeRO-3 a forward pass gathers weights. Gradients are looked at
    where the engine leaves them to torch. `code` is the event that ended the attempt. Where memory runs out over it,
    the autopsy says so.
    """
    try:
        found = _examine(trainer, batches, items, random_state, code)
    except torch.OutOfMemoryError:
        found = Autopsy(False, cause="there was no memory left to look into it")
    trainer.model.zero_grad(set_to_none=True)
    found.rank = trainer.args.process_index
    found.cause = found.cause or explain(found)
    return found


def _examine(trainer: "PlanTrainer", batches: list[Any], items: Any, random_state: RandomState, code: str) -> Autopsy:
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    set_random_state(random_state, trainer.args.device)
    found: Autopsy | None = None
    widest = Autopsy(False)
    plain = findings.plain_model(trainer)
    for number, inputs in enumerate(batches):
        trainer.model.zero_grad(set_to_none=True)
        with (
            watching(findings.plain_model(trainer)) as witness,
            trainer.compute_loss_context_manager(),
            torch.no_grad(),
        ):
            loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
        if (witness.widest.largest_output or 0) > (widest.largest_output or 0):
            widest = witness.widest
            widest.micro_batch = number
        if found is None and witness.found is None and not trainer.is_deepspeed_enabled:
            witness = _backward(trainer, model, inputs, items)
        if found is None and (witness.found is not None or not math.isfinite(loss.item())):
            found = witness.found or Autopsy(True, kind=_kind(loss))
            found.micro_batch = number
    if found is not None:
        return found
    return Autopsy(False) if code in (Code.N2, Code.N3) else _with_weights(widest, plain)


def explain(found: Autopsy) -> str:
    """Say in words what an autopsy means.

    >>> explain(Autopsy(True, direction="forward", module="model.layers.3.mlp.down_proj", kind="inf",
    ...                 largest_output=7.1e4, format="fp16", limit=65504.0))
    'fp16 overflow in model.layers.3.mlp.down_proj: |x| reached 7.1e+04, fp16 ends at 65504; bf16 would hold it'
    """
    if not found.reproduced and found.module is not None:
        thrown = found.largest_weight is not None and found.largest_weight > THROWN
        blame = ": updates were too large (learning rate, warm-up, gradient clipping)" if thrown else ""
        return (
            f"every number is finite; the largest output is {found.largest_output:.1e} in {found.module}, the largest "
            f"weight {found.largest_weight:.1e}{blame}"
        )
    if not found.reproduced:
        return (
            "the same batch is finite when it is computed again: a fault of the machine, or of an operation that does "
            "not repeat"
        )
    if found.module is None:
        return f"every module's output is finite, and the loss made of them is {found.kind}"
    where = f"{'the gradient of ' if found.direction == 'backward' else ''}{found.module}"
    if found.largest_weight is not None and not math.isfinite(found.largest_weight):
        return f"a weight of {found.module} is not finite"
    if found.largest_weight is not None and found.largest_weight > THROWN:
        return (
            f"the weights of {found.module} reach {found.largest_weight:.1e}: updates were too large (learning rate, "
            "warm-up, gradient clipping)"
        )
    if found.format == "fp16":
        reached = "" if found.largest_output is None else f"|x| reached {found.largest_output:.1e}, "
        return f"fp16 overflow in {where}: {reached}fp16 ends at 65504; bf16 would hold it"
    made = f"from inputs up to {found.largest_input:.1e}" if found.largest_input is not None else "from its inputs"
    return f"{where} makes {found.kind} in {found.format} {made}"


class Witness:
    """Remembers the first module, in the order of computation, that gave something not finite."""

    def __init__(self) -> None:
        self.found: Autopsy | None = None
        self.widest = Autopsy(False)

    def after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Look at what a module gave in the forward pass."""
        if self.found is None:
            self._look("forward", name, module, inputs, output)
        if self.found is None and next(module.children(), None) is None:
            self._measure(name, inputs, output)

    def after_backward(self, name: str, module: nn.Module, to_inputs: Any, of_output: Any) -> None:
        """Look at the gradient that a module hands on."""
        if self.found is None:
            self._look("backward", name, module, of_output, to_inputs)

    def _measure(self, name: str, inputs: Any, output: Any) -> None:
        """Remember the module without parts that gave the largest number."""
        largest = max((_largest(value) for value in _floating(output)), default=0.0)
        if largest > (self.widest.largest_output or 0.0):
            into = max((_largest(value) for value in _floating(inputs)), default=None)
            self.widest = Autopsy(False, direction="forward", module=name, largest_input=into, largest_output=largest)

    def _look(self, direction: str, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        bad = next((value for value in _floating(output) if not _is_finite(value)), None)
        if bad is None:
            return
        weights = [weight for weight in module.parameters(recurse=False) if weight.numel()]
        self.found = Autopsy(
            True,
            direction=direction,
            module=name,
            kind=_kind(bad),
            largest_input=max((_largest(value) for value in _floating(inputs)), default=None),
            largest_output=_reached(module, inputs) if direction == "forward" else None,
            largest_weight=max((weight.detach().abs().max().item() for weight in weights), default=None),
            format=DTYPE_NAMES.get(bad.dtype, str(bad.dtype)),
            limit=torch.finfo(bad.dtype).max,
        )


@contextmanager
def watching(model: nn.Module, *, backward: bool = False) -> Iterator[Witness]:
    """Hook every module of `model` while the context lasts."""
    witness = Witness()
    handles = []
    for name, module in model.named_modules():
        if backward and not isinstance(module, nn.ModuleList) and name:
            handles.append(module.register_full_backward_hook(partial(witness.after_backward, name)))
        elif not backward:
            handles.append(module.register_forward_hook(partial(witness.after, name or "the model")))
    try:
        yield witness
    finally:
        for handle in handles:
            handle.remove()


def _with_weights(widest: Autopsy, model: nn.Module) -> Autopsy:
    """Add the largest weight of the whole model; ZeRO-3 shows this rank's share of each."""
    held = [getattr(weight, "ds_tensor", weight).detach() for weight in model.parameters()]
    widest.largest_weight = max((_largest(weight) for weight in held if weight.is_floating_point()), default=0.0)
    return widest


def _backward(trainer: "PlanTrainer", model: Any, inputs: Any, items: Any) -> Witness:
    scale = 1.0 if trainer.scaler is None else trainer.scaler.get_scale()
    with watching(findings.plain_model(trainer), backward=True) as witness:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
        (loss * scale).backward()
    return witness


def _floating(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _kind(value: torch.Tensor) -> str:
    return "nan" if torch.isnan(value).any() else "inf"


def _largest(value: torch.Tensor) -> float:
    """Find the largest finite magnitude; of a tensor that is all finite without a copy of it."""
    if not value.numel():
        return 0.0
    if _is_finite(value):
        low, high = torch.aminmax(value.detach())
        return max(abs(low.item()), abs(high.item()))
    return float(torch.where(torch.isfinite(value), value, 0).abs().max().item())


def _is_finite(value: torch.Tensor) -> bool:
    """Look at the extremes alone, which NaN is one of: a mask would take memory beside the value."""
    if not value.numel():
        return True
    low, high = torch.aminmax(value.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _reached(module: nn.Module, inputs: Any) -> float | None:
    """Compute a linear layer's output in fp32, to see how far beyond its format it went; None for other modules."""
    if not isinstance(module, nn.Linear) or module.weight.numel() == 0:
        return None
    device = inputs[0].device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        bias = None if module.bias is None else module.bias.float()
        return _largest(nn.functional.linear(inputs[0].float(), module.weight.float(), bias))
