"""Findings that follow from the plan alone. Pure."""

from collections.abc import Iterator

from mpt.errors import MptError
from mpt.planning.checklist.matrices import mending_keys, multiple_for, odd_sizes
from mpt.planning.checks.finding import Finding, Severity
from mpt.planning.checks.learning_rates import usual_rates
from mpt.planning.engines import check_trainable, without_engine
from mpt.planning.explain import count
from mpt.planning.plan import Plan
from mpt.planning.sharding import TOKENS_ENOUGH
from mpt.planning.speed import has_tensor_cores
from mpt.terms import Check, Feature, Method, Precision


def trainable(plan: Plan) -> Iterator[Finding]:
    """Say what `mpt train` would refuse of a plan."""
    try:
        check_trainable(plan)
    except MptError as error:
        code = Check.NO_ENGINE if without_engine(plan) else Check.DOES_NOT_FIT
        yield Finding(code, Severity.ERROR, error.problem, error.remedy)


def refused(error: MptError) -> Finding:
    """Say what `mpt plan` would refuse."""
    return Finding(Check.PLAN_REFUSED, Severity.ERROR, error.problem, error.remedy)


def learning_rate(plan: Plan) -> Iterator[Finding]:
    """A rate that is far from all that is reported for the method and the size."""
    decision, facts = plan.values["learning_rate"], plan.facts
    method = Method(plan.value("method"))
    usual = usual_rates(
        method,
        plan.recipe.model_task,
        facts.parameters,
        str(plan.value("optimizer")),
        is_from_scratch=plan.recipe.model.config is not None,
    )
    if usual is None or not usual.is_far(float(decision.value)):
        return
    rate = float(decision.value)
    if rate == 0:
        far = "far below"
    else:
        far = f"{rate / usual.high:.0f} times above" if rate > usual.high else f"{usual.low / rate:.0f} times below"
    what = (
        "the loss may run away" if rate > usual.high else "hardly anything is learnt" if rate else "nothing is learnt"
    )
    yield Finding(
        Check.LEARNING_RATE,
        Severity.WARNING,
        f"the learning rate {rate:g} ({decision.reason}) is {far} what is reported for {_trained(plan)}: {what}",
        f"Begin with {usual.first:.1g}.",
        (f"reported: {usual.low:.1g} to {usual.high:.1g}, {usual.source}",),
        {"training.learning_rate": float(f"{usual.first:.1g}")},
    )


def _trained(plan: Plan) -> str:
    size = f"of a model of {count(plan.facts.parameters)} parameters"
    if plan.recipe.model.config is not None:
        return f"training from scratch {size}"
    return f"{'full fine-tuning' if plan.value('method') == Method.FULL else 'adapters'} {size}"


def positions(plan: Plan) -> Iterator[Finding]:
    """A length that the model cuts shorter than mpt's own default."""
    limit, decision = plan.facts.max_positions, plan.values["sequence_length"]
    if limit is not None and decision.origin == "derived" and decision.value == limit:
        yield Finding(
            Check.POSITIONS,
            Severity.NOTE,
            f"samples are {limit} tokens long, because the model has no more positions",
            "Nothing, or a model with more positions.",
        )


def dimensions(plan: Plan) -> Iterator[Finding]:
    """Sizes that keep the matrix units below their best."""
    mode, machine = Precision(plan.value("precision")), plan.machine
    has_units = has_tensor_cores(machine) and machine.all_compute(Feature.FP16_TENSOR_CORES)
    if not has_units or mode is Precision.FP32:
        return
    multiple = multiple_for(mode)
    odd = dict(odd_sizes(plan, multiple))
    if not odd:
        return
    said = ", ".join(f"{name} {size}" for name, size in odd.items())
    keys = mending_keys(plan, odd, multiple)
    yield Finding(
        Check.DIMENSIONS,
        Severity.WARNING if keys else Severity.NOTE,
        f"{said}: no multiple of {multiple}, at which the tensor cores are fastest",
        "Round them up." if keys else "Nothing: a checkpoint's sizes are what they are.",
        recipe=keys,
    )


def small_pass(plan: Plan) -> Iterator[Finding]:
    """Passes too small to keep the matrix units busy."""
    micro, length = plan.value("micro_batch_size"), plan.value("sequence_length")
    if not has_tensor_cores(plan.machine) or micro * length >= TOKENS_ENOUGH:
        return
    yield Finding(
        Check.SMALL_PASS,
        Severity.NOTE,
        f"a pass holds {micro} samples of {length} tokens, below {TOKENS_ENOUGH} tokens: the matrix units idle",
        "A larger batch, where the learning allows it: `mpt doctor RECIPE` says what would fit.",
    )
