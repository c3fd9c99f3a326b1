"""What is evaluated or talked to is found by its name, and its recipe is the run's with the weights as its model."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import MptError, RecipeError, StorageError
from mpt.hardware.specs import parse_machine
from mpt.measuring.chat_plan import to_chat
from mpt.measuring.evaluation import check_held_out
from mpt.measuring.trained_plan import with_weights, without_recipe
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.plan import Plan, resolve
from mpt.recipe.schema import Recipe
from mpt.running import checkpoints
from mpt.running.journal import Journal
from mpt.running.run_directory import RunDirectory
from mpt.running.trained import Trained, find_trained

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 64}


def save(folder: Path, *names: str, base: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        folder.joinpath(name).write_text("{}")
    if base is not None:
        folder.joinpath("adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


MODEL = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has saved at steps 2 and 4, of which 2 was the better one."""
    made = RunDirectory(tmp_path / "runs" / "tiny")
    made.path.mkdir(parents=True)
    Journal(made.journal, 0).append("run_created")
    for step in (2, 4):
        staging = save(made.checkpoints / f".staging-{step}", *MODEL)
        state = {"best_model_checkpoint": "checkpoint-2", "global_step": step}
        staging.joinpath("trainer_state.json").write_text(json.dumps(state))
        final = made.checkpoints / f"checkpoint-{step}"
        checkpoints.commit(staging, final, step=step, world_size=1, lineage=1, health={})
    return made


def find(run: RunDirectory, name: str = "tiny", checkpoint: str | None = None) -> Trained:
    return find_trained(name, run.path.parent, checkpoint)


def test_a_run_is_its_final_model_and_before_that_its_newest_checkpoint(run: RunDirectory) -> None:
    early = find(run)
    assert early.place == str(run.checkpoints / "checkpoint-4") and "has not finished" in early.note
    save(run.final, *MODEL)
    done = find(run)
    assert (done.place, done.note, done.is_adapter, done.run) == (str(run.final), "", False, run)


@pytest.mark.parametrize(
    ("checkpoint", "found"), [("2", "checkpoint-2"), ("checkpoint-4", "checkpoint-4"), ("best", "checkpoint-2")]
)
def test_a_checkpoint_is_named_by_step_folder_or_best(run: RunDirectory, checkpoint: str, found: str) -> None:
    assert find(run, checkpoint=checkpoint).place == str(run.checkpoints / found)


def test_a_path_inside_a_run_is_of_that_run(run: RunDirectory) -> None:
    save(run.final, *MODEL)
    for path in (run.final, run.checkpoints / "checkpoint-2"):
        found = find(run, str(path))
        assert found.place == str(path) and found.run is not None and found.run.path == run.path.resolve()


def test_a_folder_or_a_hub_id_is_a_model(run: RunDirectory, tmp_path: Path) -> None:
    folder = save(tmp_path / "gpt2", *MODEL)
    assert find(run, str(folder)) == Trained(str(folder))
    assert find(run, "owner/name") == Trained("owner/name")
    adapter = save(tmp_path / "lora", "adapter_model.safetensors", base="owner/base")
    found = find(run, str(adapter))
    assert (found.base, found.is_adapter, found.has_tokenizer) == ("owner/base", True, False)


@pytest.mark.parametrize(
    ("name", "checkpoint", "says"),
    [
        ("nothing", None, "there is no run 'nothing', and no model either"),
        ("./no/such", None, "there is no run './no/such', and no model either"),
        ("tiny", "7", "there is no checkpoint 7"),
        ("tiny", "final", "has no final model yet"),
        ("owner/name", "2", "is a model and no run"),
    ],
)
def test_what_is_not_there_is_one_message(run: RunDirectory, name: str, checkpoint: str | None, says: str) -> None:
    with pytest.raises(MptError, match=says) as raised:
        find(run, name, checkpoint)
    assert raised.value.exit_code == 2


def test_a_checkpoint_in_shards_or_a_damaged_adapter_is_said(run: RunDirectory) -> None:
    save(run.final, "config.json")
    with pytest.raises(MptError, match="holds no weights that can be loaded as a whole"):
        find(run)
    save(run.final, "adapter_model.safetensors", "adapter_config.json")
    with pytest.raises(StorageError, match=r"adapter_config\.json is damaged"):
        find(run)


def test_a_run_without_anything_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "new")
    run.path.mkdir(parents=True)
    Journal(run.journal, 0).append("run_created")
    with pytest.raises(MptError, match="neither a final model nor a checkpoint"):
        find(run, "new")


# --- the recipe and the plan


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"config": LLAMA},
        "tokenizer": {"train": "byte_level_bpe", "vocab_size": 512},
        "data": {"source": "a.txt", "sequence_length": 32},
        "training": {"max_steps": 8, "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 4, "seed": 7},
        "global_batch_size": 16,
        "sample": "The ",
    }
    return Recipe.model_validate(values | changes)


def plan_of(made: Recipe) -> Plan:
    return resolve(made, parse_machine("cpu"), learn_model_facts(made), name="tiny")


TRAINED = Trained("runs/tiny/final")


def test_the_weights_take_the_model_s_place_and_the_run_s_decisions_stand() -> None:
    before = recipe(
        precision={"mode": "bf16", "allow_emulation": True}, micro_batch_size=4, early_stopping={"patience": 2}
    )
    made = with_weights(before, TRAINED, of_run=plan_of(before), data=None, overrides=[])
    assert made.model.name_or_path == "runs/tiny/final" and made.model.config is None
    assert made.tokenizer is not None and made.tokenizer.name_or_path == "runs/tiny/final"
    assert (made.precision.mode, made.micro_batch_size) == ("bf16", 4)
    assert made.data == before.data and made.training_keys["seed"] == 7
    assert made.training_keys["per_device_eval_batch_size"] == 4
    assert made.sample is None and "eval_strategy" not in made.training_keys


def test_other_data_take_the_place_of_the_recipe_s() -> None:
    made = with_weights(recipe(), TRAINED, of_run=None, data="b.jsonl", overrides=["data.sequence_length=16"])
    assert (made.data.source, made.data.eval_source, made.data.sequence_length) == ("b.jsonl", "b.jsonl", 16)
    check_held_out(made)


def test_nothing_held_out_is_refused_with_what_to_do() -> None:
    made = with_weights(recipe(), TRAINED, of_run=None, data=None, overrides=["data.eval_fraction=0"])
    with pytest.raises(MptError, match="holds nothing out") as raised:
        check_held_out(made)
    assert "--data FILE" in raised.value.remedy


@pytest.mark.parametrize("override", ["data.sequence_lenght=16", "precision=fp12", "nonsense"])
def test_an_override_that_does_not_fit_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match=override.partition("=")[0]):
        with_weights(recipe(), TRAINED, of_run=None, data=None, overrides=[override])


@pytest.mark.parametrize(
    ("asked", "processes", "strategy"),
    [("zero1", 1, "auto"), ("zero2", 2, "ddp"), ("zero3", 2, "zero3"), ("ddp", 2, "ddp"), ("auto", 1, "auto")],
)
def test_only_zero3_divides_what_is_evaluated(asked: str, processes: int, strategy: str) -> None:
    before = recipe(distributed={"strategy": asked, "processes_per_node": processes})
    made = with_weights(before, TRAINED, of_run=plan_of(before), data=None, overrides=[])
    assert (made.distributed.strategy, made.distributed.processes_per_node) == (strategy, processes)


def test_an_adapter_goes_on_the_run_s_own_base_and_alone_on_the_one_it_names() -> None:
    before = recipe(model="base", tokenizer=None, lora={})
    own = Trained("runs/tiny/final", base="elsewhere/base", run=RunDirectory(Path("runs/tiny")))
    assert with_weights(before, own, of_run=None, data=None, overrides=[]).model.name_or_path == "base"
    alone = Trained("lora", base="owner/base")
    assert with_weights(before, alone, of_run=None, data=None, overrides=[]).model.name_or_path == "owner/base"
    assert without_recipe(alone).model.name_or_path == "owner/base"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", "fp32"), ("bf16", "bf16"), ("bf16_pure", "bf16"), ("fp16", "fp16")],
)
def test_text_is_generated_in_the_format_that_the_run_computed_in(precision: str, dtype: str) -> None:
    plan = to_chat(plan_of(recipe(precision={"mode": precision, "allow_emulation": True})))
    assert (plan.value("weights_dtype"), plan.value("world_size"), plan.deepspeed) == (dtype, 1, None)


@pytest.mark.parametrize("task", ["sequence_classification", "masked_lm"])
def test_a_model_that_generates_no_text_is_refused(task: str) -> None:
    made = recipe(task="causal_lm")
    plan = plan_of(made)
    values = dict(plan.values) | {"task": type(plan.values["task"])(task, plan.values["task"].origin, "")}
    with pytest.raises(MptError, match="generates no text"):
        to_chat(Plan(**{name: getattr(plan, name) for name in plan.__slots__} | {"values": values}))
