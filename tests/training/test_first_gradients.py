"""The gradients of a measured attempt, in each engine and for adapters: whole, unscaled, before clipping.

A rank's share, a rank's own gradient, a clipped or a scaled one has another norm than the engine reports.
"""

import json
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import pytest

from mpt.hardware.specs import parse_machine
from mpt.measuring.comparison import Comparison, Gradient, side_of
from mpt.measuring.reference import plan_reference
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import Plan, resolve
from mpt.running.measured import Measure, ask_to_measure, gradients_file
from mpt.running.metrics import read_rows
from mpt.running.run_directory import RunDirectory, write_atomically
from mpt.terms import Precision
from tests.training.forks import fork_server
from tests.training.test_distributed import NEEDS_FP16, has_fp16_engine
from tests.training.tiny_runs import FP16, save_base, tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # trainings; on a busy machine they take their time
STEPS = 3
# A gradient of norm 0.8 is clipped to this: what is compared must not be.
CLIPPED = {"max_steps": STEPS, "max_grad_norm": 0.1, "save_strategy": "no"}
ADAPTERS = {"model": {"name_or_path": "base", "config": None}, "tokenizer": None, "lora": {"rank": 4}}


def by_two(strategy: str) -> dict[str, Any]:
    return {"distributed": {"strategy": strategy, "processes_per_node": 2}, "micro_batch_size": 4}


@dataclass(frozen=True)
class Case:
    """A recipe beside its reference in fp32, and how near they must be."""

    precision: Any
    keys: dict[str, Any]
    cosine: float = 0.999
    gap: float = 1e-3


CASES = {
    "bf16, one process": Case("bf16", {}),
    "bf16, ddp": Case("bf16", by_two("ddp")),
    "bf16, zero3": Case("bf16", by_two("zero3")),
    "bf16, adapters": Case("bf16", ADAPTERS),
    # e4m3 keeps 4 bits of an activation, e5m2 3 of a gradient.
    "fp8, one process": Case(
        {"mode": "fp8", "allow_emulation": True, "fp8": {"keep_first": 0, "keep_last": 0}}, {}, cosine=0.97, gap=1e-2
    ),
    "fp16, zero2": Case(FP16 | {"loss_scale": {"initial": 1024.0}}, by_two("zero2")),
}
NAMES = [pytest.param(name, marks=NEEDS_FP16) if name == "fp16, zero2" else name for name in CASES]
Measured = dict[str, tuple[Plan, Comparison, tuple[RunDirectory, RunDirectory]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Measure every case that runs here, in its precision and in fp32."""
    folder = tmp_path_factory.mktemp("measured")
    base = save_base(folder / "base")
    text = folder / "reference.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")
    plans: dict[str, tuple[Plan, Plan]] = {}
    for name, case in CASES.items():
        if name != "fp16, zero2" or has_fp16_engine():
            keys = case.keys | ({"model": {"name_or_path": base, "config": None}} if "lora" in case.keys else {})
            plans[name] = pair_of(str(text), precision=case.precision, **keys)
    for number, pair in enumerate(plans.values()):
        for role, plan in zip(("candidate", "reference"), pair, strict=True):
            run = RunDirectory(folder / f"{number}-{role}")
            run.checkpoints.mkdir(parents=True)
            write_atomically(run.attempt(1).plan, json.dumps(plan.to_json()))
            ask_to_measure(run.attempt(1), Measure(STEPS, keeps_gradients=True))
            log = run.attempt(1).log
            forked = fork_server().start(["worker", str(run.path), "1"], log, plan.value("world_size"))
            assert forked.wait(timeout=400) == 80, log.read_text()[-6000:]
    found: Measured = {}
    for number, (name, pair) in enumerate(plans.items()):
        runs = RunDirectory(folder / f"{number}-candidate"), RunDirectory(folder / f"{number}-reference")
        words = [str(plan.value("precision")) for plan in pair]
        sides = [side_of(word, read_rows(run), None) for word, run in zip(words, runs, strict=True)]
        gradient = gradient_of(*runs)
        found[name] = pair[0], Comparison(STEPS, sides[0], sides[1], gradient, {}), runs
    return found


def gradient_of(*runs: RunDirectory) -> Gradient:
    """Compare two runs' gradients here; that a child does it for `mpt train` is tested with the command."""
    from mpt.training.compare_gradients import compare_gradients

    candidate, reference = (gradients_file(run.attempt(1)) for run in runs)
    return Gradient.from_json(compare_gradients(candidate, reference))


def pair_of(source: str, **keys: Any) -> tuple[Plan, Plan]:
    """Plan a recipe and its reference."""
    data = {"source": source, "eval_fraction": 0}
    recipe = tiny_recipe(data=data, training=CLIPPED, compare={"to": "fp32", "steps": STEPS}, **keys)
    plan = resolve(recipe, parse_machine("cpu"), learn_model_facts(recipe), name="tiny", modules=learn_modules(recipe))
    reference = plan_reference(plan, None)
    assert reference is not None
    return plan, reference


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_compared_has_the_norm_that_the_engine_reports(name: str, measured: Measured) -> None:
    _, comparison, runs = measured[name]
    for norm, run in zip(comparison.gradient.norms, runs, strict=True):
        reported = read_rows(run)[1]["grad_norm"]
        assert reported > CLIPPED["max_grad_norm"]
        assert norm == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_each_engine_and_precision_stays_near_its_reference_and_is_not_it(name: str, measured: Measured) -> None:
    plan, comparison, _ = measured[name]
    case = CASES[name]
    assert plan.value("precision") in (Precision.BF16, Precision.FP8, Precision.FP16)
    assert len(comparison.candidate.losses) == len(comparison.reference.losses) == STEPS
    assert comparison.max_gap is not None and 0 < comparison.max_gap < case.gap
    assert comparison.gradient.cosine is not None and case.cosine < comparison.gradient.cosine < 1
    assert comparison.gradient.unmatched == 0
    if "lora" in case.keys:
        assert comparison.gradient.parameters == 2 * 14  # two matrices a linear layer, and no frozen weight


@pytest.mark.parametrize("name", ["bf16, ddp", "bf16, zero3"])
def test_what_two_processes_put_together_is_the_gradient_of_one(name: str, measured: Measured) -> None:
    """In fp32, on the same global batch: the order of sums is all that differs."""
    gradient = gradient_of(measured[name][2][1], measured["bf16, one process"][2][1])
    assert gradient.cosine is not None and gradient.cosine > 1 - 1e-9
    assert gradient.norms[0] == pytest.approx(gradient.norms[1], rel=1e-5)
    assert gradient.unmatched == 0
