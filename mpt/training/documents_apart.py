"""Measure that documents which share a row don't see one another. Called by the audit, before the first step.

Three small forward passes of the model that trains, through its engine: two documents in one row; the same with another
first document; and the second document alone. What the model says of the second has to be the same each time.
"""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mpt.errors import UnsupportedError
from mpt.terms import FP8_MODES, Precision
from mpt.training.collation import build_collator
from mpt.training.packing import LENGTHS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpt.training.trainer import PlanTrainer

DOCUMENT = 32  # tokens of each; fp8 multiplies in 16 rows at a time
# The largest difference of two logits, over the largest logit, that rounding may make: sums in another order, of 24, 11
# and 8 bits of mantissa, and in fp8 a scale that is the whole row's. Measured on random models of 2 to 8 layers: 2e-7
# in fp32 and 0 in bf16 where documents stay apart, 0.7 to 1.2 where they don't.
TOLERANCES = {Precision.FP32: 1e-3, Precision.TF32: 1e-2, Precision.FP16: 1e-2}
TOLERANCE_16_BIT, TOLERANCE_FP8 = 5e-2, 2e-1


def check_documents_apart(trainer: "PlanTrainer") -> dict[str, Any]:
    """Give the audit's finding. Raises UnsupportedError where one document's logits depend on another.

    Every rank comes to it, and no trace is left: no random number, no gradient, no state.
    """
    plan = trainer.plan
    precision = Precision(plan.value("precision"))
    tolerance = TOLERANCE_FP8 if precision in FP8_MODES else TOLERANCES.get(precision, TOLERANCE_16_BIT)
    difference = measure_leak(trainer)
    if difference > tolerance:
        raise UnsupportedError(
            f"documents that share a sample see one another: the logits of one change by {difference:.1%} with what "
            f"stands before it, and rounding makes {tolerance:.1%} at most ({plan.facts.model_type}, attention "
            f"{plan.value('attention')})",
            remedy="Set `data.packing: none`"
            + (" and `attention: sdpa`." if plan.value("padding_free") else ", or try another `attention`."),
        )
    return {"what": "documents apart", "planned": f"within {tolerance:g}", "found": difference, "passed": True}


def measure_leak(trainer: "PlanTrainer") -> float:
    """Measure how much of the second document's logits hangs on the first one, 0 to about 1."""
    vocabulary = trainer.plan.facts.vocab_size
    length = min(DOCUMENT, trainer.plan.value("sequence_length") // 2)
    first, other, second = (torch.arange(3) * 7919)[:, None] + torch.arange(length) * torch.tensor([[17], [31], [13]])
    collate = build_collator(trainer.plan, trainer.processing_class)

    def logits(*documents: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat(documents) % vocabulary
        batch = collate([{"input_ids": tokens, LENGTHS: [len(document) for document in documents]}])
        batch = trainer._prepare_inputs(batch)
        batch.pop("labels")
        found = trainer.model_wrapped(**batch).logits[0].float()
        start = sum(map(len, documents[:-1]))
        return found[start : start + length]

    with _leaving_no_trace(trainer):
        together, beside_another, alone = logits(first, second), logits(other, second), logits(second)
    largest = max((together - beside_another).abs().max(), (together - alone).abs().max())
    return float(largest / alone.abs().max().clamp(min=1e-12))


@contextmanager
def _leaving_no_trace(trainer: "PlanTrainer") -> "Iterator[None]":
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    was_training = trainer.model.training
    trainer.model_wrapped.eval()
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            trainer.compute_loss_context_manager(),
        ):
            yield
    finally:
        trainer.model_wrapped.train(was_training)
