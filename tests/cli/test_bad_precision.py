"""Wrong wishes about precision on the real command line: one message with problem and remedy, the documented exit code,
no traceback, and no torch in the process that says so."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.real_runs import ROOT

RECIPE = """\
model:
  config:
    model_type: llama
    hidden_size: 64
    intermediate_size: 128
    num_hidden_layers: 2
    num_attention_heads: 4
    max_position_embeddings: 64
data: {source: builtin:python-reference, sequence_length: 64}
global_batch_size: 4
"""
# `python -m mpt`, and a code of its own where torch came in on the way.
PROGRAM = """\
import os, sys
from mpt.cli.main import main
try:
    main()
finally:
    sys.stdout.flush(), sys.stderr.flush()
    if {"torch", "transformers", "torchao"} & set(sys.modules):
        os._exit(99)
"""


@dataclass(frozen=True)
class Folder:
    """A working directory with recipes, and what mpt has remembered of models since the first command."""

    path: Path
    home: Path

    def write(self, name: str, text: str = "") -> str:
        """Write the recipe with more lines at its end."""
        self.path.joinpath(name).write_text(RECIPE + text, encoding="utf-8")
        return name

    def mpt(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"XDG_CACHE_HOME": str(self.home), "HF_HOME": str(self.home / "huggingface"), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            capture_output=True, text=True, cwd=self.path, env=environment, timeout=120, check=False,
        )  # fmt: skip

    @property
    def learnt(self) -> list[Path]:
        """What a child process with torch was asked for."""
        return sorted(self.home.rglob("*.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made = Folder(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("home"))
    made.write("tiny.yaml")
    gemma = made.path / "gemma"
    gemma.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "gemma2", "vocab_size": 1000, "head_dim": 16, "num_key_value_heads": 4, "dtype": "bfloat16"}
    gemma.joinpath("config.json").write_text(json.dumps(config | sizes))
    return made


def assert_refused(done: "subprocess.CompletedProcess[str]", code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    problem, remedy = done.stderr.strip().split("\n  ")  # one problem, one remedy
    assert problem.startswith("error: ")
    assert remedy.endswith((".", "`")) and len(remedy.split()) > 3, remedy
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("wish", "code", "said"),
    [
        (["precision=bf16", "--machine", "V100"], 3, ["Tesla V100", "only emulate bf16", "precision: fp16"]),
        (["precision=bf16_pure", "--machine", "T4"], 3, ["Tesla T4", "precision: fp16"]),
        (["precision=fp16", "model=google/gemma-2-2b-it", "--machine", "T4"], 2, ["65504", "precision: fp32"]),
        (["precision=fp16", "model=./gemma", "--machine", "H100"], 2, ["65504", "precision: bf16", "layers"]),
        (
            ["precision={mode: fp16, loss_scale: {static: 1.0e+9}}", "--machine", "T4"],
            2,
            ["precision.loss_scale.static is 1e+09", "with 256 tokens a step", "65536 or less"],
        ),
        (
            ["precision={mode: bf16, grad_accum_dtype: bf16}", "--machine", "A100"],
            2,
            ["precision.grad_accum_dtype: bf16", "single accumulates gradients in fp32", "zero2"],
        ),
        (
            ["precision=bf16_pure", "training.optim=adafactor", "--machine", "A100"],
            2,
            ["training.optim is adafactor", "rounding: nearest"],
        ),
        (
            ["precision=bf16_pure", "training.optim_args=eps=1e-6", "--machine", "A100"],
            2,
            ["training.optim_args", "has no effect", "adam_epsilon"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_wish_that_needs_no_module_is_refused_without_building_a_model(
    wish: list[str], code: int, said: list[str], folder: Folder
) -> None:
    before = folder.learnt
    assert_refused(folder.mpt("plan", "tiny.yaml", *wish), code, *said)
    assert folder.learnt == before


@pytest.mark.parametrize(
    ("wish", "code", "said"),
    [
        (["precision=fp8", "--machine", "T4"], 3, ["Tesla T4", "only emulate fp8", "allow_emulation: true"]),
        (["precision=mxfp8", "--machine", "RTX 5090"], 3, ["RTX 5090", "not even emulated", "precision: fp8"]),
        (["precision=fp8", "--machine", "H100"], 2, ["not one linear layer", "too small to gain", "auto_filter"]),
        (
            ["precision={mode: fp8, allow_emulation: true, fp8: {backend: transformer_engine}}", "--machine", "cpu"],
            3,
            ["transformer_engine can't compute fp8 on a CPU", "torchao"],
        ),
        (
            ["precision={mode: fp8, fp8: {recipe: delayed}}", "--machine", "H100"],
            2,
            ["torchao has no delayed", "backend transformer_engine"],
        ),
        (
            ['precision={mode: bf16, layers: {"*.mpl.*": fp32}}', "--machine", "A100"],
            2,
            ['"*.mpl.*" matches no module', "did you mean *.mlp?", "down_proj"],
        ),
        (
            ['precision={mode: bf16, layers: {"*.mlp": fp32, "*.1.*": bf16}}', "--machine", "A100"],
            2,
            ['"*.mlp": fp32 and "*.1.*": bf16 fight over model.layers.1.mlp.gate_proj', "narrower"],
        ),
        (
            ["precision={mode: fp16, layers: {lm_head: bf16}}", "--machine", "T4"],
            3,
            ["Tesla T4 has no native bf16", "allow_emulation: true"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_wish_about_layers_is_refused_with_the_layers_named(
    wish: list[str], code: int, said: list[str], folder: Folder
) -> None:
    assert_refused(folder.mpt("plan", "tiny.yaml", *wish), code, *said)
    assert len(folder.learnt) == 1  # one child for all of these


def test_plan_and_dry_run_say_that_fp8_is_emulated(folder: Folder) -> None:
    wish = ["tiny.yaml", "--machine", "cpu", "precision={mode: fp8, allow_emulation: true}"]
    for command in (["plan", *wish], ["train", *wish, "--dry-run"]):
        done = folder.mpt(*command)
        assert done.returncode == 0, done.stderr
        assert "EMULATED" in done.stdout and "which has no fp8: right numbers, slower than fp32" in done.stdout
        assert "EMULATED: this machine has no fp8 units; right numbers, slower than bf16" in done.stdout


def test_a_dry_run_refuses_as_the_plan_does_and_writes_nothing(folder: Folder) -> None:
    wish = ["tiny.yaml", "precision=bf16", "--machine", "V100"]
    plan, train = folder.mpt("plan", *wish), folder.mpt("train", *wish, "--dry-run")
    assert_refused(train, 3, "Tesla V100")
    assert train.stderr == plan.stderr
    assert not folder.path.joinpath("runs").exists()


CONTRADICTIONS = {
    "rounding": ("rounding: stochastic", "remove rounding"),
    "master_weights": ("master_weights: none", "ask for mode bf16_pure"),
    "loss_scale": ("loss_scale: {static: 1024}", "remove loss_scale"),
    "layers": ("layers: {}", "name modules"),
    "layers.lm_head": ("layers: {lm_head: fp7}", "did you mean fp8?"),
    "fp8": ("fp8: {recipe: rowwise}", "remove it"),
    "fp8.recipe": ("fp8: {recipe: rowise}", "did you mean rowwise?"),
    "fp8.keep_first": ("fp8: {keep_first: -1}", "at least 0"),
    "reduce_dtype": ("reduce_dtype: fp8", "write fp32, bf16, fp16"),
}


def test_what_contradicts_itself_is_found_in_the_recipe_alone_with_its_line_and_what_to_write(folder: Folder) -> None:
    wrong = {
        key: folder.write(f"{key}.yaml", f"precision:\n  mode: bf16\n  {text}\n")
        for key, (text, _) in CONTRADICTIONS.items()
    }
    done = folder.mpt("validate", *wrong.values())
    assert (done.returncode, done.stderr) == (2, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(wrong)
    for said, (key, name) in zip(lines, wrong.items(), strict=True):
        assert said.startswith(f"{name}:{RECIPE.count(chr(10)) + 3}: precision.{key}: ")
        assert CONTRADICTIONS[key][1] in said.rpartition("; ")[2], said
    assert_refused(folder.mpt("plan", wrong["rounding"], "--machine", "A100"), 2, lines[0])


def test_rounding_without_pure_bf16_is_an_error_of_the_argument_that_says_it(folder: Folder) -> None:
    done = folder.mpt("train", "tiny.yaml", "precision={mode: bf16, rounding: kahan}", "--dry-run", "--machine", "A100")
    assert_refused(done, 2, "precision={mode: bf16, rounding: kahan}: precision.rounding:", "bf16_pure", "rounding")


def test_a_plan_with_layers_is_a_table_for_people_and_every_layer_by_name_for_programs(folder: Folder) -> None:
    wish = ["tiny.yaml", 'precision={mode: bf16, layers: {"*.mlp": fp8, lm_head: fp32}}', "--machine", "H100"]
    table, plan = folder.mpt("plan", *wish), json.loads(folder.mpt("plan", *wish, "--json").stdout)
    assert table.returncode == 0
    assert "layers: 8 in bf16, 6 in fp8, 1 in fp32  (asked)" in table.stdout
    assert "2 x  model.layers.{0,1}.mlp.up_proj" in table.stdout
    modules = plan["values"]["layers"]["value"]["modules"]
    assert len(modules) == 15
    assert {"name": "lm_head", "precision": "fp32", "reason": "precision.layers: lm_head"} in modules
