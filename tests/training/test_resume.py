"""A run that is killed and gone on with is the run that nobody killed: every number after it, bit for bit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from mpt.running.run_directory import RunDirectory
from tests.training.tiny_runs import Run, tiny_recipe

pytestmark = pytest.mark.slow

# Dropout draws random numbers at each step.
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
PADDED = {"packing": False}
STREAMED = {"streaming": True}
TWO = {"processes_per_node": 2}


@dataclass(frozen=True)
class Case:
    """A run, and the steps after which it is killed. An epoch has four steps, the last one of a single micro batch."""

    changes: dict[str, Any]
    killed_after: tuple[int, ...]
    training: dict[str, Any] | None = None
    fault: dict[str, Any] | None = None

    @property
    def processes(self) -> int:
        return int(self.changes.get("distributed", {}).get("processes_per_node", 1))


LOADERS = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}
LASTING = LOADERS | {"dataloader_persistent_workers": True}
CASES: dict[str, Case] = {
    "several epochs": Case({}, (4, 6)),
    "loader processes, and a bad step before": Case({}, (6,), LOADERS, {"nan_loss_at": [3]}),
    "loader processes that last": Case({}, (2, 4), LASTING),
    "grouped by length": Case({"data": PADDED}, (6,), {"train_sampling_strategy": "group_by_length"}),
    "adapters": Case({"data": PADDED, "lora": {"rank": 4, "dropout": 0.1}}, (6,)),
    "ddp": Case({"distributed": TWO | {"strategy": "ddp"}}, (6,)),
    "zero2": Case({"distributed": TWO | {"strategy": "zero2"}}, (6,)),
    # A pass of a stream is over before step 5.
    "streamed": Case({"data": STREAMED}, (6,)),
    "streamed, padded": Case({"data": STREAMED | PADDED}, (6,)),
    "streamed by loader processes that last": Case({"data": STREAMED}, (6,), LASTING),
    "streamed over ddp": Case({"data": STREAMED, "distributed": TWO | {"strategy": "ddp"}}, (6,)),
    "streamed over ddp, padded": Case({"data": STREAMED | PADDED, "distributed": TWO | {"strategy": "ddp"}}, (6,)),
}
RESUMES = [(name, step) for name, case in CASES.items() for step in case.killed_after]


def write_documents(folder: Path) -> list[str]:
    """Write documents of many lengths into two files."""
    texts = [topics[name][: 12 + 7 * number // 4] for number, name in enumerate(sorted(topics)[:52])]
    for number in range(2):
        rows = [json.dumps({"text": text}) for text in texts[number::2]]
        folder.joinpath(f"{number}.jsonl").write_text("\n".join(rows))
    return [str(folder / "*.jsonl")]


def recipe(case: Case, source: list[str], base: Path | None) -> Any:
    training = {"num_train_epochs": 3, "max_steps": -1, "save_steps": 1, "save_total_limit": 99, "learning_rate": 3e-3}
    own = {key: value for key, value in case.changes.items() if key != "data"}
    data = {"source": source, "sequence_length": 32, "eval_fraction": 0} | case.changes.get("data", {})
    if "streaming" in data:
        training["max_steps"] = 12
    changes: dict[str, Any] = {
        "model": {"config": GPT2},
        "tokenizer": {"train": "byte_level_bpe", "vocab_size": 300},
        "data": data,
        "micro_batch_size": 8 // case.processes,
        "gradient_accumulation_steps": 2,
        "training": training | (case.training or {}),
    }
    if base is not None:
        changes |= {"model": {"name_or_path": str(base), "config": None}, "tokenizer": None}
    return tiny_recipe(**changes, **own)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Train a case to its end, once; its checkpoints of every step stay."""
    source = write_documents(tmp_path_factory.mktemp("documents"))

    @cache
    def train(name: str) -> Run:
        case = CASES[name]
        base = train("several epochs").directory.final if "lora" in case.changes else None
        run = Run(RunDirectory(tmp_path_factory.mktemp("whole")), recipe(case, source, base), case.fault)
        assert run.train(processes=case.processes) == 0, run.log()
        return run

    return train


@pytest.mark.parametrize(("name", "step"), RESUMES, ids=[f"{name}, after {step}" for name, step in RESUMES])
def test_a_run_killed_after_a_step_goes_on_bit_for_bit(
    whole: Callable[[str], Run], name: str, step: int, tmp_path: Path
) -> None:
    import torch

    run, resumed = whole(name), Run(RunDirectory(tmp_path), whole(name).recipe)
    for part in (f"checkpoints/checkpoint-{step}", "tokenizer", "stream"):
        if run.path.joinpath(part).exists():
            shutil.copytree(run.path / part, resumed.path / part)
    assert resumed.train(2, f"checkpoint-{step}", CASES[name].processes) == 0, resumed.log(2)
    assert list(run.trajectory) == list(range(1, 13))
    assert resumed.trajectory == {number: row for number, row in run.trajectory.items() if number > step}
    # The same bookmarks: what was skipped was not made again.
    assert bookmarks(resumed) == bookmarks(run)
    assert bool(bookmarks(run)) == ("stream" in name)
    first, second = weights(run), weights(resumed)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def bookmarks(run: Run) -> set[str]:
    return {path.name for path in run.path.glob("stream/*")}


def weights(run: Run) -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = run.directory.final.glob("*model.safetensors")
    return load_file(file)


def test_an_epoch_above_ends_with_an_incomplete_accumulation_and_a_stream_has_none(
    whole: Callable[[str], Run],
) -> None:
    tokens = [row["tokens"] for row in whole("several epochs").steps.values()]
    assert tokens[3] == tokens[7] == tokens[11] <= 8 * 32 < tokens[0]
    assert {row["tokens"] for row in whole("streamed").steps.values()} == {16 * 32}


def test_the_bad_step_above_was_left_out(whole: Callable[[str], Run]) -> None:
    rows = whole("loader processes, and a bad step before").steps
    assert [step for step, row in rows.items() if row["skipped"]] == [3]
