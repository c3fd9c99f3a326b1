"""Choose each layer's precision from what was measured of it. Pure: numbers in, a policy with reasons out.

What a rounding costs is predicted to first order: dL = sum(dL/dy * (y_rounded - y)) over a layer's output, per batch
(the measure of AMP-IP, arXiv:2505.13060). A layer's cost is the root mean square over the batches, never the mean:
chance cancels signs between batches that training will not repeat. Layers add as squares, for the rounding errors of
different layers are independent to first order; their plain sum would be right only if all pushed the same way.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

WIDEST_FIRST = ("fp32", "bf16", "fp8")
# A gradient's error has at most 1 % of its energy, so its cosine to the exact one is at least 0.995. Well-scaled
# tensors reach 25 dB in e5m2, 31 in e4m3 and 50 in bf16 (measured on a trained two-layer Llama, torchao 0.18).
GRADIENT_FLOOR_DB = 20.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one layer did in one format. Ratios in dB, of energies: signal over error; -inf: not finite.

    `loss_changes` has the first-order change of the loss for each batch. `underflow`: which share of the non-zero
    elements of input, weight and gradient became 0; empty where the format has fp32's range.
    """

    output_db: float
    input_gradient_db: float
    weight_gradient_db: float
    loss_changes: tuple[float, ...]
    underflow: Mapping[str, float]

    @property
    def gradient_db(self) -> float:
        """The worse of the two gradients."""
        return min(self.input_gradient_db, self.weight_gradient_db)

    @property
    def loss_change(self) -> float:
        """Root mean square over the batches; inf where one is not finite.

        >>> Measured(0, 0, 0, (0.3, -0.4, 0.0, 0.0), {}).loss_change
        0.25
        """
        if not self.loss_changes or not all(map(math.isfinite, self.loss_changes)):
            return math.inf
        return math.sqrt(math.fsum(change**2 for change in self.loss_changes) / len(self.loss_changes))


@dataclass(frozen=True, slots=True)
class LayerEvidence:
    """What is known of a layer: by format what was measured, what it costs, and why it may not be.

    `costs` are times in a unit that all layers share. The format fp32 is the reference and is not measured.
    """

    name: str
    measured: Mapping[str, Measured]
    costs: Mapping[str, float]
    barred: Mapping[str, str]

    def loss_change(self, precision: str) -> float:
        """Predict how much the loss moves with this layer alone in `precision`; 0 where that is the reference."""
        measured = self.measured.get(precision)
        return 0.0 if measured is None else measured.loss_change

    def reason_against(self, precision: str) -> str | None:
        """Say why the layer may not be in `precision`; None: it may."""
        if precision in self.barred:
            return self.barred[precision]
        measured = self.measured.get(precision)
        if measured is None:
            return None if precision == "fp32" else "it did not run on the calibration data"
        if math.isinf(measured.loss_change) or measured.gradient_db == -math.inf:
            return "its result is not finite"
        if measured.gradient_db < GRADIENT_FLOOR_DB:
            return f"gradients at {measured.gradient_db:.1f} dB, under the floor of {GRADIENT_FLOOR_DB:g}"
        return None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The measurement: the fp32 model's mean loss on the calibration batches, and every layer."""

    reference_loss: float
    layers: tuple[LayerEvidence, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A layer's precision, and why it is not a lower one."""

    precision: str
    reason: str


@dataclass(frozen=True, slots=True)
class Policy:
    """A precision for every layer. `predicted` and `budget` are changes of the loss; `saved`: the share of the widest
    assignment's time that it saves."""

    choices: Mapping[str, Choice]
    predicted: float
    budget: float
    saved: float

    @property
    def assignment(self) -> dict[str, str]:
        return {name: choice.precision for name, choice in self.choices.items()}

    @property
    def is_within(self) -> bool:
        return self.predicted <= self.budget


def choose_policy(evidence: Evidence, tolerance: float, candidates: Sequence[str]) -> Policy:
    """Choose the cheapest precisions whose predicted change stays within `tolerance` times the reference loss.

    Every layer begins in the widest candidate. Of the steps down that are allowed, save time and fit, the one with the
    least squared change for the time saved comes first: the greedy solution of a knapsack, which misses the best one by
    less than one layer's step. The widest candidate has no alternative, so it may exceed the budget: see `is_within`.
    """
    order = widest_first(candidates)
    budget = tolerance * abs(evidence.reference_loss)
    current = {layer.name: order[0] for layer in evidence.layers}
    layers = {layer.name: layer for layer in evidence.layers}
    spent = math.fsum(layer.loss_change(order[0]) ** 2 for layer in evidence.layers)
    steps = [step for layer in evidence.layers for step in _steps(layer, order[0], order)]
    heapq.heapify(steps)
    refused: set[tuple[str, str]] = set()
    while steps:
        _, error, name, start, precision = heapq.heappop(steps)
        if current[name] != start:
            continue
        if not spent + error <= budget**2:  # nor NaN, where the widest candidate itself is not finite
            refused.add((name, precision))
            continue
        spent += error
        current[name] = precision
        for step in _steps(layers[name], precision, order):
            heapq.heappush(steps, step)
    choices = {
        name: Choice(precision, _reason(layers[name], precision, order, refused)) for name, precision in current.items()
    }
    return _policy(evidence, choices, budget, order)


def raise_worst(evidence: Evidence, policy: Policy, factor: float, candidates: Sequence[str]) -> Policy | None:
    """Raise the layers that move the loss most, one format each time, until the prediction is `factor` of what it was.

    At least one is raised; None where none can be, because every layer is in the widest candidate.
    """
    order = widest_first(candidates)
    layers = {layer.name: layer for layer in evidence.layers}
    choices = dict(policy.choices)
    raised = None
    while raised is None or raised.predicted > policy.predicted * factor:
        above = {
            name: higher
            for name, choice in choices.items()
            if (higher := _next_above(layers[name], choice.precision, order)) is not None
        }
        if not above:
            return raised
        worst = max(above, key=lambda name: layers[name].loss_change(choices[name].precision))
        was = choices[worst].precision
        choices[worst] = Choice(
            above[worst], f"{was}: the loss moved more than predicted, and this layer moves it most"
        )
        raised = _policy(evidence, choices, policy.budget, order)
    return raised


def all_widest(evidence: Evidence, policy: Policy, candidates: Sequence[str]) -> Policy:
    """Give up lowering: every layer in the widest candidate."""
    order = widest_first(candidates)
    reason = "lower formats moved the loss by more than the tolerance, however few layers were in them"
    choices = {
        name: choice if choice.precision == order[0] else Choice(order[0], reason)
        for name, choice in policy.choices.items()
    }
    return _policy(evidence, choices, policy.budget, order)


def widest_first(candidates: Sequence[str]) -> tuple[str, ...]:
    """Sort formats by width.

    >>> widest_first(["fp8", "fp32"])
    ('fp32', 'fp8')
    """
    return tuple(precision for precision in WIDEST_FIRST if precision in candidates)


Step = tuple[float, float, str, str, str]


def _steps(layer: LayerEvidence, start: str, order: Sequence[str]) -> Iterator[Step]:
    """List the steps down from `start`: (squared change for the time saved, squared change, layer, from, to)."""
    before = layer.loss_change(start) ** 2
    for precision in order[order.index(start) + 1 :]:
        saved = layer.costs[start] - layer.costs[precision]
        if saved > 0 and layer.reason_against(precision) is None:
            error = layer.loss_change(precision) ** 2 - before
            yield error / saved, error, layer.name, start, precision


def _next_above(layer: LayerEvidence, precision: str, order: Sequence[str]) -> str | None:
    """Find the next wider format that the layer may be in; the widest always may."""
    wider = order[: order.index(precision)]
    return next((p for p in reversed(wider) if p == order[0] or layer.reason_against(p) is None), None)


def _reason(layer: LayerEvidence, precision: str, order: Sequence[str], refused: Set[tuple[str, str]]) -> str:
    """Say why a layer is not in the next lower format."""
    lower = order[order.index(precision) + 1 :]
    if not lower:
        return "the lowest candidate"
    against = layer.reason_against(lower[0])
    if against is not None:
        return f"{lower[0]}: {against}"
    if (layer.name, lower[0]) in refused:
        change = layer.loss_change(lower[0])
        return f"{lower[0]}: moves the loss by {change:.2g}, more than is left of the tolerance"
    return f"{lower[0]}: saves no time at this size"


def _policy(evidence: Evidence, choices: Mapping[str, Choice], budget: float, order: Sequence[str]) -> Policy:
    predicted = math.sqrt(math.fsum(one.loss_change(choices[one.name].precision) ** 2 for one in evidence.layers))
    widest = math.fsum(layer.costs[order[0]] for layer in evidence.layers)
    chosen = math.fsum(layer.costs[choices[layer.name].precision] for layer in evidence.layers)
    return Policy(dict(choices), predicted, budget, 1 - chosen / widest if widest else 0.0)
