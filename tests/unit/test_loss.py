"""How the cross entropy is computed: by which rules, for which reasons."""

from typing import Any

import pytest

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.specs import parse_machine
from mpt.planning.decision import Decision
from mpt.planning.loss import FEWEST_TOKENS, choose_loss, chunk_tokens
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import Recipe
from mpt.terms import Precision, Strategy

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LIGER = frozenset({"torch", "liger_kernel"})
BARE = frozenset({"torch"})


def recipe(model_type: str = "llama", **changes: Any) -> Recipe:
    config = {"model_type": model_type, **SIZES}
    return Recipe.model_validate({"model": {"config": config}, "data": "builtin:python-reference", **changes})


def choose(
    asked: Recipe,
    machine: str = "cpu",
    *,
    precision: Precision = Precision.BF16,
    strategy: Strategy = Strategy.SINGLE,
    layers: Any = None,
    packages: frozenset[str] | None = BARE,
) -> Decision[Any]:
    where = parse_machine(machine)
    return choose_loss(asked, where, learn_model_facts(asked), precision, strategy, layers, packages)


@pytest.mark.parametrize(
    ("asked", "keywords", "value", "because"),
    [
        (recipe(), {}, "chunked", "tokens stand at a time"),
        (recipe("gemma2", model={"config": {"model_type": "gemma2", **SIZES, "head_dim": 16}}), {}, "full", "gemma2"),
        (recipe(), {"machine": "1xH100", "packages": LIGER}, "liger", "installed"),
        (recipe(), {"machine": "1xH100", "packages": BARE}, "chunked", "tokens stand"),
        (recipe(), {"machine": "1xH100", "packages": None}, "chunked", "tokens stand"),
        (recipe(), {"machine": "8xH100", "packages": LIGER, "strategy": Strategy.ZERO3}, "full", "divides the head"),
        (recipe(), {"strategy": Strategy.ZERO2}, "chunked", "tokens stand"),
        (recipe(), {"strategy": Strategy.ZERO2, "precision": Precision.FP16}, "full", "loss scale"),
        (recipe(), {"precision": Precision.FP16}, "chunked", "tokens stand"),
        (recipe(training={"label_smoothing_factor": 0.1}), {}, "full", "label_smoothing_factor"),
        (recipe(metrics=["token_accuracy"]), {}, "full", "token_accuracy"),
        (recipe(loss="full"), {}, "full", "asks for it"),
        (recipe(), {"layers": {"modules": [{"name": "lm_head", "precision": "fp8"}]}}, "full", "fp8"),
        (recipe(), {"layers": {"modules": [{"name": "lm_head", "precision": "fp32"}]}}, "chunked", "tokens stand"),
        (
            recipe(),
            {"precision": Precision.FP32, "layers": {"modules": [{"name": "lm_head", "precision": "bf16"}]}},
            "full",
            "hands its logits on",
        ),
        (
            recipe(),
            {
                "machine": "1xH100",
                "packages": LIGER,
                "layers": {"modules": [{"name": "model.layers.0.mlp.up_proj", "precision": "fp32"}]},
            },
            "chunked",
            "tokens stand",
        ),
    ],
)
def test_auto_takes_the_best_that_model_machine_and_precision_allow_and_says_why(
    asked: Recipe, keywords: dict[str, Any], value: str, because: str
) -> None:
    decision = choose(asked, **keywords)
    said = decision.reason + " ".join(option.reason for option in decision.rejected)
    assert decision.value == value
    assert because in said


@pytest.mark.parametrize(
    ("asked", "keywords", "kind", "words"),
    [
        (recipe(loss="chunked"), {"strategy": Strategy.ZERO3}, MptError, "zero3 divides the head"),
        (recipe(loss="chunked", task="masked_lm"), {}, MptError, "masked_lm"),
        (recipe(loss="liger"), {}, UnsupportedError, "GPU"),
        (recipe(loss="liger"), {"machine": "1xA100", "packages": BARE}, UnsupportedError, "pip install liger-kernel"),
        (recipe("phi", loss="liger"), {"machine": "1xA100", "packages": LIGER}, MptError, "no kernels for a phi"),
        (recipe(training={"use_liger_kernel": True}), {}, UnsupportedError, "GPU"),
    ],
)
def test_a_loss_that_was_asked_for_and_can_t_be_is_an_error_with_the_reason(
    asked: Recipe, keywords: dict[str, Any], kind: type[MptError], words: str
) -> None:
    with pytest.raises(kind) as raised:
        choose(asked, **keywords)
    assert type(raised.value) is kind
    assert words in raised.value.problem + raised.value.remedy


def test_a_chunk_grows_smaller_with_the_vocabulary_and_not_below_a_floor() -> None:
    sizes = [chunk_tokens(vocabulary, on_cpu=True) for vocabulary in (256, 2_048, 32_000, 1_000_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == FEWEST_TOKENS


def test_the_trainer_is_told_of_liger() -> None:
    plan = planned("1xA100", LIGER)
    assert (plan.value("loss"), plan.training_arguments["use_liger_kernel"]) == ("liger", True)
    assert "use_liger_kernel" not in planned("1xA100", BARE).training_arguments


def test_the_estimate_of_memory_follows_the_loss() -> None:
    """Llama 3's vocabulary: the logits of 8192 tokens take 12 GB, in chunks they take less than the head."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    config = {"model_type": "llama", **sizes, "num_key_value_heads": 8, "vocab_size": 128256}
    logits, peak = {}, {}
    for loss in ("full", "chunked"):
        asked = recipe(
            model={"config": config},
            tokenizer={"train": "byte_level_bpe", "vocab_size": 128256},
            micro_batch_size=8,
            gradient_checkpointing=True,
            loss=loss,
        )
        memory = resolve(asked, parse_machine("1xH100"), learn_model_facts(asked), name="x", packages=BARE).memory
        logits[loss], peak[loss] = memory.parts_gib["logits"], memory.peak_gib
    assert logits["full"] == pytest.approx(8 * 1024 * 128256 * 12 / 2**30, rel=1e-3)
    assert logits["chunked"] < logits["full"] / 4
    assert peak["chunked"] < peak["full"] - 5


def planned(machine: str, packages: frozenset[str]) -> Plan:
    asked = recipe()
    return resolve(asked, parse_machine(machine), learn_model_facts(asked), name="x", packages=packages)
