"""A plan written as a plain Trainer script: it trains the very same run, without mpt, and any linter likes it."""

import ast
import csv
import json
import os
import runpy
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import Plan, resolve
from mpt.planning.script import to_script
from mpt.planning.script_parts.assembly import embed, part
from mpt.running.run_directory import RunDirectory
from tests.cli.real_runs import Folder
from tests.training.forks import carry_out
from tests.training.tiny_runs import FP16, Run, save_base, tiny_recipe

RUFF = (str(Path(sys.executable).with_name("ruff")), "check", "--isolated", "--line-length", "120")
# The scripts run where mpt can't be imported: what they do must not come from there.
WITHOUT_MPT = """
import runpy, sys
sys.modules["mpt"] = None
def run(script):
    runpy.run_path(script, run_name="__main__")
"""
ALLOWED = {
    *("torch", "transformers", "datasets", "tokenizers", "accelerate", "deepspeed", "peft", "torchao", "numpy"),
    *sys.stdlib_module_names,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}  # with its dropout of 0.1
STEPS = {"max_steps": 5, "learning_rate": 3e-3, "save_steps": 3, "logging_steps": 1}


def plan_of(machine: str = "cpu", **changes: Any) -> Plan:
    """Plan the tiny recipe with changes."""
    recipe = tiny_recipe(**changes)
    modules = learn_modules(recipe)
    return resolve(recipe, parse_machine(machine), learn_model_facts(recipe), name="tiny", modules=modules)


def two_processes(strategy: str) -> dict[str, Any]:
    return {"distributed": {"strategy": strategy, "processes_per_node": 2}, "micro_batch_size": 4}


def files_of_every_format(folder: Path) -> list[str]:
    """Write the reference in every format, with the cells and rows that readers like to change."""
    texts = [topics[name] for name in sorted(topics)][:24]
    folder.joinpath("b.txt").write_text(texts[0])
    folder.joinpath("a.md").write_text(texts[1])
    with folder.joinpath("c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *(["7", text] for text in ["NA", "null", *texts[2:8]])])
    rows = [{"text": text, "id": number} for number, text in enumerate(["", *texts[8:16]])]
    folder.joinpath("d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder.joinpath("e.json").write_text(json.dumps(rows[::-1]))
    folder.joinpath("columns").mkdir()
    folder.joinpath("columns", "g.csv").write_text("text,body\n" + "not this,This is to be learnt.\n" * 9)
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array(texts[16:], pyarrow.large_string())})
    pyarrow.parquet.write_table(table, folder / "f.parquet")
    return [str(folder / "*.*"), str(folder / "b.txt")]


# --- the same run


RUNS: dict[str, dict[str, Any]] = {
    "fp32_padded_accumulated": {
        "model": {"config": GPT2},
        "data": {"source": "files", "packing": False},
        "gradient_accumulation_steps": 2,
        # Dropout and evaluations draw from one random state.
        "training": STEPS | {"eval_strategy": "steps", "eval_steps": 2},
    },
    "bf16_packed": {"precision": "bf16", "training": STEPS | {"adam_beta2": 0.95}, "sample": "The "},
    "fp16": {
        # The first scale overflows, so that steps are skipped and the scale moves.
        "precision": FP16 | {"loss_scale": {"initial": 2.0**21, "growth_interval": 2}},
        "data": {"source": "files"},
        "training": STEPS,
    },
    "bf16_pure": {"precision": "bf16_pure", "data": {"source": "files"}, "training": STEPS},
    "fp8": {
        "precision": {"mode": "fp8", "allow_emulation": True, "fp8": {"keep_first": 0, "keep_last": 0}},
        "data": {"source": "files"},
        "training": STEPS,
    },
    "adapters_with_dropout": {
        "model": {"name_or_path": "base", "config": None},
        "tokenizer": None,
        "precision": "bf16",
        "lora": {"rank": 4, "dropout": 0.1},
        "data": {"source": "files"},
        "training": STEPS,
    },
    "quantized_dora": {
        "model": {"name_or_path": "base", "config": None},
        "tokenizer": None,
        "precision": "bf16",
        "lora": {"rank": 4, "dora": True, "target_modules": ["mlp", "q_proj"], "modules_to_save": ["lm_head"]},
        "quantization": {"skip_modules": ["down_proj"]},
        "data": {"source": "files"},
        "training": STEPS | {"eval_strategy": "steps", "eval_steps": 2},
    },
    "pissa": {
        "model": {"name_or_path": "base", "config": None},
        "tokenizer": None,
        "lora": {"rank": 4, "init": "pissa", "rank_pattern": {"down_proj": 8}},
        "data": {"source": "files"},
        "training": STEPS,
    },
    "islands": {
        "precision": {"mode": "bf16", "layers": {"lm_head": "fp32", "*norm*": "fp32"}},
        "data": {"source": "files"},
        "training": STEPS,
    },
    "ddp": {"precision": "bf16", "data": {"source": "files"}, "training": STEPS} | two_processes("ddp"),
    "zero2": {"precision": "bf16", "data": {"source": "files"}, "training": STEPS} | two_processes("zero2"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Path]]:
    """Train each recipe by mpt's worker and by its script: (the run, the script's output)."""
    folder = tmp_path_factory.mktemp("trained")
    source = files_of_every_format(tmp_path_factory.mktemp("data"))
    base = save_base(folder / "base")
    done, scripts = {}, []
    for name, changes in RUNS.items():
        if "lora" in changes:
            changes = changes | {"model": {"name_or_path": base, "config": None}}
        if "data" in changes:
            changes = changes | {"data": changes["data"] | {"source": source}}
        # A file is read twice, and what is held out stands in what is trained on.
        changes = changes | {"preflight": {"ignore": ["evaluation_overlap"]}}
        run, output = Run(RunDirectory(folder / f"{name}_run"), tiny_recipe(**changes)), folder / name
        run.prepare()
        folder.joinpath(f"{name}.py").write_text(to_script(plan_of(**changes)))
        processes = changes.get("distributed", {}).get("processes_per_node", 1)
        assert run.start(processes=processes).wait(timeout=400) == 0, run.log()
        scripts.append({"argv": [f"{output}.py", str(output)], "processes": processes, "log": f"{output}.log"})
        done[name] = (run, output)
    ended = carry_out(WITHOUT_MPT, scripts, folder)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return done


@pytest.mark.slow
@pytest.mark.timeout(1200)  # eighteen trainings; on a busy machine they take their time
@pytest.mark.parametrize("name", RUNS)
def test_the_script_repeats_the_run_bit_for_bit(trained: dict[str, tuple[Run, Path]], name: str) -> None:
    run, output = trained[name]
    rows = json.loads(output.joinpath("trainer_state.json").read_text())["log_history"]
    logged = [(row["loss"], as_logged(row["grad_norm"])) for row in rows if "loss" in row]
    # The Trainer sums a step's micro batches and ranks in fp32; mpt's row holds the same sum in fp64.
    assert logged == [(as_fp32(row["loss"]), row["grad_norm"]) for row in run.steps.values()]
    assert len(logged) == STEPS["max_steps"]
    rates = [row["learning_rate"] for row in run.steps.values()]
    if name == "zero2":
        # DeepSpeed's engine moves the schedule on within the step, and the Trainer logs the rate of the one that comes.
        rates = [*rates[1:], 0.0]
    assert [row["learning_rate"] for row in rows if "loss" in row] == rates
    assert any(row["skipped"] for row in run.steps.values()) == (name == "fp16")
    saved = files_in(run.directory.final)
    assert ("adapter_model.safetensors" if "lora" in RUNS[name] else "model.safetensors") in saved
    assert files_in(output / "final") == saved


# Dropout, accumulation and an evaluation between; and two processes.
RESUMED = ("fp32_padded_accumulated", "ddp")


@pytest.fixture(scope="module")
def resumed(trained: dict[str, tuple[Run, Path]]) -> dict[str, Path]:
    """Let the scripts go on from the runs' own checkpoints: the scripts' output."""
    outputs, scripts = {}, []
    for name in RESUMED:
        run, output = trained[name]
        outputs[name] = output.with_name(f"{name}_resumed")
        shutil.copytree(run.directory.checkpoints / "checkpoint-3", outputs[name] / "checkpoint-3")
        processes = RUNS[name].get("distributed", {}).get("processes_per_node", 1)
        argv = [f"{output}.py", str(outputs[name]), "--resume"]
        scripts.append({"argv": argv, "processes": processes, "log": f"{outputs[name]}.log"})
    ended = carry_out(WITHOUT_MPT, scripts, outputs["ddp"].parent)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RESUMED)
def test_a_plain_trainer_goes_on_from_the_run_s_checkpoint_bit_for_bit(
    trained: dict[str, tuple[Run, Path]], resumed: dict[str, Path], name: str
) -> None:
    run = trained[name][0]
    rows = json.loads(resumed[name].joinpath("trainer_state.json").read_text())["log_history"]
    logged = {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row and row["step"] > 3}
    assert logged == {step: (as_fp32(run.steps[step]["loss"]), run.steps[step]["grad_norm"]) for step in (4, 5)}
    assert files_in(resumed[name] / "final") == files_in(run.directory.final)


def files_in(folder: Path) -> dict[str, Any]:
    """Read every file; peft writes a set, whose order is another in each process."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "adapter_config.json" in found:
        config = json.loads(found["adapter_config.json"])
        found["adapter_config.json"] = config | {"target_modules": sorted(config["target_modules"])}
    return found


def as_fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def as_logged(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)


# --- the same samples


DATA: dict[str, dict[str, Any]] = {
    "every format": {},
    "every format, padded": {"packing": False},
    "the builtin corpus beside a file": {"source": ["builtin:python-reference", "b.txt"]},
    "another source to evaluate on": {"source": "d.jsonl", "eval_source": ["e.json", "f.parquet"]},
    "another column": {"source": "columns/g.csv", "text_column": "body", "sequence_length": 9},
    "nothing held out": {"eval_fraction": 0},
    "one document, whose end is held out": {"source": "b.txt", "eval_fraction": 0.3, "sequence_length": 64},
    "less than a block held out": {"source": "b.txt", "eval_fraction": 0.05, "sequence_length": 64},
    "streamed": {"source": ["d.jsonl", "*.json"], "streaming": True, "eval_fraction": 0},
    "streamed, padded": {"source": "d.jsonl", "streaming": True, "packing": False, "eval_source": "e.json"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return files_of_every_format(tmp_path_factory.mktemp("files"))


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_the_script_reads_holds_out_and_cuts_the_same_samples(
    files: list[str], data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpt.training.data import prepare_samples, read_documents
    from mpt.training.tokenizer import train_tokenizer

    monkeypatch.chdir(Path(files[0]).parent)
    plan = plan_of(data={"source": files, "sequence_length": 48} | data, training=STEPS)
    documents = read_documents(plan.recipe.data, seed=42)
    tokenizer = train_tokenizer((row["text"] for row in documents.train), 300)
    size, packing = plan.value("sequence_length"), plan.value("packing")
    samples = prepare_samples(documents, tokenizer, sequence_length=size, packing=packing, source="")

    tmp_path.joinpath("script.py").write_text(to_script(plan))
    script = runpy.run_path(str(tmp_path / "script.py"), run_name="script")
    read = script["read_documents"](42)
    built = script["build_samples"](*read, tokenizer)
    for ours, theirs in zip((samples.train, samples.held_out), built, strict=True):
        assert tokens(ours) == tokens(theirs)
    assert tokens(samples.train)
    assert bool(tokens(samples.held_out)) == (plan.recipe.data.eval_fraction > 0 or data.get("eval_source") is not None)


def tokens(samples: Any) -> list[list[int]]:
    if samples is None:
        return []
    rows = samples if not hasattr(samples, "__len__") else (samples[index] for index in range(len(samples)))
    return [[int(token) for token in row["input_ids"]] for row in rows]


# --- any plan


HOSTILE = '"""\nimport os\\\r\x00 \u2028\u202e{NAME} %s 🤗\''
PATH = 'a"\\\n\u2028/' + "long" * 40 + ".txt"
TRANSFORMER_ENGINE = {"backend": "transformer_engine", "auto_filter": False}
CHECKPOINT = {"model": {"name_or_path": "meta-llama/Llama-2-7b-hf", "config": None}, "tokenizer": None}
PLANS: dict[str, Callable[[], Plan]] = {
    "bf16 on one GPU": lambda: plan_of("H100", precision="auto"),
    "fp16 on an old GPU": lambda: plan_of("T4", precision="fp16"),
    "fp16 with a floor": lambda: plan_of(precision=FP16 | {"loss_scale": {"min": 16, "hysteresis": 2}}),
    "fp16, fixed scale": lambda: plan_of(precision=FP16 | {"loss_scale": {"static": 1024}}),
    "tf32": lambda: plan_of("A100-80GB", precision="tf32"),
    "two processes": lambda: plan_of(distributed={"processes_per_node": 2}),
    "zero1, one process": lambda: plan_of("H100", distributed={"strategy": "zero1"}),
    "zero2, fp16": lambda: plan_of("2xT4", precision="fp16", distributed={"strategy": "zero2"}),
    "zero3": lambda: plan_of("8xH100", precision="bf16", distributed={"strategy": "zero3"}),
    "zero3, checkpoint": lambda: plan_of("8xH100", **CHECKPOINT, distributed={"strategy": "zero3"}, offload="cpu"),
    "pure bf16": lambda: plan_of(precision={"mode": "bf16_pure", "grad_accum_dtype": "fp32"}),
    "pure bf16, islands": lambda: plan_of(precision={"mode": "bf16_pure", "layers": {"*norm*": "fp32"}}),
    "pure bf16, ddp": lambda: plan_of("2xA100-80GB", precision="bf16_pure", distributed={"strategy": "ddp"}),
    "pure bf16, zero2": lambda: plan_of("2xA100-80GB", precision="bf16_pure", distributed={"strategy": "zero2"}),
    "fp8": lambda: plan_of("H100", precision={"mode": "fp8", "fp8": {"auto_filter": False}}),
    "fp8 beside fp32": lambda: plan_of(
        precision={"mode": "bf16", "layers": {"*.mlp.*": "fp8", "lm_head": "fp32"}, "allow_emulation": True}
    ),
    "adapters": lambda: plan_of("A100-80GB", **CHECKPOINT, lora={"rank": 4, "target_modules": ["q_proj", "v_proj"]}),
    "adapters, merged": lambda: plan_of("A100-80GB", **CHECKPOINT, lora={"rank": 4, "merge": True, "rslora": True}),
    "qlora": lambda: plan_of("RTX 4090", **CHECKPOINT, lora={"rank": 4}, quantization={"type": "fp4"}),
    "8 bits": lambda: plan_of("T4", **CHECKPOINT, lora={"init": "gaussian"}, quantization={"bits": 8}),
    "hub data": lambda: plan_of(data={"source": "hub:an/owner", "config": "x", "eval_split": "validation"}),
    "streamed hub data": lambda: plan_of(data={"source": "hub:an/owner", "streaming": True}, training=STEPS),
    "what a recipe may say": lambda: plan_of(description=HOSTILE + PATH, data={"source": PATH}, sample=HOSTILE),
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for name, make in PLANS.items():
        text = to_script(make())
        folder.joinpath(f"{name.replace(' ', '_').replace(',', '')}.py").write_text(text, encoding="utf-8")
    return folder


def test_every_script_passes_ruff(scripts: Path) -> None:
    done = subprocess.run(
        [*RUFF, "--select", "E,F,W,I,UP,B", str(scripts)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert len(list(scripts.glob("*.py"))) == len(PLANS)


def test_every_script_compiles_and_imports_nothing_of_mpt(scripts: Path) -> None:
    for path in scripts.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"), path.name)
        compile(tree, path.name, "exec")
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module.partition(".")[0] for module in modules} <= ALLOWED, path.name


def constants_of(script: str) -> dict[str, Any]:
    """Read the constants that are literals."""
    found = {}
    for node in ast.parse(script).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with suppress(ValueError):  # torch.bfloat16
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


@pytest.mark.parametrize("name", ["zero2, fp16", "zero3, checkpoint", "fp8", "adapters"])
def test_the_constants_are_the_plan_s_values(name: str) -> None:
    plan = PLANS[name]()
    constants = constants_of(to_script(plan))
    keywords = {key: value for key, value in plan.training_arguments.items() if key != "disable_tqdm"}
    assert constants["TRAINING_ARGUMENTS"] == keywords | {"save_total_limit": 5}
    assert constants.get("DEEPSPEED") == plan.deepspeed
    assert constants.get("WORLD_SIZE", 1) == plan.value("world_size")
    listed = plan.value("layers")["modules"] if plan.value("layers") else []
    assert constants.get("FP8_MODULES", []) == [entry["name"] for entry in listed if entry["precision"] == "fp8"]


def test_what_a_recipe_says_comes_through_as_it_was_said() -> None:
    constants = constants_of(to_script(PLANS["what a recipe may say"]()))
    assert (constants["PROMPTS"], constants["SOURCE"]) == ([HOSTILE], PATH)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "sft"}, "task: sft"),
        ({"task": "masked_lm"}, "task: masked_lm"),
        ({"metrics": ["token_accuracy"]}, "metrics"),
        ({"early_stopping": {}, "training": {"eval_strategy": "steps"}}, "early_stopping"),
        ({"distributed": {"strategy": "fsdp2"}}, "fsdp2"),
        ({"machine": "H100", "compile": "regional"}, "compile: regional"),
        ({"precision": {"mode": "fp8", "fp8": TRANSFORMER_ENGINE}}, "transformer_engine"),
        ({"machine": "2x8xH100"}, "2 nodes"),
        ({"data": {"source": "a.jsonl", "max_bad_rows": 3}}, "data.max_bad_rows"),
        ({"data": {"source": ["a.jsonl", "b.jsonl.zst"]}}, "packed files"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_that_no_plain_trainer_carries_out_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MptError, match="no script can be written") as refusal:
        to_script(plan_of(**{"machine": "8xH100", **changes}))
    assert says in refusal.value.problem
    assert refusal.value.remedy.endswith(".")


@pytest.mark.parametrize("name", ["float8", "no_such_module"])
def test_a_module_that_can_not_stand_alone_is_never_embedded(name: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        embed(name)


def test_the_head_says_how_to_start_it_and_what_it_leaves_out() -> None:
    lines = to_script(PLANS["zero3"](), {"torch": "9.8"}).partition("\nimport")[0].splitlines()
    assert all(line == "" or line.startswith("#") for line in lines)
    head = " ".join(line.removeprefix("#").strip() for line in lines)
    for words in ("torchrun --nproc-per-node 8 ", "torch 9.8", "precision bf16: ", "NaN", "the audit", "the journal"):
        assert words in head
    assert "the restart after a crash (`restart`)" in head
    assert "the comparison with another precision before the run (`compare`), and its bounds" in head


# --- the command


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "work")
    made.write()
    return made


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--emit-script", "tiny.yaml"], "tiny.yaml exists, and is not overwritten"),
        (["--emit-script", "no/such/folder.py"], "there is no directory no/such"),
        (["--emit-script", "plain.py", "task=sft", "data.source=builtin:python-questions"], "for task: sft"),
        (["--emit-script", "plain.py", "--dry-run"], "--dry-run with --emit-script"),
        (["--emit-script", "plain.py", "--json"], "--json with --emit-script"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_script_that_can_not_be_written_is_refused_and_nothing_is(
    folder: Folder, arguments: list[str], says: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    done = folder.train("tiny.yaml", *arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if "--json" in arguments:
        assert json.loads(done.stdout)["outcome"] == "refused"
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_a_comparison_that_a_script_leaves_out_is_told(folder: Folder) -> None:
    asked = ("--compare-to", "fp32", "--require", "max_loss_gap=0.02")
    done = folder.train("tiny.yaml", "--emit-script", "plain.py", *asked)
    assert done.returncode == 0, done.stderr
    assert "note: the script does not compare with fp32 before it trains, as compare.to asks" in done.stderr
    assert (
        folder.train("tiny.yaml", "--emit-script", "other.py").stderr.count("note:") == done.stderr.count("note:") - 1
    )


@pytest.mark.parametrize(("world_size", "code"), [(None, 1), ("1", 1), ("2", 0)])
def test_a_script_for_several_processes_wants_its_launcher(world_size: str | None, code: int) -> None:
    program = f"import os, sys\nWORLD_SIZE = 2\n{part('check_launcher').text}\ncheck_launcher()"
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    environment |= {} if world_size is None else {"WORLD_SIZE": world_size}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code
    assert ("torchrun --nproc-per-node 2" in done.stderr) == bool(code)
