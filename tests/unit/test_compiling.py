"""What torch.compile compiles, and why."""

from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.compiling import choose_compile
from mpt.planning.decision import Decision
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import resolve
from mpt.recipe.load import load_recipe
from mpt.recipe.rules import broken_rules
from mpt.recipe.schema import Recipe
from mpt.terms import Strategy

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
HERE = frozenset({"torch", "c++"})
LONG = {"max_steps": 100_000}


def recipe(**changes: Any) -> Recipe:
    config = {"model_type": "llama", **SIZES}
    return Recipe.model_validate({"model": {"config": config}, "data": "builtin:python-reference", **changes})


def choose(
    asked: Recipe,
    strategy: Strategy = Strategy.SINGLE,
    machine: str = "cpu",
    *,
    is_plain: bool = True,
    packages: frozenset[str] | None = HERE,
) -> Decision[Any]:
    facts = learn_model_facts(asked)
    where = parse_machine(machine)
    return choose_compile(asked, None, strategy, where, facts, tokens_a_step=8192, is_plain=is_plain, packages=packages)


@pytest.mark.parametrize(
    ("asked", "keywords", "value", "because"),
    [
        (recipe(training=LONG), {}, "regional", "a fifth of a step"),
        (recipe(training={"max_steps": 100}), {}, False, "min of computing"),
        (recipe(), {}, False, "how many steps"),
        (recipe(training=LONG), {"packages": frozenset({"torch"})}, False, "C++ compiler"),
        (recipe(training=LONG), {"packages": None}, False, "C++ compiler"),
        (recipe(training=LONG), {"is_plain": False}, False, "only when asked"),
        (recipe(training=LONG), {"strategy": Strategy.DDP}, "regional", "a fifth"),
        (recipe(training=LONG), {"strategy": Strategy.ZERO2}, False, "zero2"),
        (recipe(training=LONG), {"machine": "H100"}, False, "only native fp8"),
        (recipe(training=LONG, compile=False), {}, False, "the recipe's compile"),
        (recipe(compile=True), {"strategy": Strategy.ZERO2}, True, "the recipe's compile"),
        (recipe(compile="regional"), {"machine": "H100"}, "regional", "the recipe's compile"),
        (
            recipe(compile="regional", training={"torch_compile_backend": "eager"}),
            {},
            "regional",
            "the recipe's compile",
        ),
        (recipe(training={"torch_compile_backend": "eager"}), {}, True, "torch_compile_backend"),
        (recipe(training={"torch_compile": False}), {}, False, "training.torch_compile"),
    ],
)
def test_blocks_are_compiled_where_it_pays_and_otherwise_when_asked(
    asked: Recipe, keywords: dict[str, Any], value: Any, because: str
) -> None:
    decision = choose(asked, **keywords)
    assert decision.value == value
    assert because in decision.reason


def test_blocks_that_an_engine_works_on_in_hooks_are_refused() -> None:
    with pytest.raises(MptError, match="zero3 works on them in hooks") as raised:
        choose(recipe(compile="regional"), Strategy.ZERO3)
    assert "compile: true" in raised.value.remedy


@pytest.mark.parametrize(("own", "theirs"), [(True, False), (False, True), ("regional", True)])
def test_compile_may_not_be_said_in_two_ways(own: Any, theirs: bool) -> None:
    with pytest.raises(ValueError, match="keep one of them"):
        recipe(compile=own, training={"torch_compile": theirs})


def test_a_backend_for_what_is_not_compiled_is_named() -> None:
    found = broken_rules(recipe(compile=False, training={"torch_compile_backend": "eager"}))
    assert [flaw.path for flaw in found] == [("training", "torch_compile_backend")]


def test_the_trainer_compiles_the_whole_model_and_never_the_blocks() -> None:
    found = {}
    for value in (True, "regional"):
        asked = recipe(compile=value, training={"torch_compile_backend": "eager"})
        plan = resolve(asked, parse_machine("cpu"), learn_model_facts(asked), name="x", packages=HERE)
        found[value] = {key for key in plan.training_arguments if key.startswith("torch_compile")}
    assert found == {True: {"torch_compile", "torch_compile_backend"}, "regional": set()}


def test_yaml_knows_the_word(tmp_path: Any) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {config: {model_type: llama}}\ndata: builtin:python-reference\ncompile: regional\n")
    assert load_recipe(file).compile == "regional"
