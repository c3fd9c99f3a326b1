"""What to try next where a run's numbers went bad for good: one rung a time, each a recorded change of plan. Pure.

The rungs, in the recipe's order: go back and train on unchanged (a fault of the machine will not come again); leave out
the data at the event; lower the learning rate, twice at most; compute in a precision with more range. Some events leave
but one way: a loss scale that can give no more room, and an overflow in fp16's forward pass, where no scale helps, call
for another precision at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpt.hardware.machine import Machine
from mpt.planning.data_window import Epoch, position_of, window_around
from mpt.planning.plan import Plan
from mpt.planning.repair import Repair
from mpt.recipe.schema import RecoverySection
from mpt.terms import Feature, Precision

# Onsets this many steps apart are one position: the data order is the same, and a window needs some steps to judge.
SAME_POSITION = 8
MAX_LOWERINGS = 2
MAX_WINDOWS = 3
# Events that a batch can bring about.
OF_THE_DATA = ("N2", "N3", "N6")
# What the last word of a slow climb of the loss is about (`mpt.training.drift`): many batches have made it.
LEVEL = "loss level"
# Another learning rate changes nothing about them.
FORMAT_ALONE = ("N1",)
STRONGER: dict[Precision, tuple[Precision, ...]] = {
    Precision.MXFP8: (Precision.BF16, Precision.FP32),
    Precision.FP8: (Precision.BF16, Precision.FP32),
    Precision.FP16: (Precision.BF16, Precision.FP32),
    Precision.BF16_PURE: (Precision.BF16, Precision.FP32),
    Precision.BF16: (Precision.FP32,),
    Precision.TF32: (Precision.FP32,),
}


@dataclass(frozen=True, slots=True)
class Rung:
    """A repair, and the words for it."""

    repair: Repair
    reason: str


def next_rung(
    word: Mapping[str, Any],
    repairs: Sequence[Repair],
    plan: Plan,
    policy: RecoverySection,
    epoch: Epoch | None = None,
) -> Rung | None:
    """Choose the rung after an attempt that ended with the last word `diverged`; None where none is left.

    `repairs` are those of the run so far, `plan` the one that the attempt carried out. `epoch` is the length of a pass
    over the data, None where the data are streamed: no window of them can be left out then.
    """
    for name in policy.rungs:
        if name != "raise_precision" and _is_of_the_format(word, plan):
            continue
        if name == "exclude_data":
            rung = None if epoch is None else _exclude_data(word, repairs, plan, policy, epoch)
        else:
            rung = CHOICES[name](word, repairs, plan, policy)
        if rung is not None:
            return rung
    return None


def tried(repairs: Sequence[Repair]) -> str:
    """Say what was tried, for the diagnosis of a run that is given up.

    >>> tried([Repair("retry", {"code": "N2", "onset": 8}), Repair("learning_rate", {"learning_rate": 5e-4})])
    'trained again unchanged, learning rate 0.0005'
    """
    said = []
    for repair in repairs:
        if repair.kind == "retry":
            said.append("trained again unchanged")
        elif repair.kind == "exclude_data":
            said.append(f"without {repair.values['last'] - repair.values['first']} samples")
        elif repair.kind == "learning_rate":
            said.append(f"learning rate {repair.values['learning_rate']:g}")
        elif repair.kind == "precision":
            said.append(f"precision {repair.values['mode']}")
    return ", ".join(said) or "nothing"


def _is_of_the_format(word: Mapping[str, Any], plan: Plan) -> bool:
    is_fp16 = plan.value("precision") == Precision.FP16
    return word["code"] in FORMAT_ALONE or (is_fp16 and word["code"] == "N2")


def _retry(word: Mapping[str, Any], repairs: Sequence[Repair], plan: Plan, policy: RecoverySection) -> Rung | None:
    """Once for an event at a position: whether it comes again tells a fault of the machine from one of the run."""
    code, onset = word["code"], int(word["onset"])
    before = [repair.values for repair in repairs if repair.kind == "retry" and repair.values["code"] == code]
    if any(abs(values["onset"] - onset) <= SAME_POSITION for values in before):
        return None
    reason = f"{code} at step {onset}: once more without a change, to tell whether it comes again"
    return Rung(Repair("retry", {"code": code, "onset": onset}), reason)


def _exclude_data(
    word: Mapping[str, Any], repairs: Sequence[Repair], plan: Plan, policy: RecoverySection, epoch: Epoch
) -> Rung | None:
    """Leave out a window around the event's first step, unless the one before has not helped: what comes again within
    it, or soon after it, is not of the data. Nor is a loss that rises from the first steps on, or over many."""
    code, onset = word["code"], int(word["onset"])
    if code not in OF_THE_DATA or word.get("what") == LEVEL or (code == "N6" and onset <= SAME_POSITION):
        return None
    before = [repair.values for repair in repairs if repair.kind == "exclude_data"]
    if len(before) >= MAX_WINDOWS or any(onset <= values["until"] + policy.margin for values in before):
        return None
    size = plan.value("global_batch_size")
    window = window_around(onset, epoch, size, policy.exclude_batches)
    gone = sum(values["last"] - values["first"] for values in before)
    if window is None or gone + window.last - window.first > epoch.samples // 2:
        return None
    until = onset + math.ceil((window.last - position_of(onset, epoch, size)[1]) / size)
    values = {"code": code, "onset": onset, "until": until, **asdict(window)}
    reason = (
        f"{code} at step {onset} again: the {window.last - window.first} samples around it are left out from now on "
        f"(positions {window.first} to {window.last - 1} of epoch {window.epoch})"
    )
    return Rung(Repair("exclude_data", values), reason)


def _lower_learning_rate(
    word: Mapping[str, Any], repairs: Sequence[Repair], plan: Plan, policy: RecoverySection
) -> Rung | None:
    if sum(repair.kind == "learning_rate" for repair in repairs) >= MAX_LOWERINGS:
        return None
    rate = float(f"{float(plan.value('learning_rate')) * policy.learning_rate_factor:.6g}")  # a number for a recipe
    reason = f"{word['code']} at step {word['onset']} again: the learning rate is lowered to {rate:g}"
    return Rung(Repair("learning_rate", {"learning_rate": rate, "warmup_steps": policy.rewarm_steps}), reason)


def _raise_precision(
    word: Mapping[str, Any], repairs: Sequence[Repair], plan: Plan, policy: RecoverySection
) -> Rung | None:
    present = Precision(plan.value("precision"))
    for wanted in STRONGER.get(present, ()):
        if _computes(plan.machine, wanted):
            reason = f"{word['code']} at step {word['onset']} in {present}: on in {wanted}"
            return Rung(Repair("precision", {"mode": wanted.value}), reason)
    return None


CHOICES = {"retry": _retry, "lower_learning_rate": _lower_learning_rate, "raise_precision": _raise_precision}


def _computes(machine: Machine, precision: Precision) -> bool:
    return precision is Precision.FP32 or machine.all_compute(Feature(precision))
