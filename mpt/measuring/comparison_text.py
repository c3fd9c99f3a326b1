"""A comparison as lines of text for a terminal."""

from collections.abc import Sequence
from typing import Any

from mpt.measuring.comparison import WARM_UP, Comparison, Side
from mpt.recipe.schema import CompareBoundsSection

# More steps than these are thinned out evenly; result.json has them all.
MAX_ROWS = 20
MAX_NAMES = 4


def write_out(comparison: Comparison, require: CompareBoundsSection | None) -> list[str]:
    """Write the table of losses, and below it what they, the gradients, the times and the memory come to."""
    one, other = comparison.candidate, comparison.reference
    lines = [f"{one.title} compared with {other.title}, step by step:", *_named(one)]
    lines.append(f"  {'step':>6}  {one.precision:>10}  {other.precision:>10}  {'gap':>8}")
    lines += [_row(comparison, index) for index in _shown(comparison)]
    bounds = require or CompareBoundsSection()
    for side in (one, other):
        if side.diverged is not None:
            lines.append(f"  {side.precision} diverged: {side.diverged}")
    if comparison.max_gap is not None:
        text = f"up to {comparison.max_gap:.2g} (step {comparison.max_gap_step}), {comparison.final_gap:.2g} at the end"
        lines.append(f"  loss gap     {text}{_bound('at most', bounds.max_loss_gap)}")
    lines += _gradient(comparison, bounds)
    ratio = comparison.step_time_ratio
    if ratio is not None:
        times = f"{_seconds(one.step_time_s)} against {_seconds(other.step_time_s)}"
        lines.append(f"  step time    {ratio:.2f} of {other.precision}'s ({times})")
    elif comparison.gaps:
        lines.append(f"  step time    too few steps to time: the first {WARM_UP} warm up")
    if one.memory_gib is not None and other.memory_gib is not None:
        lines.append(f"  peak memory  {one.memory_gib:.2f} GiB against {other.memory_gib:.2f} GiB")
    for key, (mine, theirs) in comparison.differs.items():
        lines.append(f"  note: {key} is {mine} in the run, and {theirs} in the reference")
    if comparison.gradient.dropout:
        lines.append(
            "  note: the model has dropout; where a kernel draws its masks otherwise, the gap is partly chance"
        )
    return lines


def _named(side: Side) -> list[str]:
    """Name the layers in another precision, a line for each of these; result.json names all of many."""
    lines = []
    for precision in dict.fromkeys(entry["precision"] for entry in side.layers):
        names = [entry["name"] for entry in side.layers if entry["precision"] == precision]
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        lines.append(f"  in {precision}: {', '.join(names[:MAX_NAMES])}{more}")
    return lines


def _gradient(comparison: Comparison, bounds: CompareBoundsSection) -> list[str]:
    gradient = comparison.gradient
    bound = _bound("at least", bounds.min_gradient_cosine)
    if gradient.cosine is None:
        return [f"  gradient     no cosine: {gradient.reason}{bound}"]
    lines = [f"  gradient     cosine {gradient.cosine:.6f} at the first step{bound}"]
    for entry in gradient.lowest[:3]:
        lines.append(f"               {entry['cosine']:.6f} {entry['name']} ({entry['share']:.1%} of the norm)")
    if gradient.unmatched:
        lines.append(f"               {gradient.unmatched} parameters have no counterpart and are left out")
    return lines


def _shown(comparison: Comparison) -> list[int]:
    """Choose the steps to show, from 0: all of a few, else evenly, with the last one and the one of the largest gap."""
    made = max(len(comparison.candidate.losses), len(comparison.reference.losses))
    if made <= MAX_ROWS:
        return list(range(made))
    chosen = {round(place * (made - 1) / (MAX_ROWS - 1)) for place in range(MAX_ROWS)}
    return sorted(chosen | ({comparison.max_gap_step - 1} if comparison.max_gap_step else set()))


def _row(comparison: Comparison, index: int) -> str:
    one, other = (_at(side.losses, index, ".5f") for side in (comparison.candidate, comparison.reference))
    skipped = any(_flag(side.skipped, index) for side in (comparison.candidate, comparison.reference))
    mark = "  SKIPPED" if skipped else ""
    return f"  {index + 1:>6}  {one:>10}  {other:>10}  {_at(comparison.gaps, index, '.1e'):>8}{mark}"


def _at(values: Sequence[float], index: int, form: str) -> str:
    return format(values[index], form) if index < len(values) else "-"


def _flag(values: Sequence[bool], index: int) -> bool:
    return index < len(values) and values[index]


def _bound(words: str, value: Any) -> str:
    return "" if value is None else f"; required: {words} {value:g}"


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f} s"
