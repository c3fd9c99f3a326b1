"""Find the cheapest precision for each layer that leaves the loss where it is: measure, choose, verify.

The measuring is a child process's (`mpt.training.sensitivity`), the choice `mpt.measuring.precision_policy`'s. What is
found is a recipe, and planning it again gives exactly what was found. Called by the command `mpt search-precision`.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Machine
from mpt.measuring.layer_cost import layer_flops, reckon_costs
from mpt.measuring.precision_block import BASE, to_section, with_section
from mpt.measuring.precision_policy import (
    CHANNEL_QUANTILE,
    WIDEST_FIRST,
    Evidence,
    LayerEvidence,
    Measured,
    Policy,
    all_widest,
    change_size,
    choose_policy,
    predicted_change,
    raise_worst,
    raised_alone,
    widest_first,
    with_changes,
)
from mpt.measuring.sensitivity_child import Child
from mpt.planning.attention_support import is_flash
from mpt.planning.float8 import TORCHAO_INSTALL, TORCHAO_RECIPES, choose_float8_layers
from mpt.planning.float8_engine import RULED
from mpt.planning.model_facts import ModelFacts
from mpt.planning.modules import MATMULS, ModuleShape
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import Float8Section, Recipe
from mpt.terms import Feature, Precision

SEARCHED_MODES = ("auto", Precision.FP32, Precision.BF16, Precision.FP8)
NEEDED_PACKAGES = frozenset({"torch", "transformers", "accelerate", "datasets"})
RAISES = 4  # verifications that may fail before every layer goes back to the widest candidate


@dataclass(frozen=True, slots=True)
class Subject:
    """What is searched: a recipe, its model, the machine that is to train it, and the one that measures.

    `is_named`: the target was given by name, so that its speed is known from the hardware table alone. `packages`: the
    installed ones; those of a named machine nobody knows.
    """

    name: str
    recipe: Recipe
    facts: ModelFacts
    modules: tuple[ModuleShape, ...]
    target: Machine
    here: Machine
    is_named: bool
    packages: frozenset[str]

    @property
    def matmuls(self) -> list[ModuleShape]:
        return [module for module in self.modules if module.kind in MATMULS]

    @property
    def is_frozen(self) -> bool:
        """Whether only adapters are trained: then the layers' own weight gradients are never computed."""
        return self.recipe.lora is not None

    @property
    def float8(self) -> Float8Section:
        return self.recipe.precision.fp8 or Float8Section()

    @property
    def probed_recipe(self) -> str:
        """The scaling of fp8 that is measured: torchao's of that name, and tensorwise for one that torchao lacks."""
        recipe = self.float8.recipe
        return recipe if recipe in TORCHAO_RECIPES else "tensorwise"

    def plan(self, recipe: Recipe) -> Plan:
        """Plan a variant of the recipe for the target."""
        packages = None if self.is_named else self.packages
        return resolve(recipe, self.target, self.facts, name=self.name, packages=packages, modules=self.modules)

    def plan_here(self, recipe: Recipe) -> Plan:
        """Plan a variant of the recipe for one device of the machine that measures."""
        device = replace(self.here, devices=self.here.devices[:1], nodes=1)
        return resolve(recipe, device, self.facts, name=self.name, packages=self.packages, modules=self.modules)


@dataclass(frozen=True, slots=True)
class Verified:
    """What a policy really did, installed in the model: one round of verification. `loss_changes` is by batch."""

    loss_changes: tuple[float, ...]
    gradient_cosine: float
    gradient_sqnr_db: float

    @property
    def loss_change(self) -> float:
        """The size of the change, the quantity that is predicted; inf where a loss is not finite."""
        return change_size(self.loss_changes)

    @property
    def mean_change(self) -> float:
        """The signed mean, for the reader: whether the loss rose. Chance makes it small, so nothing is judged by it."""
        return math.fsum(self.loss_changes) / len(self.loss_changes)


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a search. `verified` is None where nothing was lowered, `failed` what earlier policies did.

    `cost_sources`: by format where the times come from (`mpt.measuring.layer_cost.SOURCES`).
    """

    recipe: Recipe
    section: Mapping[str, Any]
    candidates: tuple[str, ...]
    evidence: Evidence
    policy: Policy
    verified: Verified | None
    failed: tuple[Verified, ...]
    cost_sources: Mapping[str, str]
    batches: int
    tokens: int
    notes: tuple[str, ...]


def check_wish(candidates: Sequence[str] | None, tolerance: float, batches: int) -> None:
    """Raise MptError for arguments that mean nothing."""
    if not (0 < tolerance < math.inf):
        raise MptError(
            f"--tolerance is {tolerance:g}, and must be above 0",
            remedy="It is a share of the loss: 0.01 lets the loss move by 1 %.",
        )
    if batches < 1:
        raise MptError(f"--batches is {batches}", remedy="Give 1 or more; the default is 8.")
    unknown = sorted(set(candidates or ()) - set(WIDEST_FIRST))
    if unknown:
        raise MptError(
            f"--candidates: {', '.join(unknown)} can't be searched", remedy=f"Choose among {', '.join(WIDEST_FIRST)}."
        )
    if candidates is not None and len(set(candidates)) < 2:
        raise MptError("--candidates names one format, and there is nothing to choose", remedy="Name two or three.")


def check_recipe(recipe: Recipe) -> None:
    """Raise MptError for a recipe whose layers can't be searched."""
    mode = recipe.precision.asked_mode or "auto"
    if mode not in SEARCHED_MODES:
        raise MptError(
            f"precision {mode} was asked for, and what search-precision finds is a precision of mode bf16 or fp32",
            remedy="Search with precision=bf16 behind the recipe's name.",
        )
    if recipe.quantization is not None:
        raise MptError(
            "the recipe quantises the frozen weights, which fixes their format",
            remedy="Remove the quantization block to search.",
        )


def check_packages(packages: frozenset[str]) -> None:
    """Raise UnsupportedError where the model can't be run here."""
    missing = sorted(NEEDED_PACKAGES - packages)
    if missing:
        raise UnsupportedError(
            f"search-precision runs the model, and {', '.join(missing)} is not installed",
            remedy="pip install 'mpt[train]'",
        )


def choose_candidates(subject: Subject, asked: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose which formats to try, widest first; and say which were left out, and why.

    Raises what planning says of an asked one that the target can't compute, UnsupportedError where nothing is left.
    """
    taken, notes = [], []
    for candidate in widest_first(WIDEST_FIRST if asked is None else asked):
        try:
            _try_candidate(subject, candidate)
        except UnsupportedError as error:
            if asked is not None:
                remedy = f"{error.remedy} Or leave {candidate} out of --candidates."
                raise UnsupportedError(f"candidate {candidate}: {error.problem}", remedy=remedy) from error
            notes.append(f"{candidate} is left out: {error.problem}")
            continue
        taken.append(candidate)
    if len(taken) < 2:
        raise UnsupportedError(
            f"there is nothing to search on {subject.target.label}: {'; '.join(notes)}",
            remedy="Add precision.allow_emulation=true to try what would be emulated, or name a --machine.",
        )
    return tuple(taken), tuple(notes)


def search(
    subject: Subject,
    *,
    asked: Sequence[str] | None,
    tolerance: float,
    batches: int,
    say: Callable[[str], None],
    environ: Mapping[str, str],
) -> Found:
    """Measure every linear layer, choose precisions, verify them on the model, and raise layers until that holds.

    Raises MptError for wishes that can't be met, UnsupportedError where this machine can't measure.
    """
    check_wish(asked, tolerance, batches)
    check_recipe(subject.recipe)
    check_packages(subject.packages)
    candidates, notes = choose_candidates(subject, asked)
    barred = barred_layers(subject, candidates)
    reference = _reference_recipe(subject.recipe)
    plan = subject.plan_here(reference)
    _check_memory(plan, is_frozen=subject.is_frozen)
    with (
        tempfile.TemporaryDirectory(prefix="mpt-search-") as folder,
        Child(plan, Path(folder), say, environ) as child,
    ):
        answer = child.ask(ask="measure", batches=batches, **_measure_request(subject, candidates, barred))
        evidence, sources = to_evidence(subject, candidates, barred, answer)
        policy = choose_policy(evidence, tolerance, candidates)
        _check_within(policy, candidates)

        def installed(policy: Policy) -> Plan:
            plan = subject.plan_here(with_section(reference, _section_here(subject, policy)))
            _check_planned(plan, policy)
            return plan

        def verify(policy: Policy) -> Verified:
            say(f"verifying: {count_formats(policy)}")
            answer = child.ask(ask="verify", plan=installed(policy).to_json())
            return Verified(tuple(answer.pop("loss_changes")), **answer)

        def try_out(policy: Policy) -> tuple[float, ...]:
            return tuple(child.ask(ask="try", plan=installed(policy).to_json())["loss_changes"])

        policy, verified, failed = settle(evidence, policy, candidates, verify, try_out, say)
    section = to_section(policy.assignment, subject.modules, subject.recipe.precision)
    recipe = with_section(subject.recipe, section)
    _check_planned(subject.plan(recipe), policy)
    return Found(
        recipe=recipe,
        section=section,
        candidates=candidates,
        evidence=evidence,
        policy=policy,
        verified=verified,
        failed=failed,
        cost_sources=sources,
        batches=answer["batches"],
        tokens=answer["tokens"],
        notes=(*notes, *_remarks(subject, candidates), *answer["notices"]),
    )


def settle(
    evidence: Evidence,
    policy: Policy,
    candidates: Sequence[str],
    verify: Callable[[Policy], Verified],
    try_out: Callable[[Policy], tuple[float, ...]],
    say: Callable[[str], None],
) -> tuple[Policy, Verified | None, tuple[Verified, ...]]:
    """Verify, and raise the worst layers until the loss stays where it may be. What is judged is what was predicted:
    the change's root mean square over the batches.

    A policy that fails has refuted the predictions, so none of them tells which layer is to blame: `try_out` gives
    the loss's changes with each layer raised alone, and what a layer takes back is its own. After `RAISES` failures
    every layer is in the widest candidate. All in fp32 is the reference itself: there is nothing to verify.

    Gives the policy, its verification, and the failed ones before it. Raises MptError where even the widest candidate
    moves the loss too far.
    """
    failed: list[Verified] = []
    while set(policy.assignment.values()) != {"fp32"}:
        verified = verify(policy)
        gap = verified.loss_change
        if gap <= policy.budget:
            return policy, verified, tuple(failed)
        failed.append(verified)
        raised = None
        if len(failed) == 1 and math.isfinite(gap):
            alone = raised_alone(evidence, policy, candidates)
            say(f"the loss moved by {gap:.2g}, more than predicted: raising each of {len(alone)} layers alone")
            shares = {
                name: [whole - rest for whole, rest in zip(verified.loss_changes, try_out(without), strict=True)]
                for name, without in alone.items()
            }
            seen = with_changes(evidence, policy, shares)
            if predicted_change(seen, policy.choices) >= gap / 2:  # else it takes several to move it, and none is told
                evidence = seen
        if len(failed) < RAISES:
            factor = policy.budget / gap if math.isfinite(gap) else 0.25
            raised = raise_worst(evidence, policy, factor, candidates)
        widest = all_widest(evidence, policy, candidates)
        if raised is None and widest.assignment == policy.assignment:
            raise _too_far(f"{verified.loss_change:.2g}, verified", policy, candidates)
        policy = raised or widest
    return policy, None, tuple(failed)


def barred_layers(subject: Subject, candidates: Sequence[str]) -> dict[str, str]:
    """Name the layers that can't or shall not be fp8 whatever is measured, each with the reason."""
    if "fp8" not in candidates:
        return {}
    asked = subject.float8
    # The rule of size is for machines that can't be timed, and for hardware: emulation has no speed to lose.
    rules = subject.is_named and subject.target.all_compute(Feature.FP8) and subject.probed_recipe in RULED
    chosen = choose_float8_layers(
        subject.modules,
        recipe=subject.probed_recipe,
        keep_patterns=asked.keep_high_precision,
        # The first and last layers are kept by rule where nothing is measured. Here that is only done when asked.
        keep_first=asked.keep_first if "keep_first" in asked.model_fields_set else 0,
        keep_last=asked.keep_last if "keep_last" in asked.model_fields_set else 0,
        auto_filter=rules if asked.auto_filter is None else asked.auto_filter,
    )
    return {name: reason for name, (is_fp8, reason) in chosen.items() if not is_fp8}


def to_evidence(
    subject: Subject, candidates: Sequence[str], barred: Mapping[str, str], answer: Mapping[str, Any]
) -> tuple[Evidence, dict[str, str]]:
    """Read the child's answer; give the evidence, and by format where the costs come from.

    Raises MptError where the fp32 model's own loss is no number.
    """
    if not math.isfinite(answer["reference_loss"]):
        raise MptError(
            f"the model's own loss in fp32 is {answer['reference_loss']}",
            remedy="Mend the checkpoint or the data; there is nothing that a precision could be measured by.",
        )
    peaks = subject.target.devices[0].peak_tflops
    layers, sources = [], dict[str, str]()
    for module in subject.matmuls:
        seen = answer["layers"].get(module.name, {"rows": 0, "formats": {}, "seconds": {}})
        flops = layer_flops(seen["rows"], module.in_features, module.out_features, is_frozen=subject.is_frozen)
        costs, origins = reckon_costs(flops, seen["seconds"], peaks, candidates)
        sources |= origins if seen["rows"] else {}
        measured = {
            kind: Measured(entry["energy_db"], entry["channel_db"], tuple(entry["loss_changes"]), entry["underflow"])
            for kind, entry in seen["formats"].items()
        }
        bars = {"fp8": barred[module.name]} if module.name in barred else {}
        layers.append(LayerEvidence(module.name, measured, costs, bars))
    return Evidence(answer["reference_loss"], tuple(layers)), sources


def count_formats(policy: Policy) -> str:
    """Count a policy's layers by format, the narrowest first."""
    assigned = list(policy.assignment.values())
    return ", ".join(f"{assigned.count(kind)} in {kind}" for kind in reversed(WIDEST_FIRST) if kind in assigned)


def _try_candidate(subject: Subject, candidate: str) -> None:
    """Let planning say whether the target trains a layer in the format."""
    asked = subject.recipe.precision
    if candidate == "fp32":
        return
    layers: dict[str, str] = {}
    if candidate == "fp8":
        if "torchao" not in subject.packages:
            raise UnsupportedError(
                "fp8 is measured by torchao, which is not installed", remedy=f"Run {TORCHAO_INSTALL}."
            )
        barred = barred_layers(subject, ("fp8",))
        name = next((module.name for module in subject.matmuls if module.name not in barred), None)
        if name is None:
            first = next(iter(barred.items()), ("", "it has no linear layer"))
            raise UnsupportedError(
                f"not one layer of this model can be fp8 ({first[0]}: {first[1]})", remedy="Search without fp8."
            )
        layers = {name: "fp8"}
    assignment = {module.name: layers.get(module.name, BASE) for module in subject.matmuls}
    subject.plan(with_section(subject.recipe, to_section(assignment, subject.modules, asked)))


def _reference_recipe(recipe: Recipe) -> Recipe:
    """Give the recipe as it is measured: plain fp32 on one device, without adapters, optimizer or accumulation."""
    seeds = {key: value for key, value in recipe.training_keys.items() if key in ("seed", "data_seed")}
    return with_section(
        recipe,
        {"mode": "fp32"},
        distributed={"strategy": "single"},
        attention="sdpa" if is_flash(recipe.attention) else recipe.attention,  # flash knows 16 bits only
        micro_batch_size=recipe.asked_micro_batch_size,
        gradient_checkpointing=False,
        training=seeds,
        **dict.fromkeys(("offload", "lora", "global_batch_size", "gradient_accumulation_steps", "sample")),
    )


def _measure_request(subject: Subject, candidates: Sequence[str], barred: Mapping[str, str]) -> dict[str, Any]:
    device = subject.here.devices[0]
    lower = [candidate for candidate in candidates if candidate != "fp32"]
    return {
        "is_frozen": subject.is_frozen,
        "channel_quantile": CHANNEL_QUANTILE,
        "layers": {
            module.name: [kind for kind in lower if kind != "fp8" or module.name not in barred]
            for module in subject.matmuls
        },
        "sizes": {module.name: [module.in_features, module.out_features] for module in subject.matmuls},
        "fp8": {"recipe": subject.probed_recipe, "emulated": not device.computes(Feature.FP8)},
        "timed": [] if subject.is_named else [kind for kind in candidates if device.computes(Feature(kind))],
    }


def _section_here(subject: Subject, policy: Policy) -> dict[str, Any]:
    """Write the policy as it is verified here: fp8 by torchao, and emulated where this machine must."""
    section = to_section(policy.assignment, subject.modules, subject.recipe.precision) | {"allow_emulation": True}
    if "fp8" in policy.assignment.values():
        section["fp8"] = {"backend": "torchao", "recipe": subject.probed_recipe}
    return section


def _check_planned(plan: Plan, policy: Policy) -> None:
    """Hold a plan against the policy that its recipe was written for; a difference is a bug of ours."""
    layers = plan.value("layers")
    everywhere = plan.value("precision")
    planned = {entry["name"]: entry["precision"] for entry in (layers or {"modules": ()})["modules"]}
    for name, precision in policy.assignment.items():
        found = planned.get(name, everywhere)
        if found != precision:
            raise RuntimeError(f"{name} was to be {precision}, and the recipe that says so plans {found}")


def _check_memory(plan: Plan, *, is_frozen: bool) -> None:
    """Raise UnsupportedError where model, gradients and activations don't fit; there is no optimizer."""
    memory = plan.memory
    unused = ("optimizer", "gradients") if is_frozen else ("optimizer",)
    needed = memory.peak_gib - sum(memory.parts_gib.get(part, 0.0) for part in unused)
    if memory.capacity_gib is not None and needed > memory.capacity_gib:
        raise UnsupportedError(
            f"the reference is the model in fp32 with its gradients, about {needed:.1f} GiB, and there are "
            f"{memory.capacity_gib:.1f} on one device here",
            remedy="Set micro_batch_size or data.sequence_length lower, or search on a larger machine.",
        )


def _check_within(policy: Policy, candidates: Sequence[str]) -> None:
    if not policy.is_within:
        raise _too_far(f"{policy.predicted:.2g}, predicted", policy, candidates)


def _too_far(moved: str, policy: Policy, candidates: Sequence[str]) -> MptError:
    widest = widest_first(candidates)[0]
    return MptError(
        f"with every layer in {widest}, the widest candidate, the loss moves by {moved}, and the tolerance is "
        f"{policy.budget:.2g}",
        remedy="Add fp32 to --candidates, or raise --tolerance.",
    )


def _remarks(subject: Subject, candidates: Sequence[str]) -> list[str]:
    """Say what the reader must know of what was measured."""
    remarks = []
    if subject.recipe.lora is not None:
        remarks.append(
            "measured without the adapters, which begin as zero and change nothing; the frozen weights have no "
            "gradient, and none is timed or judged"
        )
    if subject.recipe.precision.layers is not None:
        remarks.append("the recipe's own precision.layers were searched anew")
    asked = subject.float8.recipe
    if "fp8" in candidates and asked is not None and asked != subject.probed_recipe:
        remarks.append(f"fp8 was measured with torchao's tensorwise scaling: it has no {asked}")
    emulated = [kind for kind in candidates if not subject.target.all_compute(Feature(kind))]
    if emulated:
        listed = " and ".join(emulated)
        remarks.append(
            f"{subject.target.label} only emulates {listed}: the time saved is that of a machine that has it"
        )
    return remarks
