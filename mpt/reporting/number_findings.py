"""What a run's numbers, and what recovery did about them, say about its recipe. Pure.

Each function finds something or nothing; `mpt.reporting.advice` has them in order. Where a rule knows no value it names
no key: what is unknown is not guessed.
"""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from mpt.planning.plan import Plan
from mpt.planning.repair import Repair
from mpt.reporting.evidence import Evidence
from mpt.reporting.finding import Finding, times
from mpt.reporting.story import Story, is_same_place
from mpt.running.ladder import SAME_POSITION
from mpt.terms import Feature, Precision

# Clips that call for a change: one or two are what clipping is for.
MANY_CLIPS = 3
# As `mpt.training.skip_rate` alarms: after the scale has settled, one overflow in hundreds of steps is usual.
MANY_SKIPS = 0.10
# Fewer steps than this say nothing about a rate: the first scale may come down in 17 of them.
MIN_SCALED_STEPS = 100
# Above it AdamW moves every weight by its own size within a few steps, whatever the model.
HIGHEST_SANE_RATE = 1e-2
USUAL_RATE = 5e-5  # transformers' default


def settled(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """What recovery changed and the run went on with belongs into the recipe: the next run need not fail to find it."""
    plan = evidence.newest_plan
    if plan is None or not plan.repairs or story.outcome == "diverged":
        return
    how = "the run finished with" if story.outcome == "finished" else "the run goes on with"
    for kind, keys in _settled_keys(plan).items():
        if keys:
            reasons = tuple(
                f"after attempt {change.after_attempt}: {change.reason}"
                for change in story.changes
                if change.kind == kind
            )
            told = {"learning_rate": "a lower learning rate", "precision": "another precision"}
            what = told.get(kind, "a smaller micro batch")
            yield Finding(f"{how} {what} than the recipe's", "Write what it settled at into the recipe.", reasons, keys)


def _settled_keys(plan: Plan) -> dict[str, dict[str, Any]]:
    """List, by kind of repair, the recipe's keys that would have led to this plan at once."""
    kinds = {Repair.from_json(repair).kind for repair in plan.repairs}
    found: dict[str, dict[str, Any]] = {}
    rate = plan.value("learning_rate")
    if "learning_rate" in kinds and plan.recipe.training_keys.get("learning_rate") != rate:
        found["learning_rate"] = {"training.learning_rate": rate}
    mode = plan.value("precision")
    if "precision" in kinds and plan.recipe.precision.asked_mode != mode:
        found["precision"] = {"precision": mode}
    if "micro_batch" in kinds:
        found["micro_batch"] = _batch_keys(plan)
    return found


def _batch_keys(plan: Plan) -> dict[str, Any]:
    """Spell a plan's batch in the words that its recipe has for it, so that the global batch stays."""
    recipe = plan.recipe
    training = recipe.training_keys
    micro, steps = plan.value("micro_batch_size"), plan.value("gradient_accumulation_steps")
    by_trainer = "per_device_train_batch_size" in training
    keys = {"training.per_device_train_batch_size" if by_trainer else "micro_batch_size": micro}
    if "gradient_accumulation_steps" in training:
        keys["training.gradient_accumulation_steps"] = steps
    elif recipe.gradient_accumulation_steps is not None:
        keys["gradient_accumulation_steps"] = steps
    elif recipe.global_batch_size is None:
        keys["global_batch_size"] = plan.value("global_batch_size")
    return keys


def transient(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """An event that did not come again when the same steps were made unchanged is a fault of the machine."""
    for event in evidence.events:
        if event["kind"] != "plan_changed" or event["repair"].get("kind") != "retry":
            continue
        values = event["repair"].get("values", {})
        code, onset = values.get("code"), int(values.get("onset", 0))
        after = int(event["attempt"])
        again = [
            other
            for other in evidence.events
            if other["kind"] == "diverged" and other["attempt"] > after and other.get("code") == code
            if abs(int(other.get("onset", other["step"])) - onset) <= SAME_POSITION
        ]
        passed = [row for row in evidence.rows if row["attempt"] > after and row["step"] > onset + SAME_POSITION]
        if not again and passed:
            yield Finding(
                f"{code} at step {onset} did not come again when the same steps were made unchanged",
                "Nothing in the recipe made it. If that happens again, suspect the machine: its memory, its GPU, its "
                "heat.",
                (f"attempt {after} ended with it, and attempt {passed[0]['attempt']} passed step {onset}",),
            )


def excluded(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """Data on which the numbers went bad twice are left out for good; whoever made them may want to mend them."""
    for event in evidence.events:
        if event["kind"] != "plan_changed" or event["repair"].get("kind") != "exclude_data":
            continue
        values, after = event["repair"]["values"], int(event["attempt"])
        seen = [f"after attempt {after}: {event['reason']}"]
        seen += [
            f"incidents/{other['incident']}: {other['cause']}"
            for other in evidence.events
            if other["kind"] == "autopsy" and int(other["attempt"]) == after
        ]
        yield Finding(
            f"{values['last'] - values['first']} samples are left out: {values['code']} came at them twice",
            "Look at the samples that the incident's autopsy.json lists: broken or odd ones belong out of the data.",
            tuple(seen),
        )


def diverged(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """The numbers went bad for good: by code and precision, what is most likely to help."""
    plan = evidence.newest_plan
    words = [event for event in evidence.events if event["kind"] == "diverged"]
    if story.outcome != "diverged" or not words or plan is None:
        return
    last = words[-1]
    code = str(last.get("code"))
    onset = int(last.get("onset", last["step"]))
    seen = [
        f"{_in_words(event)} (attempt {event['attempt']}, {_settings(evidence, event['attempt'])})" for event in words
    ]
    onsets = [int(event.get("onset", event["step"])) for event in words if event.get("code") == code]
    if min(onsets) > SAME_POSITION and is_same_place(onsets, SAME_POSITION):  # the very start is no place in the data
        seen.append("it came at the same place each time: the samples of that step may be broken, empty or odd")
    problem, remedy, recipe = _against(code, onset, plan)
    yield Finding(problem, remedy, tuple(seen), recipe)


def _against(code: str, onset: int, plan: Plan) -> tuple[str, str, dict[str, Any]]:
    """Choose what to write against an event that no rung helped: (problem, remedy, keys)."""
    precision = Precision(plan.value("precision"))
    if precision is Precision.FP16 and code in ("N1", "N2", "N3"):
        wider = _wider_than_fp16(plan)
        return (
            f"{code}: the model leaves the range of fp16, which ends at 65504",
            f"Compute in {wider}, whose range is fp32's; or keep the layers that overflow in fp32 through "
            "precision.layers.",
            {"precision": wider},
        )
    if code == "N4" and onset <= 1:
        return (
            "N4: the weights were not finite before the first step",
            "Begin from other weights: model.name_or_path or model.revision. No learning rate mends these.",
            {},
        )
    if code == "N7":
        return (
            "N7: no update was applied",
            "See in the numbers above what left the updates out; without such a line it is a bug of ours or below.",
            {},
        )
    recipe = _calmer(plan)
    lead = "the model learnt nothing any more" if code == "dead" else f"{code}, and no rung of recovery helped"
    return (
        lead,
        "Lower the learning rate and warm it up for longer"
        + ("; a precision with more range comes after that." if precision is not Precision.FP32 else "."),
        recipe,
    )


def _calmer(plan: Plan) -> dict[str, Any]:
    """Half the lowest rate that was tried, a longer warm-up, and clipping where there is none."""
    training = plan.recipe.training_keys
    rate = float(plan.value("learning_rate"))
    recipe: dict[str, Any] = {"training.learning_rate": rate / 2 if rate <= HIGHEST_SANE_RATE else USUAL_RATE}
    if _longer_warm_up(plan) != training.get("warmup_steps"):
        recipe["training.warmup_steps"] = _longer_warm_up(plan)
    if training.get("max_grad_norm") == 0:
        recipe["training.max_grad_norm"] = 1.0
    return recipe


def _longer_warm_up(plan: Plan) -> int:
    """Twice the warm-up that the recipe asks for, up to half the steps; without one, a tenth of them, 100 at most."""
    asked = plan.recipe.training_keys.get("warmup_steps") or 0
    steps = plan.value("max_steps")
    if asked and asked < 1:  # transformers 5: a share of the steps
        asked = asked * (steps or 1000)
    if not asked:
        return max(1, min(100, (steps or 1000) // 10))
    twice = round(2 * asked)
    return twice if steps is None else max(round(asked), min(twice, steps // 2), 1)


def _wider_than_fp16(plan: Plan) -> str:
    return Precision.BF16.value if plan.machine.all_compute(Feature.BF16) else Precision.FP32.value


def _in_words(event: Mapping[str, Any]) -> str:
    return f"{event.get('code')} at step {event.get('onset', event['step'])}: {event.get('reason', 'no reason given')}"


def _settings(evidence: Evidence, attempt: int) -> str:
    plan = evidence.plans.get(attempt)
    if plan is None:
        return "its plan is not there"
    return f"{plan.value('precision')}, learning rate {plan.value('learning_rate'):g}"


def overflows(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """fp16 that overflows too often throws that share of the work away."""
    plan, scaling = evidence.newest_plan, story.scaling
    if plan is None or scaling is None or story.outcome == "diverged" or plan.value("precision") != Precision.FP16:
        return
    alarmed = [event for event in evidence.events if event["kind"] == "alarm" and event.get("what") == "skip_rate"]
    if not alarmed and (scaling.share <= MANY_SKIPS or scaling.steps < MIN_SCALED_STEPS):
        return
    wider = _wider_than_fp16(plan)
    yield Finding(
        f"fp16 skipped {scaling.skipped} of {scaling.steps} steps by overflow ({scaling.share:.0%})",
        f"Compute in {wider}; else lower the learning rate, or set fp32 for those layers in precision.layers.",
        tuple(f"step {event.get('step')}: the run gave an alarm" for event in alarmed),
        {"precision": wider},
    )


def left_out(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """Single updates that were left out cost nothing but themselves; they say where to look."""
    if story.outcome == "diverged":
        return
    for code in ("N2", "N3"):
        seen = story.seen(code)
        if seen is not None and seen.actions.get("skip") and not seen.actions.get("roll_back"):
            yield Finding(
                f"{code}: {times(seen.actions['skip'])} {seen.meaning}, and the update was left out",
                f"The weights are sound. Look at the samples of {_steps(seen.first_step, seen.last_step)}; if there "
                "are more such steps, lower training.learning_rate.",
                (seen.last_reason,),
            )


def spikes(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """Clips again and again: the threshold of the usual clipping is too high, or the rate rises too fast.

    Those under a learning rate that recovery has given up are what that rate did.
    """
    plan = evidence.newest_plan
    since = max((change.after_attempt for change in story.changes if change.kind == "learning_rate"), default=0)
    clips = [
        event
        for event in evidence.events
        if event["kind"] == "health" and event["code"] == "N5" and event["attempt"] > since
    ]
    if plan is None or story.outcome == "diverged" or len(clips) < MANY_CLIPS:
        return
    steps = sorted(int(event["step"]) for event in clips)
    rows = [row for row in evidence.rows if row["attempt"] > since]
    norms = [row["grad_norm"] for row in rows if isinstance(row.get("grad_norm"), (int, float))]
    usual = statistics.median(norms) if norms else None
    limit = plan.recipe.training_keys.get("max_grad_norm", 1.0)  # transformers' default
    recipe: dict[str, Any] = {}
    evidence_lines = [f"{times(len(clips))} at {_steps(steps[0], steps[-1])}; the last: {clips[-1].get('reason', '')}"]
    if usual is not None:
        evidence_lines.append(f"the median of the gradient norm is {usual:.2g}, and training.max_grad_norm {limit:g}")
        if usual > 0 and (limit == 0 or limit > 2 * usual):
            recipe["training.max_grad_norm"] = float(f"{1.5 * usual:.2g}")
    if plan.value("max_steps") is None or steps[0] <= plan.value("max_steps") // 5:
        recipe["training.warmup_steps"] = max(_longer_warm_up(plan), steps[0])
    if not recipe:
        recipe["training.learning_rate"] = float(plan.value("learning_rate")) / 2
    yield Finding(
        "N5: the gradient norm spiked again and again, and was clipped",
        "Clip nearer to the usual norm, and let the learning rate rise more slowly."
        if "training.learning_rate" not in recipe
        else "Lower the learning rate: the usual norm is clipped already.",
        tuple(evidence_lines),
        recipe,
    )


def loss_spikes(evidence: Evidence, story: Story) -> Iterable[Finding]:
    """A loss that rose and came back by itself."""
    plan, seen = evidence.newest_plan, story.seen("N6")
    if plan is None or seen is None or story.outcome == "diverged" or seen.actions.get("roll_back"):
        return
    yield Finding(
        "N6: the loss rose far above its last values, and came back by itself",
        "One such rise needs nothing. Where there are more, warm up for longer or lower the learning rate.",
        (f"{times(seen.count)} at {_steps(seen.first_step, seen.last_step)}; the last: {seen.last_reason}",),
        {"training.warmup_steps": _longer_warm_up(plan)} if seen.count >= MANY_CLIPS else {},
    )


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"
