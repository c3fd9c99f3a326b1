"""`mpt search-precision` on a trained model, and on its copy with one layer that fp8 can't bear."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpt.recipe.load import load_recipe
from tests.cli.real_runs import MPT, Folder, environment

pytestmark = pytest.mark.slow

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "mlp_bias": True,
}
FRAGILE = "model.layers.1.mlp.down_proj"
WIDER = ("bf16", "fp32")  # whichever this CPU computes faster: that is measured
CHANNEL = 5
RECIPE = """\
# A comment that stays.
model: {model}  # trained for a moment
data: {{source: reference.txt, sequence_length: 32}}
micro_batch_size: 8
precision:
  mode: bf16
  allow_emulation: true
training:
  max_steps: 3
  save_steps: 3  # once
  learning_rate: 1e-7
"""


@dataclass(frozen=True)
class Search:
    """A finished `mpt search-precision`."""

    folder: Path
    done: "subprocess.CompletedProcess[str]"
    written: str

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.done.stdout))

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        return {layer["name"]: layer for layer in self.report["layers"]}

    @property
    def assigned(self) -> dict[str, str]:
        return {name: layer["precision"] for name, layer in self.layers.items()}

    @property
    def block(self) -> Any:
        return yaml.safe_load((self.folder / self.written).read_text(encoding="utf-8"))["precision"]


def search(folder: Path, recipe: str, *arguments: str) -> Search:
    written = f"found-{len(list(folder.iterdir()))}.yaml"
    done = subprocess.run(
        [*MPT, "search-precision", recipe, *arguments, "--json", "-o", written],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Search(folder, done, written)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, `healthy`, and `fragile`: the same function, with a huge channel in its middle.

    One channel of an up projection is 3e4 by its bias, and the down projection ignores it: its weights there are zero.
    Nothing but that projection's input is any larger than before.
    """
    from safetensors.torch import load_file, save_file

    folder = Folder(tmp_path_factory.mktemp("models"))
    training = {"max_steps": 40, "learning_rate": 3e-3, "save_steps": 40}
    folder.write(model={"config": LLAMA}, micro_batch_size=8, gradient_accumulation_steps=1, training=training)
    done = folder.train("tiny.yaml")
    assert done.returncode == 0, done.stderr
    for name in ("healthy", "fragile"):
        shutil.copytree(folder.run.final, folder.path / name)
        folder.path.joinpath(f"{name}.yaml").write_text(RECIPE.format(model=f"./{name}"), encoding="utf-8")
    weights = load_file(folder.path / "fragile" / "model.safetensors")
    weights[FRAGILE.replace("down_proj", "up_proj") + ".bias"][CHANNEL] = 3e4
    weights[FRAGILE + ".weight"][:, CHANNEL] = 0.0
    save_file(weights, folder.path / "fragile" / "model.safetensors", metadata={"format": "pt"})
    return folder.path


@pytest.fixture(scope="module")
def healthy(models: Path) -> Search:
    return search(models, "healthy.yaml", "--batches", "4")


@pytest.fixture(scope="module")
def fragile(models: Path) -> Search:
    return search(models, "fragile.yaml", "--batches", "4", "training.max_steps=4")


@pytest.fixture(scope="module")
def narrow(models: Path) -> Search:
    """Two formats, and next to nothing tolerated."""
    return search(models, "healthy.yaml", "--batches", "2", "--candidates", "fp32,bf16", "--tolerance", "1e-7")


def test_exactly_the_fragile_layer_is_kept_high(fragile: Search) -> None:
    assert {name for name, precision in fragile.assigned.items() if precision != "fp8"} == {"lm_head", FRAGILE}
    assert fragile.assigned[FRAGILE] in WIDER
    assert "output head" in fragile.layers["lm_head"]["reason"]


def test_its_healthy_twin_keeps_none_but_the_head(healthy: Search) -> None:
    assert {name for name, precision in healthy.assigned.items() if precision != "fp8"} == {"lm_head"}


def test_the_reason_is_measured_and_printed(fragile: Search, healthy: Search) -> None:
    there, twin = (found.layers[FRAGILE]["formats"]["fp8"] for found in (fragile, healthy))
    if fragile.assigned[FRAGILE] == "bf16":
        assert fragile.layers[FRAGILE]["reason"] == f"fp8: {there['flaw']}"
        assert f"{FRAGILE} (1 x) in bf16, not fp8: {there['flaw']}" in fragile.done.stderr
    assert there["flaw"] is not None
    assert there["underflow"]["input"] > 0.2 > 0.01 > twin["underflow"]["input"]
    assert there["channel_db"]["weight_gradient"] < 10 < 20 < twin["channel_db"]["weight_gradient"]
    assert twin["flaw"] is None


def test_the_loss_moves_about_as_predicted(healthy: Search, fragile: Search) -> None:
    for found in (healthy, fragile):
        report = found.report
        assert report["failed_verifications"] == []
        assert report["verified"]["loss_change"] < report["tolerated_loss_change"]
        # Layers add as squares, and attention between them is rounded too.
        assert 1 / 4 < report["verified"]["loss_change"] / report["predicted_loss_change"] < 4


def test_the_table_says_where_the_times_come_from(healthy: Search) -> None:
    sources = healthy.report["time_sources"]
    assert sources["fp32"] == "measured"
    assert sources["fp8"] in ("assumed", "table")  # no CPU computes fp8
    assert f"% {sources['fp8']}" in healthy.done.stderr


def test_the_written_recipe_says_what_json_says_and_keeps_the_text(fragile: Search) -> None:
    assert fragile.block == fragile.report["precision"]
    assert fragile.block["layers"][FRAGILE] in WIDER
    text = (fragile.folder / fragile.written).read_text(encoding="utf-8")
    assert "# A comment that stays.\nmodel: ./fragile  # trained for a moment\n" in text
    assert "  max_steps: 4\n  save_steps: 3  # once\n" in text
    assert load_recipe(fragile.folder / fragile.written).training_keys["max_steps"] == 4


def test_the_written_recipe_trains_as_it_was_found(fragile: Search) -> None:
    folder = Folder(fragile.folder)
    done = folder.train(fragile.written, "--name", "found")
    assert done.returncode == 0, done.stderr
    assert "audit passed" in done.stderr
    attempt = fragile.folder / "runs" / "found" / "attempts" / "001"
    planned = json.loads((attempt / "plan.json").read_text(encoding="utf-8"))["values"]["layers"]["value"]["modules"]
    planned = {entry["name"]: entry["precision"] for entry in planned}
    assert {name: planned.get(name, "bf16") for name in fragile.assigned} == fragile.assigned


def test_candidates_and_tolerance_have_an_effect(narrow: Search) -> None:
    assert narrow.report["candidates"] == ["fp32", "bf16"]
    assert narrow.report["tolerated_loss_change"] == pytest.approx(1e-7 * narrow.report["reference_loss"])
    assert "fp32" in narrow.assigned.values()
    assert "fp8" not in narrow.assigned.values()
    assert all(set(layer["formats"]) == {"bf16"} for layer in narrow.layers.values())


def test_a_file_that_exists_is_refused_before_anything_is_measured(models: Path) -> None:
    done = subprocess.run(
        [*MPT, "search-precision", "healthy.yaml", "-o", "fragile.yaml"],
        cwd=models, env=environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "fragile.yaml exists" in done.stderr
    assert "measuring" not in done.stderr
    assert (models / "fragile.yaml").read_text(encoding="utf-8") == RECIPE.format(model="./fragile")
