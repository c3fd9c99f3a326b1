"""Two measured starts of one run, in two precisions: what the numbers say, and whether they keep the bounds. Pure.

`mpt.measuring.compare` makes the measurements; `mpt.measuring.comparison_text` writes them out.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpt.recipe.schema import CompareBoundsSection

# The first steps hold what happens once: compiling, kernels that are chosen, the optimizer's state that is made.
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two attempts. `diverged` says how its numbers went bad before its last step; None: they did not.

    `layers` are the modules that compute in another precision than the rest: `name` and `precision` of each.
    `loss_scales` are None without fp16. `step_time_s` is the mean after the warm-up, None where there were too few.
    """

    precision: str
    losses: tuple[float, ...]
    loss_scales: tuple[float | None, ...] = ()
    skipped: tuple[bool, ...] = ()
    step_time_s: float | None = None
    memory_gib: float | None = None
    diverged: str | None = None
    layers: tuple[Mapping[str, str], ...] = ()

    @property
    def title(self) -> str:
        """Name the precision, and how many layers are in another one.

        >>> Side("bf16", (), layers=({"name": "lm_head", "precision": "fp32"},)).title
        'bf16 (1 layer in fp32)'
        """
        return titled(self.precision, self.layers)


@dataclass(frozen=True, slots=True)
class Gradient:
    """The first step's gradients beside each other. `cosine` is None where `reason` says why there is none.

    `norms` are the candidate's and the reference's, None where not finite. `lowest` are the parameters with the lowest
    cosines: `name`, `cosine`, and `share` of the reference's norm. `dropout` is the highest rate that was trained with.
    """

    cosine: float | None
    reason: str | None = None
    norms: tuple[float | None, ...] = ()
    lowest: tuple[Mapping[str, Any], ...] = ()
    parameters: int = 0
    unmatched: int = 0
    dropout: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Gradient":
        """Read what `asdict` gave, or the child that compared."""
        return cls(**_tuples(data))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The candidate, the recipe as it is, beside the reference. `differs`: what else is not the same, key by key."""

    steps: int
    candidate: Side
    reference: Side
    gradient: Gradient
    differs: Mapping[str, tuple[Any, Any]]

    @property
    def gaps(self) -> tuple[float, ...]:
        """The relative difference of the loss at each step that both made."""
        pairs = zip(self.candidate.losses, self.reference.losses, strict=False)
        return tuple(relative_gap(one, other) for one, other in pairs)

    @property
    def max_gap(self) -> float | None:
        return max(self.gaps, default=None)

    @property
    def max_gap_step(self) -> int | None:
        """The step with the largest gap, from 1."""
        return self.gaps.index(max(self.gaps)) + 1 if self.gaps else None

    @property
    def final_gap(self) -> float | None:
        return self.gaps[-1] if self.gaps else None

    @property
    def step_time_ratio(self) -> float | None:
        """The candidate's mean step time in units of the reference's."""
        one, other = self.candidate.step_time_s, self.reference.step_time_s
        return None if one is None or not other else one / other

    def to_json(self) -> dict[str, Any]:
        """Give measurements and what follows from them; `from_json` reads the measurements back."""
        return {
            "steps": self.steps,
            "candidate": asdict(self.candidate),
            "reference": asdict(self.reference),
            "gradient": asdict(self.gradient),
            "differs": {key: list(values) for key, values in self.differs.items()},
            "loss_gaps": list(self.gaps),
            "max_loss_gap": self.max_gap,
            "max_loss_gap_step": self.max_gap_step,
            "final_loss_gap": self.final_gap,
            "gradient_cosine": self.gradient.cosine,
            "step_time_ratio": self.step_time_ratio,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Comparison":
        """Read what `to_json` gave. Raises KeyError or TypeError for something else."""
        return cls(
            steps=data["steps"],
            candidate=Side(**_tuples(data["candidate"])),
            reference=Side(**_tuples(data["reference"])),
            gradient=Gradient.from_json(data["gradient"]),
            differs={key: (was, now) for key, (was, now) in data["differs"].items()},
        )


def titled(precision: str, layers: Sequence[Mapping[str, str]]) -> str:
    """Name a precision with the layers that are in another one; `layers` as a Side's."""
    counts = Counter(entry["precision"] for entry in layers).most_common()
    parts = [f"{number} in {name}" for name, number in counts]
    if parts:
        number, _, rest = parts[0].partition(" ")
        parts[0] = f"{number} layer{'s' * (number != '1')} {rest}"
    return f"{precision} ({', '.join(parts)})" if parts else precision


def side_of(
    precision: str,
    rows: Mapping[int, Mapping[str, Any]],
    diverged: str | None,
    layers: Sequence[Mapping[str, str]] = (),
) -> Side:
    """Sum up an attempt from its metrics, a row a step."""
    listed = [rows[step] for step in sorted(rows)]
    times = [float(row["step_time_s"]) for row in listed[WARM_UP:]]
    memory = [float(row["memory_gib"]) for row in listed if row.get("memory_gib") is not None]
    return Side(
        precision,
        losses=tuple(float(row["loss"]) for row in listed),
        loss_scales=tuple(row.get("loss_scale") for row in listed),
        skipped=tuple(bool(row.get("skipped")) for row in listed),
        step_time_s=math.fsum(times) / len(times) if times else None,
        memory_gib=max(memory, default=None),
        diverged=diverged,
        layers=tuple(layers),
    )


def relative_gap(one: float, other: float) -> float:
    """Compute how far a loss is from the reference's, relative to that; infinite where one is no number.

    >>> relative_gap(2.02, 2.0) < 0.0101, relative_gap(0.0, 0.0), relative_gap(1.0, 0.0)
    (True, 0.0, inf)
    """
    if one == other:
        return 0.0
    gap = abs(one - other) / abs(other) if other else math.inf
    return math.inf if math.isnan(gap) else gap


def without_cosine(candidate: Side, reference: Side) -> str | None:
    """Say why the two first gradients can't be compared; None where nothing is known against it."""
    for side in (candidate, reference):
        if side.skipped and side.skipped[0]:
            return f"the first step in {side.precision} overflowed at loss scale {side.loss_scales[0]:.15g}"
        if not side.losses:
            return f"{side.precision} made no step"
    return None


def judge(comparison: Comparison, require: CompareBoundsSection | None) -> tuple[str, ...]:
    """Name each bound that the comparison does not keep, with the value measured; none where nothing is required."""
    if require is None:
        return ()
    candidate, reference = comparison.candidate, comparison.reference
    pair = f"{candidate.title} and {reference.title}"
    breaches = [
        f"{side.title} diverged while it was compared: {side.diverged}"
        for side in (candidate, reference)
        if side.diverged is not None
    ]
    gap, bound = comparison.max_gap, require.max_loss_gap
    if bound is not None and gap is not None and gap > bound:
        breaches.append(
            f"the losses of {pair} differ by up to {gap:.2g} (step {comparison.max_gap_step}), and "
            f"compare.require.max_loss_gap is {bound:g}"
        )
    if bound is not None and gap is None and not breaches:
        breaches.append(f"no step was compared, and compare.require.max_loss_gap is {bound:g}")
    cosine, least = comparison.gradient.cosine, require.min_gradient_cosine
    if least is not None and cosine is None:
        breaches.append(
            f"the gradients of {pair} have no cosine, because {comparison.gradient.reason}, and "
            f"compare.require.min_gradient_cosine is {least:g}"
        )
    elif least is not None and cosine is not None and cosine < least:
        breaches.append(
            f"the first gradients of {pair} have cosine {cosine:.6g}, and compare.require.min_gradient_cosine is "
            f"{least:g}{_named(comparison.gradient.lowest)}"
        )
    return tuple(breaches)


def remedy_for(comparison: Comparison) -> str:
    """Say what to do about a broken bound, the nearest cause first."""
    if comparison.reference.diverged is not None:
        return "The recipe diverges in the reference too: lower training.learning_rate, or lengthen the warmup."
    candidate = comparison.candidate
    if candidate.skipped and candidate.skipped[0]:
        settled = [
            scale for scale, skipped in zip(candidate.loss_scales, candidate.skipped, strict=True) if not skipped
        ]
        start = f" {settled[0]:.15g}, where the first step went through" if settled and settled[0] else " lower"
        return f"Set precision.loss_scale.initial to{start}, or take another precision."
    return (
        "Keep the layers that lose most in more precision (precision.layers; `mpt search-precision` finds them), take "
        "another precision, or loosen the bound."
    )


def _named(lowest: Sequence[Mapping[str, Any]]) -> str:
    """Name the worst parameters, for a message.

    >>> _named([{"name": "wte.weight", "cosine": 0.98765}])
    ' (lowest: wte.weight 0.9877)'
    """
    listed = ", ".join(f"{entry['name']} {entry['cosine']:.4f}" for entry in lowest[:3])
    return f" (lowest: {listed})" if listed else ""


def _tuples(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
