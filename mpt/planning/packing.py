"""How documents become samples, and samples a batch: joined, packed or single; padded or not. Pure."""

from mpt.errors import MptError
from mpt.hardware.machine import Machine
from mpt.planning.attention_support import is_flash, keeps_documents_apart
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.recipe.rules import groups_by_length
from mpt.recipe.schema import Recipe
from mpt.terms import FP8_MODES, Packing, Precision, Task

MATRIX_UNIT = 8  # numbers of 16 bits, and twice as many of 8, that a matrix unit takes at once (16 bytes)
SIXTEEN_BIT = (Precision.FP16, Precision.BF16, Precision.BF16_PURE)


def choose_packing(recipe: Recipe, model_type: str, attention: str) -> Decision[Packing]:
    """Choose how documents become samples.

    Raises MptError where best-fit packing was asked for and the model's attention lets documents see one another.
    """
    asked, leak = _asked(recipe), _leak(model_type, attention)
    if asked is Packing.BEST_FIT and leak:
        raise MptError(
            f"data.packing: best_fit keeps documents apart, and {leak}",
            remedy="Write `packing: none`" + (", or `blocks`." if recipe.task is Task.CAUSAL_LM else "."),
        )
    if asked is not None:
        return Decision(asked, Origin.ASKED, "the recipe asks for it")
    if groups_by_length(recipe):
        return Decision(Packing.NONE, Origin.DERIVED, "batches are grouped by length")
    if recipe.task in (Task.CAUSAL_LM, Task.MASKED_LM):
        rejected = Rejected(Packing.BEST_FIT.value, leak or "only when asked: blocks have no padding at all")
        return Decision(
            Packing.BLOCKS, Origin.AUTO, "mpt's default: blocks without padding waste no compute", (rejected,)
        )
    if recipe.task is Task.SFT and leak is None:
        return Decision(Packing.BEST_FIT, Origin.AUTO, "whole documents side by side, which don't see one another")
    if recipe.task is Task.SFT:
        return Decision(Packing.NONE, Origin.AUTO, leak or "", (Rejected(Packing.BEST_FIT.value, leak or ""),))
    return Decision(Packing.NONE, Origin.AUTO, f"{recipe.task} learns from whole documents")


def wants_best_fit(recipe: Recipe) -> bool:
    """Whether documents are to share samples, if the model can keep them apart."""
    asked = _asked(recipe)
    is_default = asked is None and recipe.task is Task.SFT and not groups_by_length(recipe)
    return asked is Packing.BEST_FIT or is_default


def choose_padding_free(task: Task, packing: Packing, attention: str, model_type: str) -> Decision[bool]:
    """Choose whether a batch is one row without padding, in which Flash Attention is told where documents end."""
    if packing is Packing.BLOCKS:
        return Decision(False, Origin.DERIVED, "blocks have no padding")
    if not is_flash(attention):
        return Decision(False, Origin.DERIVED, f"{attention} computes rectangles; Flash Attention would not have to")
    if task not in (Task.CAUSAL_LM, Task.SFT):
        return Decision(False, Origin.DERIVED, f"{task} reads a document a row")
    leak = _leak(model_type, attention)
    if leak:
        return Decision(False, Origin.DERIVED, leak)
    return Decision(True, Origin.AUTO, f"{attention} takes documents of any length side by side")


def choose_pad_multiple(
    asked: int | None, packing: Packing, precision: Precision, machine: Machine, *, padding_free: bool
) -> Decision[int]:
    """Choose what the length of a batch is rounded up to (NVIDIA, "Matrix Multiplication Background", section 4)."""
    if packing is Packing.BLOCKS:
        return Decision(1, Origin.DERIVED, "blocks have no padding")
    if asked is not None:
        return Decision(asked, Origin.ASKED, "the recipe asks for it")
    if machine.is_cpu:
        return Decision(1, Origin.AUTO, "a CPU gains nothing from round lengths")
    if precision in FP8_MODES:
        return Decision(2 * MATRIX_UNIT, Origin.AUTO, "fp8 multiplies in 16 numbers at a time")
    if precision not in SIXTEEN_BIT:
        return Decision(1, Origin.AUTO, f"{precision} gains nothing from round lengths")
    if padding_free:
        return Decision(1, Origin.AUTO, "one long row: a round length gains nothing")
    return Decision(MATRIX_UNIT, Origin.AUTO, "matrix units take 8 numbers of 16 bits at a time")


def _asked(recipe: Recipe) -> Packing | None:
    """Read the recipe's word; true means what the task would choose, were it to pack."""
    match recipe.data.packing:
        case "auto":
            return None
        case bool(is_packed):
            packed = Packing.BEST_FIT if recipe.task is Task.SFT else Packing.BLOCKS
            return packed if is_packed else Packing.NONE
        case word:
            return Packing(word)


def _leak(model_type: str, attention: str) -> str | None:
    """Say why documents in one sample would see one another; None where they don't."""
    if keeps_documents_apart(model_type, attention):
        return None
    other = "sdpa" if is_flash(attention) else "flash_attention_2"
    hint = f" (it would with {other})" if keeps_documents_apart(model_type, other) else ""
    return f"{model_type} is not known to keep documents apart with {attention}{hint}"
