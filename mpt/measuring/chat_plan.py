"""Trained weights as they are talked to: one process, and weights in the format that the run computed in. Pure."""

from dataclasses import replace
from typing import Any

from mpt.errors import MptError
from mpt.planning.decision import Decision, Origin
from mpt.planning.plan import Plan
from mpt.terms import Attention, Precision, Strategy, Task

# Of a precision whose matrix multiplications are narrower: what the weights are generated with.
NARROW = {
    Precision.BF16: "bf16",
    Precision.BF16_PURE: "bf16",
    Precision.FP8: "bf16",
    Precision.MXFP8: "bf16",
    Precision.FP16: "fp16",
}
TASKS = (Task.CAUSAL_LM, Task.SFT)


def to_chat(plan: Plan) -> Plan:
    """Change a plan into one to generate by: master weights, optimizer and processes are for training.

    Raises MptError for a task whose model generates no text.
    """
    task = plan.value("task")
    if task not in TASKS:
        raise MptError(f"a model for {task} generates no text", remedy="`mpt eval` measures what it is good for.")
    dtype = NARROW.get(Precision(plan.value("precision")), "fp32")
    changed: dict[str, Any] = {
        "weights_dtype": dtype,
        "layers": None,
        "fp8": None,
        "distributed.strategy": str(Strategy.SINGLE),
        "world_size": 1,
        "processes_per_node": 1,
    }
    if plan.value("attention") == Attention.FLEX:  # made for the masks of packed samples
        changed["attention"] = str(Attention.SDPA)
    reasons = {key: Decision(value, Origin.DERIVED, "to generate text") for key, value in changed.items()}
    return replace(plan, values=dict(plan.values) | reasons, deepspeed=None)
