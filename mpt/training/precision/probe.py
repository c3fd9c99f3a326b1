"""What each linear layer would do in a lower format, seen from ONE forward and backward pass of the fp32 model.

While the reference pass runs, each layer's input and the gradient of its output are at hand; with them the layer's
multiplications (output, input gradient, weight gradient) are done again in each candidate format, as training
would do them, and compared. The model runs on undisturbed. `mpt.training.sensitivity` asks; the verdict is
`mpt.measuring.precision_policy`'s.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mpt.hardware.formats import FP8_E4M3, FP8_E5M2, FloatFormat
from mpt.training.precision.float8 import convert

PRODUCTS = ("output", "input_gradient", "weight_gradient")
Products = tuple[torch.Tensor, ...]  # in the order of PRODUCTS; the last is left out where the weights are frozen
TIMED_ROUNDS = 7


@dataclass
class Sums:
    """What one layer did in one format so far: loss changes by batch, what rounds to zero, and by product the energies
    of signal and error (two rows) in each of its channels, the last dimension."""

    energies: dict[str, torch.Tensor] = field(default_factory=dict)
    loss_changes: list[float] = field(default_factory=list)
    underflow: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self, channel_quantile: float) -> dict[str, Any]:
        """Give decibels and shares. An infinite ratio: no error; minus infinity: a result that is not finite."""
        return {
            "energy_db": {product: decibels(*both.sum(-1).tolist()) for product, both in self.energies.items()},
            "channel_db": {product: low_channel(both, channel_quantile) for product, both in self.energies.items()},
            "loss_changes": self.loss_changes,
            "underflow": {what: zeros / max(1.0, of) for what, (zeros, of) in self.underflow.items()},
        }


class Probe:
    """Watches the linear layers of a model while it runs forward and backward in fp32; use it as a context.

    `wanted` names the formats to try by layer, "bf16" or "fp8". torchao's `fp8_recipe` is computed by hardware, or
    emulated. `is_frozen`: the layers' weights are not trained, and their gradient is not looked at. Each backward pass
    must be that of a batch's whole loss. Raises MptError for an fp8 layer that is no torch.nn.Linear, UnsupportedError
    without torchao.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Mapping[str, Sequence[str]],
        *,
        fp8_recipe: str | None,
        emulate_fp8: bool,
        is_frozen: bool = False,
    ) -> None:
        self.sums: dict[str, dict[str, Sums]] = {}
        self.rows: dict[str, int] = {}
        self._batch = 0
        self._has_weight_gradient = not is_frozen
        self._recipe = fp8_recipe or ""
        self._layers = {name: model.get_submodule(name) for name in wanted}
        self._tries: dict[str, dict[str, Callable[..., Products]]] = {}
        for name, formats in wanted.items():
            layer = self._layers[name]
            self._tries[name] = {}
            if "bf16" in formats:
                self._tries[name]["bf16"] = in_bf16
            if "fp8" in formats:
                self._tries[name]["fp8"] = partial(in_fp8, float8_twin(layer, self._recipe, emulate=emulate_fp8))
        self._handles: list[Any] = []

    def __enter__(self) -> "Probe":
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._after_forward, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def begin_batch(self) -> None:
        """Say that the next pass is of another batch."""
        self._batch += 1

    def to_json(self, channel_quantile: float) -> dict[str, Any]:
        """Give what was seen by layer; a layer that never ran is missing."""
        return {
            name: {
                "rows": self.rows[name],
                "formats": {kind: sums.to_json(channel_quantile) for kind, sums in by_format.items()},
            }
            for name, by_format in self.sums.items()
        }

    def _after_forward(self, name: str, layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad and output.numel():
            source = inputs[0].detach().flatten(0, -2)
            output.register_hook(partial(self._after_backward, name, source, output.detach().flatten(0, -2)))

    @torch.no_grad()
    def _after_backward(self, name: str, source: torch.Tensor, output: torch.Tensor, gradient: torch.Tensor) -> None:
        weight, bias = oriented(self._layers[name])
        gradient = gradient.flatten(0, -2)
        exact = [output, gradient @ weight]
        if self._has_weight_gradient:
            exact.append(gradient.t() @ source)
        self.rows[name] = max(self.rows.get(name, 0), source.shape[0])
        by_format = self.sums.setdefault(name, {})
        for kind, multiply in self._tries[name].items():
            sums = by_format.setdefault(kind, Sums())
            rough = multiply(source, weight, bias, gradient, has_weight_gradient=self._has_weight_gradient)
            errors = [r.float() - e for r, e in zip(rough, exact, strict=True)]
            for product, signal, error in zip(PRODUCTS, exact, errors, strict=False):
                both = torch.stack([signal.norm(dim=0), error.norm(dim=0)]).cpu().double().square()
                sums.energies[product] = both + sums.energies.get(product, 0.0)
            sums.loss_changes += [0.0] * (self._batch - len(sums.loss_changes))
            sums.loss_changes[self._batch - 1] += float((gradient * errors[0]).sum())
            if kind == "fp8":
                self._count_zeros(sums, source, weight, gradient)

    def _count_zeros(self, sums: Sums, source: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        is_rowwise = self._recipe != "tensorwise"
        of_gradient = FP8_E4M3 if is_rowwise else FP8_E5M2
        for what, tensor, kind in (
            ("input", source, FP8_E4M3),
            ("weight", weight, FP8_E4M3),
            ("gradient", gradient, of_gradient),
        ):
            counted = sums.underflow.setdefault(what, [0.0, 0.0])
            for place, number in enumerate(zeros_among(tensor, kind, is_rowwise=is_rowwise)):
                counted[place] += number


def oriented(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Give a linear layer's weight as (outputs, inputs), and its bias; GPT-2's Conv1D stores it the other way."""
    weight = layer.weight.detach()
    return (weight if isinstance(layer, nn.Linear) else weight.t()), layer.bias


def in_bf16(
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gradient: torch.Tensor,
    *,
    has_weight_gradient: bool = True,
) -> Products:
    """Do the multiplications as torch.autocast does them: operands and results are bf16, the sums fp32."""
    source, weight, gradient = source.bfloat16(), weight.bfloat16(), gradient.bfloat16()
    output = functional.linear(source, weight, None if bias is None else bias.bfloat16())
    to_weight = (gradient.t() @ source,) if has_weight_gradient else ()
    return (output, gradient @ weight, *to_weight)


def in_fp8(
    twin: Any,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gradient: torch.Tensor,
    *,
    has_weight_gradient: bool = True,
) -> Products:
    """Do them by the very layer that training would have, under bf16 autocast."""
    leaf = source.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(source.device.type, dtype=torch.bfloat16):
        output = twin(leaf)
        leaves = (leaf, twin.weight) if has_weight_gradient else (leaf,)
        gradients = torch.autograd.grad(output, leaves, gradient.to(output.dtype))
    return (output.detach(), *gradients)


def float8_twin(layer: nn.Module, recipe: str, *, emulate: bool) -> Any:
    """Make an fp8 layer of a linear layer's own parameters; the model keeps the layer that it has."""
    holder = nn.ModuleDict({"twin": layer})
    convert(holder, frozenset({"twin"}), recipe=recipe, emulate=emulate)
    return holder["twin"]


def zeros_among(tensor: torch.Tensor, target: FloatFormat, *, is_rowwise: bool) -> tuple[float, float]:
    """Count the non-zero elements that become 0 when the largest is scaled to the format's largest number, and all.

    Half of the smallest subnormal rounds to 0, ties to even. With `is_rowwise` each row has a scale of its own.
    """
    size = tensor.abs()
    largest = size.amax(dim=-1, keepdim=True) if is_rowwise else size.amax()
    limit = largest * float(target.smallest_subnormal / 2 / target.max)
    counts = torch.stack([((size > 0) & (size <= limit)).sum(), (size > 0).sum()]).tolist()
    return float(counts[0]), float(counts[1])


def decibels(signal: float, error: float) -> float:
    """Give the ratio of two energies, 10 log10(signal / error).

    >>> decibels(100.0, 1.0), decibels(0.0, 0.0), decibels(1.0, float("nan"))
    (20.0, inf, -inf)
    """
    if not math.isfinite(signal) or not math.isfinite(error):
        return -math.inf
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


def low_channel(energies: torch.Tensor, quantile: float) -> float:
    """Give the decibels that all but the lowest `quantile` of the channels reach; inf where every channel is zero.

    `energies` has a row of signals and one of errors. A channel without either says nothing and is left out.

    >>> low_channel(torch.tensor([[100.0, 10.0, 0.0], [1.0, 1.0, 0.0]]), 0.1)
    10.0
    """
    ratios = sorted(decibels(signal, error) for signal, error in energies.t().tolist() if signal or error)
    return ratios[int(quantile * len(ratios))] if ratios else math.inf


def time_layer(
    rows: int,
    inputs: int,
    outputs: int,
    formats: Sequence[str],
    device: torch.device,
    *,
    fp8_recipe: str | None,
    is_frozen: bool = False,
) -> dict[str, float]:
    """Time forward and backward pass of a linear layer, seconds by format: the median of rounds that take turns.

    `formats` are those that the device computes itself. The casts and the scaling are part of it, as in training;
    fp8 is compiled, as in training. The backward pass of `is_frozen` weights is the input's alone.
    """
    layer = nn.Linear(inputs, outputs, bias=False, device=device)
    layer.requires_grad_(not is_frozen)
    source = torch.randn(rows, inputs, device=device, requires_grad=True)
    gradient = torch.randn(rows, outputs, device=device)
    steps: dict[str, Callable[[], Any]] = {}
    for kind in formats:
        module: Any = layer
        if kind == "fp8":
            module = torch.compile(float8_twin(layer, fp8_recipe or "", emulate=False))
        steps[kind] = partial(_step, module, source, gradient, lowered=kind != "fp32")
    for step in steps.values():
        step()  # compiles, chooses kernels
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(TIMED_ROUNDS):
        for kind, step in steps.items():
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            seconds[kind].append(time.perf_counter() - started)
    return {kind: statistics.median(measured) for kind, measured in seconds.items()}


def _step(module: Any, source: torch.Tensor, gradient: torch.Tensor, *, lowered: bool) -> None:
    with torch.autocast(source.device.type, dtype=torch.bfloat16, enabled=lowered):
        output = module(source)
    leaves = (source, module.weight) if module.weight.requires_grad else (source,)
    torch.autograd.grad(output, leaves, gradient.to(output.dtype))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
