"""Choose each layer's precision from what was measured of it. Pure: numbers in, a policy with reasons out.

What a rounding costs is predicted to first order: dL = sum(dL/dy * (y_rounded - y)) over a layer's output, per batch
(the measure of AMP-IP, arXiv:2505.13060). A layer's cost is the root mean square over the batches, never the mean:
chance cancels signs between batches that training will not repeat. Layers add as squares, for the rounding errors of
different layers are independent to first order; their plain sum would be right only if all pushed the same way.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

WIDEST_FIRST = ("fp32", "bf16", "fp8")
# Where the floors stand, and what they stand between. Measured with torchao 0.18, tensorwise, on a three-layer Llama
# trained on text, and on the same model with one channel of 3e4 going into one projection whose weights ignore it:
#
#                                 healthy layers        that projection
#   energy of any product         25 dB and more        output 20 dB, its gradients as healthy as any
#   lower decile of the channels  20 dB and more        output 12 dB, weight gradient 6 dB
#   flushed to 0                  0.1 % and less        26 to 54 % of the inputs
#
# bf16 has 50 dB, 43 in the lower decile, and flushes nothing.
ENERGY_FLOOR_DB = 20.0  # the error has 1 % of the energy: the cosine to the exact tensor is 0.995
# The total is that of the largest channels. A projection learns one column of its weights from each input channel, so
# most channels must come through, and 3 % of a channel's energy may be error (cosine 0.985).
CHANNEL_FLOOR_DB = 15.0
CHANNEL_QUANTILE = 0.1
# A scale for the whole tensor keeps 2**18 between the largest number and the smallest (e4m3): where more than a
# twentieth of what is not 0 lies below, one channel or row has taken the range, and the rest learns nothing of it.
UNDERFLOW_CEILING = 0.05

PRODUCTS = {"output": "output", "input_gradient": "input gradient", "weight_gradient": "weight gradient"}


@dataclass(frozen=True, slots=True)
class Measured:
    """What one layer did in one format. Ratios in dB, of energies: signal over error; -inf: not finite.

    `energy_db` by product (`PRODUCTS`) over the whole tensor; `channel_db` the lower decile (`CHANNEL_QUANTILE`) of the
    tensor's columns. There is no weight gradient where the weights are frozen. `loss_changes` has the first-order
    change of the loss for each batch. `underflow`: which share of the non-zero elements of input, weight and gradient
    became 0; empty where the format has fp32's range.
    """

    energy_db: Mapping[str, float]
    channel_db: Mapping[str, float]
    loss_changes: tuple[float, ...]
    underflow: Mapping[str, float]

    @property
    def output_db(self) -> float:
        return self.energy_db["output"]

    @property
    def gradient_db(self) -> float:
        """The worse of the gradients."""
        return min((db for product, db in self.energy_db.items() if product != "output"), default=math.inf)

    @property
    def lowest_channel_db(self) -> float:
        """The product whose channels fare worst."""
        return min(self.channel_db.values(), default=math.inf)

    @property
    def loss_change(self) -> float:
        """The size of the change: see `change_size`."""
        return change_size(self.loss_changes)

    def flaw(self) -> str | None:
        """Say which floor the layer falls below, whatever it does to the loss; None: none."""
        if math.isinf(self.loss_change) or -math.inf in self.energy_db.values():
            return "its result is not finite"
        for product, db in self.energy_db.items():
            if db < ENERGY_FLOOR_DB:
                return f"{PRODUCTS[product]} at {db:.1f} dB, under the floor of {ENERGY_FLOOR_DB:g}"
        for operand, share in self.underflow.items():
            if share > UNDERFLOW_CEILING:
                return f"{share:.0%} of the {operand} becomes 0, and {UNDERFLOW_CEILING:.0%} may"
        for product, db in self.channel_db.items():
            if db < CHANNEL_FLOOR_DB:
                floor = f"under the floor of {CHANNEL_FLOOR_DB:g}"
                return f"a tenth of the channels of the {PRODUCTS[product]} at {db:.1f} dB or less, {floor}"
        return None


def change_size(changes: Sequence[float]) -> float:
    """Root mean square of the loss's changes over the batches; inf where one is not finite, or there are none.

    >>> change_size([0.3, -0.4, 0.0, 0.0])
    0.25
    """
    if not changes or not all(map(math.isfinite, changes)):
        return math.inf
    return math.sqrt(math.fsum(change**2 for change in changes) / len(changes))


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
        return measured.flaw()


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


def with_changes(evidence: Evidence, policy: Policy, changes: Mapping[str, Sequence[float]]) -> Evidence:
    """Put changes of the loss that were seen in the place of predicted ones: by layer, in the policy's format."""
    layers = []
    for layer in evidence.layers:
        precision = policy.choices[layer.name].precision
        seen = changes.get(layer.name)
        if seen is not None and precision in layer.measured:
            measured = replace(layer.measured[precision], loss_changes=tuple(seen))
            layer = replace(layer, measured={**layer.measured, precision: measured})
        layers.append(layer)
    return Evidence(evidence.reference_loss, tuple(layers))


def raised_alone(evidence: Evidence, policy: Policy, candidates: Sequence[str]) -> dict[str, Policy]:
    """Give by layer the policy with this one layer in its next wider format; layers in the widest are left out."""
    order = widest_first(candidates)
    found = {}
    for layer in evidence.layers:
        choice = policy.choices[layer.name]
        higher = _next_above(layer, choice.precision, order)
        if higher is not None:
            choices = {**policy.choices, layer.name: Choice(higher, choice.reason)}
            found[layer.name] = _policy(evidence, choices, policy.budget, order)
    return found


def raise_worst(evidence: Evidence, policy: Policy, factor: float, candidates: Sequence[str]) -> Policy | None:
    """Raise the layers that move the loss most, one format each time, until the prediction is `factor` of what it was.

    At least one is raised; None where none can be, because every layer is in the widest candidate.
    """
    predicted = predicted_change(evidence, policy.choices)
    order = widest_first(candidates)
    layers = {layer.name: layer for layer in evidence.layers}
    choices = dict(policy.choices)
    raised = None
    while raised is None or raised.predicted > predicted * factor:
        above = {
            name: higher
            for name, choice in choices.items()
            if (higher := _next_above(layers[name], choice.precision, order)) is not None
        }
        if not above:
            return raised
        worst = max(above, key=lambda name: layers[name].loss_change(choices[name].precision))
        was = choices[worst].precision
        change = layers[worst].loss_change(was)
        choices[worst] = Choice(
            above[worst], f"{was}: the loss moved too far when verified, by {change:.2g} of this layer"
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


def predicted_change(evidence: Evidence, choices: Mapping[str, Choice]) -> float:
    """Predict the change of the loss: the layers' own, added as squares."""
    return math.sqrt(math.fsum(one.loss_change(choices[one.name].precision) ** 2 for one in evidence.layers))


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
    predicted = predicted_change(evidence, choices)
    widest = math.fsum(layer.costs[order[0]] for layer in evidence.layers)
    chosen = math.fsum(layer.costs[choices[layer.name].precision] for layer in evidence.layers)
    return Policy(dict(choices), predicted, budget, 1 - chosen / widest if widest else 0.0)
