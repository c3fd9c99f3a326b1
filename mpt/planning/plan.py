"""`resolve(recipe, machine, facts) -> Plan`: what will happen, every value with its reason. Pure, and without torch.

A Plan holds no "auto". The worker reads it and decides nothing; a restart writes another one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mpt.errors import MptError, StorageError
from mpt.hardware.machine import Machine
from mpt.hardware.machine_json import machine_from_json, machine_to_json
from mpt.planning.adapters import choose_adapters
from mpt.planning.attention import choose_attention
from mpt.planning.background_saving import choose_background_saving
from mpt.planning.compiling import choose_compile
from mpt.planning.data_workers import choose_data_workers
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.planning.deepspeed import to_deepspeed
from mpt.planning.float8_engine import check_recomputed, choose_float8
from mpt.planning.layers import check_tied, choose_layers, island_dtypes, keeps_mlp_wide
from mpt.planning.loss import choose_loss
from mpt.planning.memory import MemoryEstimate
from mpt.planning.metrics import choose_early_stopping, choose_metrics
from mpt.planning.model_facts import ModelFacts
from mpt.planning.modules import ModuleShape
from mpt.planning.number_formats import check_static_scale
from mpt.planning.packing import choose_packing, choose_pad_multiple, choose_padding_free, wants_best_fit
from mpt.planning.precision import CheckpointFacts, choose_precision
from mpt.planning.quantization import choose_quantization
from mpt.planning.sharding import choose_layout, formats_for
from mpt.planning.trackers import choose_trackers, tracker_arguments
from mpt.planning.training_arguments import to_training_arguments
from mpt.recipe.schema import Recipe
from mpt.recipe.training_keys import training_arguments
from mpt.terms import Attention, DeviceKind, Feature, Method, Packing, Precision, Task

PLAN_VERSION = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do. `values` are the decisions under the names that programs may rely on."""

    name: str
    recipe: Recipe
    machine: Machine
    facts: ModelFacts
    values: Mapping[str, Decision[Any]]
    memory: MemoryEstimate
    training_arguments: Mapping[str, Any]
    deepspeed: Mapping[str, Any] | None = None
    deepspeed_notes: tuple[str, ...] = ()
    resume_from: str | None = None
    repairs: tuple[Mapping[str, Any], ...] = ()
    """What recovery changed, oldest first, as `mpt.planning.repair` writes it."""
    task_folder: str | None = None
    """The recipe's folder, where a task of the user's own is looked for; None for mpt's tasks."""
    version: int = field(default=PLAN_VERSION)

    def value(self, key: str) -> Any:
        """Look up a decided value: `plan.value("precision")`."""
        return self.values[key].value

    def to_json(self) -> dict[str, Any]:
        """Give the plan as JSON values; `Plan.from_json` reads them back."""
        return {
            "version": self.version,
            "name": self.name,
            "values": {key: decision_to_json(decision) for key, decision in self.values.items()},
            "memory": self.memory.to_json(),
            "machine": machine_to_json(self.machine),
            "model": self.facts.to_json(),
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
            "training_arguments": dict(self.training_arguments),
            "deepspeed": None if self.deepspeed is None else dict(self.deepspeed),
            "deepspeed_notes": list(self.deepspeed_notes),
            "resume_from": self.resume_from,
            "repairs": [dict(repair) for repair in self.repairs],
            "task_folder": self.task_folder,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """Read a plan back; raises StorageError for one that another version of mpt wrote."""
        if data.get("version") != PLAN_VERSION:
            raise StorageError(
                f"the plan has version {data.get('version')}, and this mpt reads version {PLAN_VERSION}",
                remedy="Go on with the mpt that began the run, or begin anew with --resume never.",
            )
        return cls(
            name=data["name"],
            recipe=Recipe.model_validate(data["recipe"]),
            machine=machine_from_json(data["machine"], "plan.json"),
            facts=ModelFacts.from_json(data["model"]),
            values={key: decision_from_json(value) for key, value in data["values"].items()},
            memory=MemoryEstimate.from_json(data["memory"]),
            training_arguments=data["training_arguments"],
            deepspeed=data["deepspeed"],
            deepspeed_notes=tuple(data["deepspeed_notes"]),
            resume_from=data["resume_from"],
            repairs=tuple(data.get("repairs", ())),
            task_folder=data.get("task_folder"),
        )


def decision_to_json(decision: Decision[Any]) -> dict[str, Any]:
    rejected = [{"value": option.value, "reason": option.reason} for option in decision.rejected]
    return {
        "value": decision.value,
        "origin": decision.origin.value,
        "reason": decision.reason,
        "rejected": rejected,
    }


def decision_from_json(data: Mapping[str, Any]) -> Decision[Any]:
    rejected = tuple(Rejected(option["value"], option["reason"]) for option in data["rejected"])
    return Decision(data["value"], Origin(data["origin"]), data["reason"], rejected)


def resolve(
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    *,
    name: str,
    packages: frozenset[str] | None = None,
    modules: Sequence[ModuleShape] | None = None,
    task_folder: str | None = None,
) -> Plan:
    """Decide everything.

    `modules` are the model's by name, for a recipe that speaks of layers (`mpt.planning.modules.learn_modules`);
    without them adapters that are asked for by name are only estimated.
    `task_folder` is the recipe's, for a task of the user's own.
    `packages` are the installed top-level packages that a choice depends on; None where nobody knows (a named machine).
    Raises MptError for wishes that contradict each other, UnsupportedError for those that the machine can't fulfil. A
    plan that does not fit the memory is made all the same; `plan.memory.fits` says so.
    """
    precision = choose_precision(
        recipe.precision.asked_mode,
        machine,
        allow_emulation=recipe.precision.allow_emulation,
        checkpoint=CheckpointFacts(facts.checkpoint_dtype, facts.overflows_in_fp16),
        keeps_mlp_wide=keeps_mlp_wide(recipe.precision.layers or {}, modules or ()),
    )
    fp8 = choose_float8(recipe.precision, precision.value, machine, packages)
    layers = choose_layers(recipe.precision, precision.value, modules, machine=machine, fp8=fp8.value)
    check_tied(layers.value, precision.value, modules)
    islands = island_dtypes(layers.value, precision.value)
    has_islands = bool(islands)
    adapters = choose_adapters(recipe, facts, modules)
    quantization = choose_quantization(recipe, precision.value, machine, facts, modules, packages, islands)
    sequence_length = _sequence_length(recipe, facts)
    attention = choose_attention(
        None if recipe.attention == "auto" else Attention(recipe.attention),
        machine,
        precision.value,
        packages,
        facts,
        is_packed=wants_best_fit(recipe),
        sequence_length=sequence_length.value,
    )
    packing = choose_packing(recipe, facts.model_type, attention.value)
    padding_free = choose_padding_free(recipe.model_task, packing.value, attention.value, facts.model_type)
    loss_of = partial(choose_loss, recipe, machine, facts, precision.value, layers=layers.value, packages=packages)
    layout = choose_layout(
        recipe,
        machine,
        facts,
        precision.value,
        attention.value,
        sequence_length.value,
        has_islands,
        modules,
        loss_of=lambda strategy: loss_of(strategy=strategy).value,
    )
    loss = loss_of(strategy=layout.strategy.value)
    compile_ = choose_compile(
        recipe,
        fp8.value,
        layout.strategy.value,
        machine,
        facts,
        tokens_a_step=layout.global_batch_size.value * sequence_length.value,
        is_plain=recipe.lora is None and not layers.value,
        packages=packages,
    )
    check_recomputed(fp8.value, gradient_checkpointing=layout.gradient_checkpointing.value)
    method = _method(recipe)
    formats = formats_for(
        recipe, precision.value, layout.strategy.value, facts.checkpoint_dtype, has_islands=has_islands
    )
    samples_a_rank = layout.global_batch_size.value // layout.world_size.value
    check_static_scale(formats["loss_scale"].value, tokens=samples_a_rank * sequence_length.value)
    trackers = choose_trackers(recipe, packages)
    keywords = to_training_arguments(
        recipe,
        precision=precision.value,
        on_cpu=machine.is_cpu,
        micro_batch_size=layout.micro_batch_size.value,
        gradient_accumulation_steps=layout.gradient_accumulation_steps.value,
        gradient_checkpointing=layout.gradient_checkpointing.value,
        by_deepspeed=layout.strategy.value.zero_stage is not None,
        by_deepspeed_autocast=has_islands and layout.strategy.value.zero_stage is not None,
        compiles=compile_.value,
        has_even_batches=packing.value is Packing.BLOCKS,
        by_liger=loss.value == "liger",
    ) | tracker_arguments(trackers.value, recipe, name)
    values: dict[str, Decision[Any]] = {
        "task": _asked_or_default(recipe, "task", recipe.task, "predict the next token"),
        "metrics": choose_metrics(recipe, packages),
        "early_stopping": choose_early_stopping(recipe),
        "method": method,
        "quantization": quantization,
        "adapters": adapters,
        "device": Decision(machine.kind.value, Origin.DERIVED, machine.label),
        "precision": precision,
        **formats,
        "fp8": fp8,
        "layers": layers,
        "tf32": _tf32(precision.value, machine, has_fp32_islands="fp32" in islands.values()),
        "compile": compile_,
        "attention": attention,
        "loss": loss,
        "distributed.strategy": layout.strategy,
        "offload": layout.offload,
        "gradient_checkpointing": layout.gradient_checkpointing,
        "nodes": Decision(machine.nodes, Origin.DERIVED, "the machine's"),
        "processes_per_node": layout.processes_per_node,
        "world_size": layout.world_size,
        "micro_batch_size": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.gradient_accumulation_steps,
        "global_batch_size": layout.global_batch_size,
        "sequence_length": sequence_length,
        "packing": packing,
        "padding_free": padding_free,
        "pad_to_multiple_of": choose_pad_multiple(
            None if recipe.data.pad_to_multiple_of == "auto" else recipe.data.pad_to_multiple_of,
            packing.value,
            precision.value,
            machine,
            padding_free=padding_free.value,
        ),
        "data_workers": choose_data_workers(recipe.data.workers, machine),
        "optimizer": _training_value(recipe, "optim"),
        "learning_rate": _training_value(recipe, "learning_rate"),
        "lr_scheduler": _training_value(recipe, "lr_scheduler_type"),
        "max_steps": _max_steps(recipe),
        "trackers": trackers,
        "background_saving": choose_background_saving(
            recipe, machine, layout.memory, layout.strategy.value, method.value
        ),
    }
    values = {key: _plain(decision) for key, decision in values.items()}
    deepspeed: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    if layout.strategy.value.zero_stage is not None:
        deepspeed, notes = to_deepspeed({key: decision.value for key, decision in values.items()}, facts, keywords)
    return Plan(
        name=name,
        recipe=recipe,
        machine=machine,
        facts=facts,
        values=values,
        memory=layout.memory,
        training_arguments=keywords,
        deepspeed=deepspeed,
        deepspeed_notes=notes,
        task_folder=None if isinstance(recipe.task, Task) else task_folder,
    )


def _tf32(precision: Precision, machine: Machine, *, has_fp32_islands: bool) -> Decision[bool]:
    if precision is Precision.TF32:
        return Decision(True, Origin.DERIVED, "tf32 was asked for")
    if not machine.all_compute(Feature.TF32):
        return Decision(False, Origin.DERIVED, f"{machine.label} has no TF32")
    if machine.kind is not DeviceKind.CUDA:
        return Decision(False, Origin.DERIVED, "only when asked, except on NVIDIA's devices")
    if precision is Precision.FP32:
        return Decision(False, Origin.DERIVED, "fp32 means fp32; `precision: tf32` allows it")
    if has_fp32_islands:
        return Decision(False, Origin.DERIVED, "precision.layers asks for fp32, and TF32 is one switch for all of it")
    return Decision(True, Origin.DERIVED, "what stays fp32 may multiply in TF32")


def _plain(decision: Decision[Any]) -> Decision[Any]:
    """Turn a member of an enumeration into its text, so that a plan read back equals the plan written."""
    return replace(decision, value=getattr(decision.value, "value", decision.value))


def _method(recipe: Recipe) -> Decision[Method]:
    if recipe.quantization is not None:
        return Decision(Method.QLORA, Origin.ASKED, "adapters on quantised weights")
    if recipe.lora is not None:
        return Decision(Method.LORA, Origin.ASKED, "adapters on frozen weights")
    return Decision(Method.FULL, Origin.AUTO, "no lora block: every weight is trained")


def _asked_or_default(section: Any, key: str, value: Any, reason: str) -> Decision[Any]:
    if key in section.model_fields_set:
        return Decision(value, Origin.ASKED, "the recipe asks for it")
    return Decision(value, Origin.AUTO, f"mpt's default: {reason}")


def _training_value(recipe: Recipe, key: str) -> Decision[Any]:
    asked = recipe.training_keys
    if key in asked:
        return Decision(asked[key], Origin.ASKED, f"the recipe's training.{key}")
    return Decision(training_arguments()[key]["default"], Origin.AUTO, "transformers' default")


def _max_steps(recipe: Recipe) -> Decision[int | None]:
    steps = recipe.training_keys.get("max_steps", -1)
    if steps > 0:
        return Decision(steps, Origin.ASKED, "the recipe's training.max_steps")
    epochs = _training_value(recipe, "num_train_epochs")
    return Decision(None, epochs.origin, f"{epochs.value:g} epochs; the steps follow from the data")


def _sequence_length(recipe: Recipe, facts: ModelFacts) -> Decision[int]:
    decision = _asked_or_default(recipe.data, "sequence_length", recipe.data.sequence_length, "tokens a sample")
    if facts.max_positions is None or decision.value <= facts.max_positions:
        return decision
    if decision.origin is Origin.AUTO:
        return Decision(facts.max_positions, Origin.DERIVED, "the model has no more positions")
    raise MptError(
        f"data.sequence_length is {decision.value}, and the model has {facts.max_positions} positions",
        remedy=f"Set data.sequence_length to {facts.max_positions} or less.",
    )
