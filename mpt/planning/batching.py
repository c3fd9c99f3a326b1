"""Batch arithmetic: global = micro x accumulation x world, always. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from mpt.errors import MptError
from mpt.planning.decision import Decision, Origin

LARGEST_MICRO_BATCH = 64
USUAL_MICRO_BATCHES = (8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class AskedBatch:
    """The batch sizes that a recipe gives; None where it leaves one out."""

    global_size: int | None = None
    micro: int | None = None
    accumulation: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The three sizes, each with its reason."""

    micro: Decision[int]
    accumulation: Decision[int]
    global_size: Decision[int]


def possible_micro_batches(asked: AskedBatch, world_size: int) -> tuple[int, ...]:
    """List the micro batch sizes that the asked sizes leave open, largest first.

    Raises MptError where none does.

    >>> possible_micro_batches(AskedBatch(global_size=48), world_size=4)
    (12, 6, 4, 3, 2, 1)
    """
    if asked.global_size is None:
        return (asked.micro,) if asked.micro else USUAL_MICRO_BATCHES
    parts = world_size * (asked.micro or 1) * (asked.accumulation or 1)
    if asked.global_size % parts or (asked.micro and asked.accumulation and asked.global_size != parts):
        raise _indivisible(asked, world_size, parts)
    if asked.micro:
        return (asked.micro,)
    each = asked.global_size // parts
    if asked.accumulation:
        return (each,)
    return tuple(size for size in range(min(each, LARGEST_MICRO_BATCH), 0, -1) if each % size == 0)


def accumulation_for(asked: AskedBatch, micro: int, world_size: int) -> int:
    """Accumulation steps that go with a possible micro batch size."""
    if asked.global_size is not None:
        return asked.global_size // (micro * world_size)
    return asked.accumulation or 1


def choose_batch(asked: AskedBatch, world_size: int, fits: Callable[[int], bool]) -> Batch:
    """Choose the largest micro batch that divides and fits; the smallest possible one where none fits.

    Raises MptError for sizes that do not divide, naming the nearest that do.
    """
    possible = possible_micro_batches(asked, world_size)
    micro = next((size for size in possible if fits(size)), possible[-1])
    accumulation = accumulation_for(asked, micro, world_size)
    total = micro * accumulation * world_size
    return Batch(
        _micro_decision(asked, possible, micro, world_size, fits(micro)),
        _accumulation_decision(asked, accumulation, micro, world_size),
        _global_decision(asked, total, micro, accumulation, world_size),
    )


def _micro_decision(
    asked: AskedBatch, possible: tuple[int, ...], micro: int, world_size: int, it_fits: bool
) -> Decision[int]:
    if asked.micro:
        return Decision(micro, Origin.ASKED, "the recipe asks for it")
    if asked.global_size and asked.accumulation:
        sizes = f"{asked.global_size} / ({world_size} processes x {asked.accumulation} accumulated)"
        return Decision(micro, Origin.DERIVED, sizes)
    if not it_fits:
        return Decision(micro, Origin.AUTO, "the smallest possible, and even that does not fit")
    larger = [size for size in possible if size > micro]
    of_what = "the global batch leaves open" if asked.global_size else "are usual (powers of two up to 8)"
    reason = f"the largest that fits of the sizes that {of_what}"
    if larger:
        reason += f"; {larger[-1]} does not fit"
    return Decision(micro, Origin.AUTO, reason)


def _accumulation_decision(asked: AskedBatch, accumulation: int, micro: int, world_size: int) -> Decision[int]:
    if asked.accumulation:
        return Decision(accumulation, Origin.ASKED, "the recipe asks for it")
    if asked.global_size:
        reason = f"{asked.global_size} / ({micro} micro x {world_size} {_processes(world_size)})"
        return Decision(accumulation, Origin.DERIVED, reason)
    return Decision(accumulation, Origin.AUTO, "no global batch size is asked for")


def _global_decision(asked: AskedBatch, total: int, micro: int, accumulation: int, world_size: int) -> Decision[int]:
    if asked.global_size:
        return Decision(total, Origin.ASKED, "the recipe asks for it")
    reason = f"{micro} micro x {accumulation} accumulated x {world_size} {_processes(world_size)}"
    return Decision(total, Origin.DERIVED, reason)


def _indivisible(asked: AskedBatch, world_size: int, parts: int) -> MptError:
    wanted = asked.global_size or 0
    factors = [f"{world_size} {_processes(world_size)}"]
    if asked.micro:
        factors.append(f"micro_batch_size {asked.micro}")
    if asked.accumulation:
        factors.append(f"gradient_accumulation_steps {asked.accumulation}")
    if asked.micro and asked.accumulation:
        remedy = f"Set global_batch_size to {parts}, or leave one of the three out."
    else:
        below, above = wanted // parts * parts, (wanted // parts + 1) * parts
        nearest = f"{below} or {above}" if below else str(above)
        remedy = f"Set global_batch_size to {nearest}, or change what it is divided by."
    return MptError(f"global_batch_size {wanted} is not a multiple of {' x '.join(factors)}", remedy=remedy)


def _processes(count: int) -> str:
    return "process" if count == 1 else "processes"
