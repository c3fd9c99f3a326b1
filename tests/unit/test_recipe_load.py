"""A recipe file becomes a Recipe, or a list of everything that is wrong with it, each with its line and remedy."""

from pathlib import Path

import pytest

from mpt.errors import RecipeError, RecipeProblem
from mpt.recipe.load import check_recipe, load_recipe
from mpt.recipe.schema import Recipe
from mpt.recipe.yaml_text import read_yaml

MINIMAL = "model: gpt2\ndata: a.txt\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def load(folder: Path, text: str | bytes, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def check(folder: Path, text: str | bytes, *overrides: str) -> list[RecipeProblem]:
    problems = check_recipe(write(folder, text), overrides)
    for problem in problems:
        assert problem.file and problem.problem and problem.suggestion, problem
        assert "function-" not in str(problem) and "literal[" not in str(problem), problem
    return problems


def only(folder: Path, text: str | bytes, *overrides: str) -> RecipeProblem:
    problems = check(folder, text, *overrides)
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+8", 8),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("TRUE", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("'8'", "8"),
        ('"true"', "true"),
        ("!!str 8", "8"),
        ('!!int "8"', 8),
        ("!!float 8", 8.0),
        ("e5", "e5"),
        ("1e", "1e"),
        ("-", ["a"]),
    ],
)
def test_a_plain_value_is_read_by_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    if text == "-":
        text = "[a]"
    read = read_yaml(f"a: {text}").value["a"]
    assert read == value
    assert type(read) is type(value)


def test_keys_are_the_text_that_was_written() -> None:
    value = read_yaml("{no: 1, 0: a, 2024-01-31: b, null: c, 1.50: d}").value
    assert list(value) == ["no", "0", "2024-01-31", "null", "1.50"]


def test_every_key_and_item_has_its_line() -> None:
    lines = read_yaml("a: 1\n\n# a word\nb:\n  - x\n  - c: 2\n    d: 3\n").lines
    assert lines[("a",)] == 1
    assert lines[("b",)] == 4
    assert lines[("b", 0)] == 5
    assert lines[("b", 1, "d")] == 7


def test_anchors_aliases_and_merges_give_plain_values() -> None:
    text = "base: &b {x: 1, y: 2}\nother: &o {y: 3, z: 4}\none: {<<: *b, y: 9}\nboth: {<<: [*b, *o]}\nsame: *b\n"
    value = read_yaml(text).value
    assert value["one"] == {"x": 1, "y": 9}
    assert value["both"] == {"x": 1, "y": 2, "z": 4}
    assert value["same"] == {"x": 1, "y": 2}
    value["same"]["x"] = 5
    assert value["base"]["x"] == 1


def test_an_alias_bomb_is_refused_before_it_is_built(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "values" in only(folder, "\n".join(lines)).problem


@pytest.mark.parametrize("text", ["[" * 50_000, "a: " + "[" * 5000 + "]" * 5000, "- " * 3000, "{a: " * 3000])
def test_deep_nesting_is_refused_and_not_a_crash(folder: Path, text: str) -> None:
    assert "nested" in only(folder, text).problem


def test_aliases_do_not_stack_up_beyond_the_depth(folder: Path) -> None:
    text = "a: &a " + "[" * 30 + "]" * 30 + "\nb: " + "[" * 30 + "*a" + "]" * 30
    assert "nested" in only(folder, text).problem


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (b"", 1, "no keys"),
        (b"# nothing but a comment\n", 1, "no keys"),
        (b"---\n", 1, "no keys"),
        (b"- model: gpt2\n", 1, "must be a map"),
        (b"gpt2\n", 1, "must be a map"),
        (b"model: gpt2\ndata: a\n---\nmodel: gpt2\n", 3, "second document"),
        (b"model: gpt2\n\tdata: a\n", 2, "tab"),
        (b"model:\n\tname_or_path: gpt2\n", 2, "tab"),
        (b"model: gpt2\ndata: \xff\xfe\n", 2, "UTF-8"),
        ("model: gpt2\n".encode("utf-16"), 1, "UTF-16"),
        (b"model: gpt2\ndata: a\x00b\n", 2, "U+0000"),
        (b"model: gpt2\ndata: a\x07b\n", 2, "U+0007"),
        (b"model: gpt2\ndata: [a, b\n", 2, "bracket"),
        (b'model: "gpt2\ndata: a\n', 1, "quote"),
        (b"model: gpt2: large\n", 1, "second `: `"),
        (b"model: gpt2\n data: a\n", 2, "indented"),
        (b"model: gpt2\ntraining:\n  seed: 1\n    optim: sgd\n", 4, "indented"),
        (b"model: gpt2\ndata a.txt\nname: x\n", 3, "`: `"),
        (b"model: *nowhere\n", 1, "no anchor"),
        (b"model: &m [*m]\n", 1, "contains itself"),
        (b"? [a, b]\n: c\n", 1, "can't be a key"),
        (b"model: @gpt2\n", 1, "not YAML"),
        (b"a" * (2**20 + 1), None, "mebibyte"),
    ],
)
def test_what_is_no_yaml_map_is_named_with_its_line(folder: Path, text: bytes, line: int | None, words: str) -> None:
    problem = only(folder, text)
    assert words in problem.problem
    assert problem.line == line


def test_a_byte_order_mark_is_no_part_of_the_first_key(folder: Path) -> None:
    assert load(folder, b"\xef\xbb\xbf" + MINIMAL.encode()).model.name_or_path == "gpt2"


def test_windows_line_ends_are_read(folder: Path) -> None:
    assert load(folder, MINIMAL.replace("\n", "\r\n")).data.source == "a.txt"


def test_a_key_given_twice_is_refused_with_both_lines(folder: Path) -> None:
    problem = only(folder, "model: gpt2\ndata: a\ntraining:\n  seed: 1\n  max_steps: 5\n  seed: 2\n")
    assert (problem.line, problem.key) == (6, "training.seed")
    assert "lines 4 and 6" in problem.problem


def test_a_python_tag_is_refused_and_never_run(folder: Path) -> None:
    marker = folder / "ran"
    text = f"model: gpt2\ndata: !!python/object/apply:os.system ['touch {marker}']\n"
    assert "tag" in check(folder, text)[0].problem
    assert not marker.exists()


def test_a_key_without_a_value_is_not_silently_left_out(folder: Path) -> None:
    problem = only(folder, MINIMAL + "lora:\n")
    assert (problem.key, problem.problem) == ("lora", "has no value")
    assert load(folder, MINIMAL + "lora: {}\n").lora is not None
    assert load(folder, MINIMAL + "lora: null\n").lora is None


def test_a_missing_file_a_directory_and_an_unreadable_one_are_problems(folder: Path) -> None:
    assert "no such file" in check_recipe(folder / "none.yaml")[0].problem
    assert "directory" in check_recipe(folder)[0].problem
    assert "can't be read" in check_recipe(folder / ("x" * 300))[0].problem
    assert "can't be read" in check_recipe(write(folder, "a") / "b")[0].problem


def test_an_endless_file_is_read_only_so_far() -> None:
    assert check_recipe(Path("/dev/zero"))[0].problem == "is larger than a mebibyte"


def test_all_problems_come_at_once_in_the_order_of_their_lines(folder: Path) -> None:
    text = "model: gpt2\nprecison: bf16\ndata: a\nmicro_batch_size: -1\ntraining:\n  learning_rte: 1\n  max_steps: x\n"
    problems = check(folder, text)
    assert [(problem.line, problem.key) for problem in problems] == [
        (2, "precison"),
        (4, "micro_batch_size"),
        (6, "training.learning_rte"),
        (7, "training.max_steps"),
    ]
    with pytest.raises(RecipeError) as raised:
        load(folder, text)
    assert list(raised.value.problems) == problems
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("line", "key", "problem", "suggestion"),
    [
        ("precison: bf16", "precison", "no key", "precision"),
        ("precision: bf17", "precision", "must be auto, fp32, tf32", "bf16"),
        ("precision: {mode: fp61}", "precision.mode", "got 'fp61'", "fp16"),
        ("learning_rate: 1e-4", "learning_rate", "no key", "under training:"),
        ("sequence_length: 8", "sequence_length", "no key", "under data:"),
        ("lr: 1e-4", "lr", "no key", "training.learning_rate"),
        ("fp16: true", "fp16", "no key", "precision: fp16"),
        ("deepspeed: ds.json", "deepspeed", "no key", "strategy: zero2"),
        ("zorgle: 1", "zorgle", "no key", "the keys of a recipe are"),
        ("training: {lerning_rate: 1}", "training.lerning_rate", "no key", "learning_rate"),
        ("training: {micro_batch_size: 1}", "training.micro_batch_size", "no key", "top level"),
        ("training: {warmup_ratio: 0.1}", "training.warmup_ratio", "any more", "warmup_steps"),
        ("training: {bf16: true}", "training.bf16", "not for the recipe", "precision: bf16"),
        ("training: {optim: adamw}", "training.optim", "one of", "adamw_torch"),
        ("training: {eval_strategy: false}", "training.eval_strategy", "no, steps, epoch", "write no"),
        ("training: {learning_rate: '2e-5'}", "training.learning_rate", "a number", "remove the quotes: 2e-5"),
        ("training: {learning_rate: -1}", "training.learning_rate", "at least 0 (got -1)", "at least 0"),
        ("training: {learning_rate: .nan}", "training.learning_rate", "not a finite number", "number"),
        ("training: {learning_rate: 1e400}", "training.learning_rate", "not a finite number", "number"),
        ("training: {adam_beta2: 1}", "training.adam_beta2", "below 1", "below 1"),
        ("training: {num_train_epochs: 0}", "training.num_train_epochs", "above 0", "above 0"),
        ("training: {save_steps: 0}", "training.save_steps", "above 0", "above 0"),
        ("training: {warmup_steps: -1}", "training.warmup_steps", "at least 0", "at least 0"),
        ("training: {warmup_steps: 2.5}", "training.warmup_steps", "whole", "2"),
        ("training: {max_steps: 0}", "training.max_steps", "above 0", "leave it out"),
        ("training: {max_steps: 8.5}", "training.max_steps", "whole number (got 8.5)", "whole number"),
        ("training: {max_steps: 1_000}", "training.max_steps", "got '1_000'", "1000"),
        ("training: {max_steps: 99999999999999999999}", "training.max_steps", "64 bits", "64 bits"),
        ("training: {seed: -1}", "training.seed", "at least 0", "at least 0"),
        ("training: [1]", "training", "map of keys (got a list)", "training: {"),
        ("training: {dataloader_pin_memory: 1}", "training.dataloader_pin_memory", "true or false", "write true"),
        ("training: {dataloader_prefetch_factor: 2}", "training.dataloader_prefetch_factor", "loader", "number"),
        ("micro_batch_size: true", "micro_batch_size", "whole number (got true)", "whole number"),
        ('micro_batch_size: "8"', "micro_batch_size", "got '8'", "remove the quotes: 8"),
        ("gradient_checkpointing: sometimes", "gradient_checkpointing", "auto or true or false", "auto"),
        ("offload: disk", "offload", "auto, none, cpu, nvme or a map", "its keys are optimizer"),
        ("offload: {optimiser: cpu}", "offload.optimiser", "no key", "optimizer"),
        ("offload: {optimizer: nvme}", "offload", "nvme_path goes with nvme", "both or neither"),
        ("task: masked", "task", "no task 'masked'", "did you mean masked_lm?"),
        ("task: my_task", "task", "no task 'my_task'", "my_package.my_task for your own"),
        ("lora: 16", "lora", "map of keys (got 16)", "rank"),
        ("lora: {rank: 0}", "lora.rank", "above 0", "above 0"),
        ("quantization: {bits: 3}", "quantization.bits", "4, 8", "4, 8"),
        ("name: 1", "name", "must be text", 'quotes: "1"'),
        ("name: my run", "name", "letters", "letters"),
        ("sample: ''", "sample", "not an empty one", "prompt"),
        ("tokenizer: {train: byte_level_bpe}", "tokenizer.train", "vocabulary", "leave the tokenizer out"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_explained(folder: Path, line: str, key: str, problem: str, suggestion: str) -> None:
    found = only(folder, MINIMAL + line + "\n")
    assert (found.key, found.line) == (key, 3)
    assert problem in found.problem
    assert suggestion in found.suggestion


@pytest.mark.parametrize(
    "line",
    [
        "training: {max_steps: 1e3}",
        "training: {max_steps: 8.0}",
        "training: {max_steps: -1}",
        "training: {eval_strategy: no}",
        "training: {save_strategy: no}",
        "training: {dataloader_pin_memory: no, torch_compile: off}",
        "training: {logging_steps: 0.1}",
        "training: {report_to: [tensorboard]}",
        "training: {include_for_metrics: [inputs]}",
        "training: {lr_scheduler_kwargs: {min_lr: 1e-5}, lr_scheduler_type: cosine_with_min_lr}",
        "gradient_checkpointing: yes",
        "offload: cpu",
        "precision: {mode: fp16, loss_scale: {initial: 1024}}",
        "global_batch_size: 12\nmicro_batch_size: 3\ngradient_accumulation_steps: 2",
    ],
)
def test_what_is_right_is_taken(folder: Path, line: str) -> None:
    assert check(folder, MINIMAL + line + "\n") == []


def test_yes_and_no_are_booleans_only_where_one_is_wanted(folder: Path) -> None:
    recipe = load(folder, MINIMAL + "gradient_checkpointing: no\ntraining: {eval_strategy: no, torch_compile: yes}\n")
    assert recipe.gradient_checkpointing is False
    assert recipe.training_keys == {"eval_strategy": "no", "torch_compile": True}


def test_required_keys_that_are_missing_are_shown_as_they_are_written(folder: Path) -> None:
    problems = check(folder, "name: x\n")
    assert [(problem.key, problem.line, problem.suggestion) for problem in problems] == [
        ("model", None, "add `model: gpt2`"),
        ("data", None, "add `data: builtin:python-reference`"),
    ]


@pytest.mark.parametrize(
    ("lines", "key", "words"),
    [
        ("global_batch_size: 10\nmicro_batch_size: 4", "global_batch_size", "8 or 12"),
        ("global_batch_size: 2\nmicro_batch_size: 4", "global_batch_size", "4"),
        ("global_batch_size: 8\ndistributed: {processes_per_node: 3}", "global_batch_size", "6 or 9"),
        ("micro_batch_size: 4\ntraining: {per_device_train_batch_size: 8}", "micro_batch_size", "keep one"),
        ("training: {eval_steps: 5}", "training.eval_steps", "eval_strategy: steps"),
        ("training: {load_best_model_at_end: true}", "training.load_best_model_at_end", "eval_strategy"),
        ("training: {save_strategy: best}", "training.save_strategy", "eval_strategy"),
        ("training: {load_best_model_at_end: true, eval_strategy: epoch}", "training.load_best_model_at_end", "epoch"),
        ("training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 4, save_steps: 6}",
         "training.save_steps", "4"),
        ("quantization: {}", "quantization", "lora"),
        ("sample: {prompt: hello, every_eval: true}", "sample.every_eval", "eval_strategy"),
        ("training: {dataloader_persistent_workers: true}", "training.dataloader_persistent_workers", "number"),
        ("task: masked_lm\nsample: hello", "sample", "leave it out"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused(folder: Path, lines: str, key: str, words: str) -> None:
    found = only(folder, MINIMAL + lines + "\n")
    assert found.key == key
    assert words in found.suggestion


@pytest.mark.parametrize(
    ("data", "rest", "key"),
    [
        ("{source: a.txt, streaming: true}", "", "data.streaming"),
        ("{source: a.txt, eval_fraction: 0}", "training: {eval_strategy: epoch}", "training.eval_strategy"),
        ("{source: a.txt, split: train}", "", "data.split"),
        ("{source: [], split: train}", "", "data.source"),
        ("{source: a.txt, eval_source: b.txt, eval_fraction: 0.1}", "", "data.eval_source"),
        ("[]", "", "data"),
        ("builtin:python-tutorial", "", "data.source"),
        ("{source: a.csv, label_column: y}", "", "data.label_column"),
        ("{source: a.csv, packing: true}", "task: sequence_classification", "data.packing"),
        ("{source: a.csv, messages_column: y}", "", "data.messages_column"),
        ("{source: a.csv, layout: alpaca}", "", "data.layout"),
        ("{source: a.csv, chat_template: chatml}", "", "data.chat_template"),
        ("{source: a.csv, train_on: all}", "", "data.train_on"),
        ("{source: a.txt}", "task: sft", "data.source"),
        ("builtin:python-reference", "task: sft", "data.source"),
        ("builtin:python-questions", "", "data.source"),
        ("{source: [{source: a.csv, weigth: 2}]}", "", "data.source.0.weigth"),
        ("{source: [{source: a.csv, weight: 0}]}", "", "data.source.0.weight"),
        ("{source: [{weight: 2}]}", "", "data.source.0.source"),
        ("{source: [5]}", "", "data.source.0"),
        ("{source: {source: a.csv}}", "", "data.source"),
        ("{source: [{source: a.csv, split: x}]}", "", "data.source.0.split"),
        ("{source: [{source: a.csv, layout: alpaca}]}", "", "data.source"),
        ("{source: [{source: a.csv}]}", "task: sequence_classification", "data.source"),
        ("{source: [a.csv, 'hub:a/b']}", "", "data"),
        ("{source: [a.csv], mixing: oversample}", "", "data.mixing"),
        ("{source: a.csv, eval_source: [{source: b.csv, weight: 2}]}", "", "data.eval_source"),
        ("{source: [{source: 'hub:a/b'}, {source: a.csv}], eval_split: y}", "", "data.eval_split"),
    ],
)
def test_data_that_contradicts_the_rest_is_refused(folder: Path, data: str, rest: str, key: str) -> None:
    found = only(folder, f"model: gpt2\ndata: {data}\n{rest}\n")
    assert found.key == key
    assert found.line is not None


def test_a_trained_vocabulary_must_fit_the_models(folder: Path) -> None:
    text = "model: {config: {model_type: llama, vocab_size: 1000}}\ndata: a.txt\n"
    assert only(folder, text).key == "model.config.vocab_size"
    assert check(folder, text, "tokenizer={train: byte_level_bpe, vocab_size: 1000}") == []


def test_an_override_is_read_like_the_recipe(folder: Path) -> None:
    overrides = ("training.learning_rate=2e-5", "training.eval_strategy=no", "precision=fp16", "name=run-2")
    recipe = load(folder, MINIMAL, *overrides)
    assert recipe.training_keys == {"learning_rate": 2e-5, "eval_strategy": "no"}
    assert (recipe.precision.mode, recipe.name) == ("fp16", "run-2")


def test_an_override_below_a_short_form_expands_it(folder: Path) -> None:
    recipe = load(folder, MINIMAL + "precision: fp16\n", "precision.loss_scale.initial=1024", "data.sequence_length=8")
    assert recipe.precision.mode == "fp16"
    assert recipe.precision.loss_scale is not None and recipe.precision.loss_scale.initial == 1024
    assert (recipe.data.source, recipe.data.sequence_length) == ("a.txt", 8)


def test_a_map_in_an_override_replaces_what_stood_there(folder: Path) -> None:
    recipe = load(
        folder, MINIMAL + "training: {seed: 1}\n", "training={max_steps: 5}", "model={name_or_path: some/dir}"
    )
    assert recipe.training_keys == {"max_steps": 5}
    assert recipe.model.name_or_path == "some/dir"


def test_the_later_override_wins_and_null_leaves_a_key_out(folder: Path) -> None:
    recipe = load(folder, MINIMAL + "lora: {rank: 4}\n", "global_batch_size=8", "global_batch_size=16", "lora=null")
    assert (recipe.global_batch_size, recipe.lora) == (16, None)


def test_null_takes_a_key_back_to_its_default(folder: Path) -> None:
    text = MINIMAL + "precision: fp16\ntraining: {seed: 1, max_steps: 5}\n"
    recipe = load(folder, text, "precision=null", "training.seed=null", "training.optim=null")
    assert (recipe.precision.mode, recipe.training_keys) == ("auto", {"max_steps": 5})
    assert only(folder, text, "data=null").file == "data=null"
    assert only(folder, text, "zorgle=null").key == "zorgle"


def test_an_override_mends_what_the_file_has_wrong(folder: Path) -> None:
    assert check(folder, MINIMAL + "training: {max_steps: many}\n", "training.max_steps=5") == []
    assert check(folder, MINIMAL + "lora:\n", "lora={rank: 4}") == []


@pytest.mark.parametrize(
    ("argument", "key", "words"),
    [
        ("precision", "", "has no `=`"),
        ("=fp16", "", "names no key"),
        ("training..seed=1", "", "names no key"),
        ("precision=", "precision", "has no value"),
        ("precision=bf17", "precision", "got 'bf17'"),
        ("training.learning_rate=-1", "training.learning_rate", "at least 0"),
        ("training.seed=[1", "training.seed", "bracket"),
        ("training={seed: 1, seed: 2}", "training.seed", "twice"),
        ("global_batch_size.x=1", "global_batch_size.x", "not a map"),
        ("data.source.0=b.txt", "data.source.0", "is a list"),
        ("zorgle=1", "zorgle", "no key"),
        ("model.config={model_type: gpt2}", "model", "one source"),
        ("name=a\x00b", "name", "U+0000"),
        ("name=\udcff", "name", "U+DCFF"),
        (".".join(["a"] * 2000) + "=1", "", "nested"),
    ],
)
def test_a_problem_in_an_override_is_reported_with_the_argument(
    folder: Path, argument: str, key: str, words: str
) -> None:
    text = "model: gpt2\ndata: [a.txt, b.txt]\nglobal_batch_size: 8\n"
    found = only(folder, text, argument)
    assert (found.file, found.line, found.key) == (argument, None, key)
    assert words in found.problem


def test_overrides_do_not_hide_the_files_own_problems(folder: Path) -> None:
    problems = check(folder, MINIMAL + "micro_batch_size: -1\n", "training.seed=-1")
    assert [(problem.line, problem.key) for problem in problems] == [(3, "micro_batch_size"), (None, "training.seed")]
    assert problems[1].file == "training.seed=-1"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("1.5", 1.5), ("90s", 90), ("30m", 1800), ("12h", 43_200), ("2d", 172_800), ("1.5h", 5400)],
)
def test_a_duration_is_seconds_or_a_number_with_its_unit(folder: Path, text: str, seconds: float) -> None:
    recipe = load(folder, f"{MINIMAL}restart: {{stop_before: {text}}}\n")
    assert recipe.restart.stop_before == seconds
    assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_unset=True)) == recipe


@pytest.mark.parametrize("text", ["soon", "-1", "30 m", "30M", "m", "1:30", "true", "[30m]", "1e99", "''"])
def test_what_is_no_duration_is_refused_with_examples(folder: Path, text: str) -> None:
    problem = only(folder, f"{MINIMAL}restart: {{stop_before: {text}}}\n")
    assert (problem.line, problem.key) == (3, "restart.stop_before")
    assert "must be a duration such as 90s, 30m or 12h, or seconds" in problem.problem


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{time_limit: 12h}", "restart.time_limit"),
        ("{time_limit: 1h, stop_before: 1h}", "restart.stop_before"),
        ("{time_limit: 30m, stop_before: 1h}", "restart.stop_before"),
    ],
)
def test_a_time_limit_that_leaves_no_time_is_refused(folder: Path, text: str, key: str) -> None:
    assert only(folder, f"{MINIMAL}restart: {text}\n").key == key
