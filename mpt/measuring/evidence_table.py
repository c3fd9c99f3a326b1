"""What a search found, for people (a table, sentences) and for programs (one JSON object)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mpt.measuring.layer_cost import SOURCES
from mpt.measuring.precision_policy import Choice, LayerEvidence, Measured, widest_first
from mpt.measuring.search_precision import Found, Verified, count_formats

MOST_ROWS = 30
# The time in the format that they are in over that in the widest candidate, and where it comes from (`SOURCES`). Then
# signal over error in dB of the output, of the worse gradient and of the worst product's low channels, the loss's
# first-order change, the largest share of input, weight or gradient that became 0: of the layer of a kind that moves
# the loss most.
HEADINGS = ("", "in", "time", "tried", "output", "gradient", "channels", "loss", "to 0")


@dataclass(frozen=True, slots=True)
class Row:
    """Layers of one kind with one precision, and the worst that was measured of them in `tried`.

    `tried` is what they are in, or where they were kept out of it, the next lower format. `time` is theirs together,
    over what it would be in the widest candidate.
    """

    label: str
    number: int
    precision: str
    tried: str | None
    worst: Measured | None
    time: float
    reason: str

    @property
    def loss_change(self) -> float:
        return 0.0 if self.worst is None else self.worst.loss_change


def table_rows(found: Found) -> list[Row]:
    """Gather layers that differ in their numbers alone; those that move the loss most come first."""
    groups: dict[tuple[str, str, str | None], list[tuple[LayerEvidence, Choice]]] = {}
    for layer in found.evidence.layers:
        choice = found.policy.choices[layer.name]
        kind = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
        groups.setdefault((kind, choice.precision, _tried(found, layer, choice)), []).append((layer, choice))
    rows = []
    for (kind, precision, tried), members in groups.items():
        worst = max(members, key=lambda member: member[0].loss_change(tried or ""))
        label = kind if len(members) > 1 else members[0][0].name
        widest = math.fsum(layer.costs[widest_first(found.candidates)[0]] for layer, _ in members)
        time = math.fsum(layer.costs[precision] for layer, _ in members) / widest if widest else 1.0
        measured = worst[0].measured.get(tried or "")
        rows.append(Row(label, len(members), precision, tried, measured, time, worst[1].reason))
    return sorted(rows, key=lambda row: -row.loss_change)


def print_evidence(found: Found, console: Console) -> None:
    """Print the table, why layers are not in a lower format, and what follows from it."""
    rows = table_rows(found)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layers, the most sensitive first", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows[:MOST_ROWS]:
        table.add_row(row.label, f"{row.number} x", row.precision, _time(found, row), *_numbers(row))
    console.print(table)
    rest = rows[MOST_ROWS:]
    if rest:
        largest, layers = max(row.loss_change for row in rest), sum(row.number for row in rest)
        console.print(f"and {layers} more layers, none of which moves the loss by more than {largest:.1e}")
    narrowest = widest_first(found.candidates)[-1]
    for row in rows[:MOST_ROWS]:
        if row.precision != narrowest:
            console.print(f"{row.label} ({row.number} x) in {row.precision}, not {row.reason}", soft_wrap=True)
    for sentence in sentences(found):
        console.print(sentence, soft_wrap=True)


def sentences(found: Found) -> list[str]:
    """Say what was found: in the file's comments too."""
    policy, verified = found.policy, found.verified
    tolerated = f"{policy.budget:.2g} of {found.evidence.reference_loss:.4f} is tolerated"
    lines = [
        f"{count_formats(policy)}; measured on {found.batches} batches, {found.tokens} tokens",
        f"loss: predicted to move by {policy.predicted:.2g}"
        + (
            f", moved by {verified.loss_change:.2g} when verified (root mean square)"
            if verified
            else ", nothing was lowered"
        )
        + f"; {tolerated}",
    ]
    if found.failed:
        moved = ", ".join(f"{one.loss_change:.2g}" for one in found.failed)
        lines.append(f"layers were raised after policies that moved it further: {moved}")
    if verified is not None:
        lines.append(f"mean change when verified: {verified.mean_change:+.2g}")
        compared = "all weights" if found.recipe.lora is None else "the input embedding, through every layer"
        lines.append(
            f"gradient of {compared}: cosine {verified.gradient_cosine:.6f} to the fp32 one, "
            f"{verified.gradient_sqnr_db:.1f} dB"
        )
    lines.append(f"time of the linear layers: {policy.saved:.0%} less than all in {widest_first(found.candidates)[0]}")
    by_source: dict[str, list[str]] = {}
    for precision, source in found.cost_sources.items():
        by_source.setdefault(source, []).append(precision)
    lines += [f"  {', '.join(formats)}: {source}, {SOURCES[source]}" for source, formats in by_source.items()]
    return lines + [f"note: {note}" for note in found.notes]


def to_json(found: Found) -> dict[str, Any]:
    """Give everything as JSON values; a number that is not finite is a text."""
    verified = found.verified
    return {
        "precision": dict(found.section),
        "candidates": list(found.candidates),
        "reference_loss": found.evidence.reference_loss,
        "batches": found.batches,
        "tokens": found.tokens,
        "tolerated_loss_change": found.policy.budget,
        "predicted_loss_change": _plain(found.policy.predicted),
        "verified": None if verified is None else _verified(verified),
        "failed_verifications": [_verified(one) for one in found.failed],
        "time_saved": found.policy.saved,
        "time_sources": dict(found.cost_sources),
        "layers": [_layer(layer, found.policy.choices[layer.name]) for layer in found.evidence.layers],
        "notes": list(found.notes),
    }


def _tried(found: Found, layer: LayerEvidence, choice: Choice) -> str | None:
    order = widest_first(found.candidates)
    below = order[order.index(choice.precision) + 1 :]
    return next((kind for kind in (*below[:1], choice.precision) if kind in layer.measured), None)


def _time(found: Found, row: Row) -> str:
    source = found.cost_sources.get(row.precision)
    return "" if source is None else f"{row.time:.0%} {source}"


def _numbers(row: Row) -> Sequence[str]:
    if row.worst is None:
        return (row.tried or "", *[""] * 5)
    zeros = max(row.worst.underflow.values(), default=None)
    return (
        row.tried or "",
        f"{row.worst.output_db:.1f} dB",
        f"{row.worst.gradient_db:.1f} dB",
        f"{row.worst.lowest_channel_db:.1f} dB",
        f"{row.worst.loss_change:.0e}",
        "" if zeros is None else f"{zeros:.1%}",
    )


def _layer(layer: LayerEvidence, choice: Choice) -> dict[str, Any]:
    formats = {
        kind: {
            "energy_db": {product: _plain(db) for product, db in measured.energy_db.items()},
            "channel_db": {product: _plain(db) for product, db in measured.channel_db.items()},
            "flaw": measured.flaw(),
            "loss_change": _plain(measured.loss_change),
            "underflow": dict(measured.underflow),
        }
        for kind, measured in layer.measured.items()
    }
    return {
        "name": layer.name,
        "precision": choice.precision,
        "reason": choice.reason,
        "formats": formats,
        "times": dict(layer.costs),
    }


def _verified(verified: Verified) -> dict[str, Any]:
    keys = ("loss_change", "mean_change", "gradient_cosine", "gradient_sqnr_db")
    return {key: _plain(getattr(verified, key)) for key in keys}


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
