"""A plan for weights that are trained already: from a recipe with the weights in the model's place, made anew for the
machine at hand. For `mpt eval` and `mpt chat`. This module imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpt.errors import RecipeError, RecipeProblem
from mpt.hardware.machine import Machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import Plan, resolve
from mpt.recipe.overrides import apply_overrides
from mpt.recipe.rules import broken_rules
from mpt.recipe.schema import SHORT_FORMS, Recipe, RecoverySection, RestartSection
from mpt.recipe.schema_errors import validate
from mpt.recipe.sources import BUILTIN
from mpt.running.trained import Trained
from mpt.terms import Strategy

# Of the training, and not of what is evaluated; report_to and push_to_hub would even tell others of it.
LEFT_OUT = (
    "sample",
    "compare",
    "global_batch_size",
    "gradient_accumulation_steps",
    "background_saving",
    "recovery",
    "compile",
    "early_stopping",
)
TRAINING_LEFT_OUT = (
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "save_strategy", "save_steps"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "report_to", "run_name", "push_to_hub"),
    *("gradient_accumulation_steps", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
)


def plan_trained(
    recipe: Recipe,
    machine: Machine,
    packages: frozenset[str] | None,
    name: str,
    *,
    task_folder: str | None = None,
) -> Plan:
    """Plan for a machine, with nothing that would be tried again; `task_folder` as in `resolve`, which says what is
    raised."""
    alone = {"restart": RestartSection(max_restarts=0), "recovery": RecoverySection(rungs=[])}
    plan = resolve(
        recipe,
        machine,
        learn_model_facts(recipe),
        name=name,
        packages=packages,
        modules=learn_modules(recipe),
        task_folder=task_folder,
    )
    return replace(plan, recipe=plan.recipe.model_copy(update=alone))


def with_weights(
    recipe: Recipe, trained: Trained, *, of_run: Plan | None, data: str | None, overrides: Sequence[str]
) -> Recipe:
    """Give the recipe with the weights as its model, and `data` as what is evaluated on.

    `of_run` is the plan that the weights were trained by: its decisions stand where the recipe left them open. Raises
    RecipeError for overrides that don't fit.
    """
    values = recipe.model_dump(mode="json", exclude_unset=True)
    for key in LEFT_OUT:
        values.pop(key, None)
    training = values.get("training", {})
    values["training"] = {key: value for key, value in training.items() if key not in TRAINING_LEFT_OUT}
    if of_run is not None:
        values["precision"] = values.get("precision", {}) | {"mode": of_run.value("precision")}
        values["micro_batch_size"] = of_run.value("micro_batch_size")
        values["training"].pop("per_device_train_batch_size", None)
        if not values["training"].get("per_device_eval_batch_size"):
            values["training"]["per_device_eval_batch_size"] = of_run.value("micro_batch_size")
    _divide(values, of_run)
    _place(values, trained)
    if data is not None:
        gone = ("eval_source", "eval_split", "eval_fraction", "config", "revision", "split", "mixing")
        left = {key: value for key, value in values["data"].items() if key not in gone}
        values["data"] = left | {"source": data, "eval_source": data}
    problems = apply_overrides(values, overrides)[1]
    if problems:
        raise RecipeError(problems, remedy="Mend the arguments above; `mpt schema` lists every key.")
    return _validated(values, trained)


def _divide(values: dict[str, Any], of_run: Plan | None) -> None:
    """Let each process have the whole model, unless ZeRO-3 had to divide it: ZeRO-1 and 2 divide what an evaluation
    has not."""
    section = dict(values.get("distributed", {}))
    strategy = of_run.value("distributed.strategy") if of_run is not None else section.get("strategy", "auto")
    if strategy == Strategy.ZERO3:
        section["strategy"] = str(strategy)
    else:
        values.pop("offload", None)
        section.pop("strategy", None)
        if section.get("processes_per_node", 1) != 1 or (of_run is not None and of_run.value("world_size") > 1):
            section["strategy"] = "ddp"
    values["distributed"] = section


def _place(values: dict[str, Any], trained: Trained) -> None:
    """Put the weights in the model's place; adapters go on the base that they were made for."""
    asked = values["model"] if isinstance(values["model"], dict) else {SHORT_FORMS["model"]: values["model"]}
    known = {key: asked[key] for key in ("trust_remote_code",) if key in asked}
    if not trained.is_adapter:
        values["model"] = {"name_or_path": trained.place} | known
    elif trained.run is None:
        values["model"] = {"name_or_path": trained.base} | known
    if trained.has_tokenizer:
        values["tokenizer"] = {"name_or_path": trained.place}


def _validated(values: Mapping[str, Any], trained: Trained) -> Recipe:
    made, flaws = validate(values)
    flaws = flaws if made is None else broken_rules(made)
    if made is None or flaws:
        listed = [
            RecipeProblem(trained.place, None, ".".join(map(str, flaw.path)), flaw.problem, flaw.suggestion)
            for flaw in flaws
        ]
        raise RecipeError(listed, remedy="Set the key behind the recipe's name: key.path=value.")
    return made


def without_recipe(trained: Trained) -> Recipe:
    """Give the recipe of a model that is only talked to; its data is never read."""
    model = trained.base if trained.is_adapter else trained.place
    tokenizer = {"tokenizer": trained.place} if trained.is_adapter and trained.has_tokenizer else {}
    return Recipe.model_validate({"model": model, "data": BUILTIN, **tokenizer})
