"""Rules across keys that hold on every machine. Those within a section stand in the schema; those that need the machine
or the model are planning's."""

from collections.abc import Callable, Iterator

from mpt.recipe.evaluation_rules import early_stopping_evaluates, labels_fit, metrics_fit
from mpt.recipe.schema import Recipe, SourceSection, TokenizerSection
from mpt.recipe.sources import BUILTIN, QUESTIONS
from mpt.recipe.suggestions import nearest
from mpt.recipe.trackers import TRACKERS, asked_trackers
from mpt.recipe.yaml_tree import Flaw
from mpt.terms import Task

# A tokenizer trained for a model that reads both ways: the bytes, [PAD], [CLS], [SEP] and [MASK].
MARKED_SMALLEST = 260


def broken_rules(recipe: Recipe) -> list[Flaw]:
    """Name every rule that the recipe breaks."""
    return [flaw for rule in RULES for flaw in rule(recipe)]


def _batch_divides(recipe: Recipe) -> Iterator[Flaw]:
    """The global batch is micro batch x accumulation x world size, a multiple of processes a node."""
    if recipe.global_batch_size is None:
        return
    known = {
        "micro_batch_size": recipe.asked_micro_batch_size,
        "gradient_accumulation_steps": recipe.asked_gradient_accumulation_steps,
        "distributed.processes_per_node": recipe.distributed.processes_per_node,
    }
    given = {key: value for key, value in known.items() if value is not None}
    product = 1
    for value in given.values():
        product *= value
    if recipe.global_batch_size % product:
        names = " x ".join(f"{key} {value}" for key, value in given.items())
        below = recipe.global_batch_size // product * product
        multiples = f"{below} or {below + product}" if below else str(product)
        yield Flaw(
            ("global_batch_size",),
            f"{recipe.global_batch_size} is no multiple of {names}",
            f"write {multiples}, or leave one of them out",
        )


def _evaluation(recipe: Recipe) -> Iterator[Flaw]:
    keys = recipe.training_keys
    strategy = keys.get("eval_strategy", "no")
    data = recipe.data
    if strategy != "no" and data.eval_source is None and data.eval_split is None and data.eval_fraction == 0:
        yield Flaw(
            ("training", "eval_strategy"),
            f"{strategy} evaluates, and data.eval_fraction is 0: there is nothing to evaluate on",
            "give data.eval_source, data.eval_split or an eval_fraction above 0",
        )
    if recipe.sample is not None and recipe.sample.every_eval and strategy == "no":
        yield Flaw(
            ("sample", "every_eval"),
            "has no effect: eval_strategy is no where it is left out",
            "set training.eval_strategy to steps or epoch",
        )
    if "eval_steps" in keys and "eval_strategy" not in keys:
        yield Flaw(
            ("training", "eval_steps"),
            "has no effect: eval_strategy is no where it is left out",
            "add `eval_strategy: steps`",
        )


def _best_model(recipe: Recipe) -> Iterator[Flaw]:
    """The Trainer's own rules for the best checkpoint (transformers 5.23, TrainingArguments._validate_args)."""
    keys = recipe.training_keys
    evaluates, saves = keys.get("eval_strategy", "no"), keys.get("save_strategy", "steps")
    if evaluates == "no" and (keys.get("load_best_model_at_end") or saves == "best"):
        key = "load_best_model_at_end" if keys.get("load_best_model_at_end") else "save_strategy"
        yield Flaw(
            ("training", key),
            "the best checkpoint is known by evaluation, and eval_strategy is no",
            "set eval_strategy to steps or epoch",
        )
        return
    if not keys.get("load_best_model_at_end") or saves == "best":
        return
    if evaluates != saves:
        yield Flaw(
            ("training", "load_best_model_at_end"),
            f"needs a checkpoint at each evaluation; save_strategy is {saves} and eval_strategy {evaluates}",
            f"set save_strategy to {evaluates}",
        )
    elif evaluates == "steps":
        every = keys.get("eval_steps") or keys.get("logging_steps", 500)
        save_every = keys.get("save_steps", 500)
        if (every < 1) != (save_every < 1) or round(save_every * 1_000_000) % round(every * 1_000_000):
            yield Flaw(
                ("training", "save_steps"),
                f"load_best_model_at_end needs save_steps ({save_every:g}) to be a multiple of eval_steps ({every:g})",
                f"set save_steps to {every:g}",
            )


def _steps(recipe: Recipe) -> Iterator[Flaw]:
    keys = recipe.training_keys
    max_steps = keys.get("max_steps", -1)
    if max_steps == 0:
        yield Flaw(("training", "max_steps"), "must be above 0 (got 0)", "leave it out to train by num_train_epochs")
    if recipe.data.streaming and max_steps <= 0:
        yield Flaw(("data", "streaming"), "a stream has no length", "add training.max_steps")
    for key in ("logging_steps", "save_steps", "eval_steps", "warmup_steps"):
        steps = keys.get(key)
        if steps is not None and steps > 1 and steps != int(steps):
            yield Flaw(
                ("training", key),
                f"must be whole, or below 1 for a share of all steps (got {steps:g})",
                f"write {round(steps)}",
            )


def _optimizer_arguments(recipe: Recipe) -> Iterator[Flaw]:
    """torch's AdamW takes none of them (transformers 5.23, _get_adamw_torch), nor does mpt's own in bf16_pure."""
    keys = recipe.training_keys
    optimizer = keys.get("optim", "adamw_torch_fused")
    if keys.get("optim_args") and optimizer in ("adamw_torch", "adamw_torch_fused"):
        yield Flaw(
            ("training", "optim_args"),
            f"has no effect: {optimizer}, and mpt's own AdamW in bf16_pure, read none of it",
            "remove it; adam_beta1, adam_beta2, adam_epsilon and weight_decay are keys of their own",
        )


def _loader(recipe: Recipe) -> Iterator[Flaw]:
    """torch's DataLoader refuses these without worker processes, long after the model is loaded."""
    keys = recipe.training_keys
    if keys.get("dataloader_num_workers", 0) > 0:
        return
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if keys.get(key):
            yield Flaw(
                ("training", key),
                "needs loader processes, and dataloader_num_workers is 0",
                "set the number",
            )


def _compile(recipe: Recipe) -> Iterator[Flaw]:
    """Either option turns torch.compile on by itself (transformers 5.23, TrainingArguments)."""
    for key in ("torch_compile_backend", "torch_compile_mode"):
        if recipe.compile is False and recipe.training_keys.get(key) is not None:
            yield Flaw(("training", key), "says how torch.compile compiles, and compile is false", "keep one of them")


def _tokenizer(recipe: Recipe) -> Iterator[Flaw]:
    tokenizer = recipe.tokenizer
    config = recipe.model.config
    if config is None:
        if tokenizer is not None and tokenizer.train is not None:
            yield Flaw(
                ("tokenizer", "train"),
                f"{recipe.model.name_or_path} knows its own vocabulary; a new one would mean nothing to its weights",
                "leave the tokenizer out, or build the model from model.config",
            )
        return
    size = config.get("vocab_size")
    if tokenizer is None or tokenizer.train is not None:
        tokens = (tokenizer or TokenizerSection()).vocab_size
        if tokens < MARKED_SMALLEST and recipe.task in (Task.MASKED_LM, Task.SEQUENCE_CLASSIFICATION):
            yield Flaw(
                ("tokenizer", "vocab_size"),
                f"{tokens} has no room for the 256 bytes and the four marks that {recipe.task} needs",
                f"write {MARKED_SMALLEST} or more",
            )
        if isinstance(size, int) and size < tokens:
            yield Flaw(
                ("model", "config", "vocab_size"),
                f"{size} is fewer than the {tokens} tokens of the trained tokenizer",
                "leave it out, or set tokenizer.vocab_size too",
            )


def _sources_fit_the_task(recipe: Recipe) -> Iterator[Flaw]:
    for key, named in (("source", recipe.data.source_names), ("eval_source", recipe.data.eval_source_names)):
        for source in named:
            if recipe.task is Task.SFT and source.lower().endswith((".txt", ".md")):
                yield Flaw(
                    ("data", key),
                    f"{source} is plain text, and sft learns from conversations",
                    "give .jsonl, .json, .csv or .parquet of a known layout, or set task: causal_lm",
                )
            if not source.startswith("builtin:"):
                continue
            known = QUESTIONS if recipe.task is Task.SFT else BUILTIN
            if source not in (BUILTIN, QUESTIONS):
                yield Flaw(("data", key), f"there is no {source}", f"built in is {known}")
            elif source != known:
                yield Flaw(("data", key), f"{source} is not for task {recipe.task}", f"write {known}")


def _task_has_its_keys(recipe: Recipe) -> Iterator[Flaw]:
    only = {
        "text_pair_column": Task.SEQUENCE_CLASSIFICATION,
        "label_column": Task.SEQUENCE_CLASSIFICATION,
        "labels": Task.SEQUENCE_CLASSIFICATION,
        "messages_column": Task.SFT,
        "mask_probability": Task.MASKED_LM,
        "layout": Task.SFT,
        "chat_template": Task.SFT,
        "train_on": Task.SFT,
    }
    entries = {key for entry in _maps(recipe) for key in entry.model_fields_set}
    if entries and recipe.task is Task.SEQUENCE_CLASSIFICATION:
        yield Flaw(("data", "source"), f"{recipe.task} reads one kind of rows, and mixes none", "write texts, not maps")
    for key in sorted(entries & {"layout", "messages_column"} if recipe.task is not Task.SFT else ()):
        yield Flaw(("data", "source"), f"{key} is for task sft, and the task is {recipe.task}", "leave it out")
    for key, task in only.items():
        if key in recipe.data.model_fields_set and recipe.task != task and isinstance(recipe.task, Task):
            yield Flaw(
                ("data", key), f"is for task {task}, and the task is {recipe.task}", f"leave it out or set task: {task}"
            )
    if recipe.sample is not None and isinstance(recipe.task, Task) and recipe.task not in (Task.CAUSAL_LM, Task.SFT):
        yield Flaw(("sample",), f"a model for {recipe.task} generates no text", "leave it out")


def _packing(recipe: Recipe) -> Iterator[Flaw]:
    """What can be packed how; what a model's attention allows is planning's to say."""
    packing, is_grouped = recipe.data.packing, groups_by_length(recipe)
    is_packed = packing in ("blocks", "best_fit", True)
    if is_packed and recipe.task is Task.SEQUENCE_CLASSIFICATION:
        yield Flaw(("data", "packing"), "joined documents have no label of their own", "leave packing out")
    elif packing == "blocks" and recipe.task is Task.SFT:
        yield Flaw(("data", "packing"), "blocks would cut conversations anywhere", "write best_fit or none")
    elif packing == "best_fit" and recipe.task is Task.MASKED_LM:
        yield Flaw(("data", "packing"), "best_fit is for causal models", "write blocks or none")
    if is_packed and is_grouped:
        yield Flaw(
            ("training", "train_sampling_strategy"),
            "group_by_length is for samples of uneven lengths, and packed ones have none",
            "leave it out, or set data.packing: none",
        )
    packs_apart = packing == "best_fit" or (packing in ("auto", True) and recipe.task is Task.SFT)
    if packs_apart and recipe.training_keys.get("use_cache"):
        yield Flaw(
            ("training", "use_cache"),
            "with a cache transformers looks for no boundaries, and packed documents would see one another",
            "leave it out, or set data.packing: none",
        )
    joins = packing == "blocks" or (recipe.task is Task.CAUSAL_LM and packing in ("auto", True) and not is_grouped)
    if joins and "pad_to_multiple_of" in recipe.data.model_fields_set:
        yield Flaw(
            ("data", "pad_to_multiple_of"),
            "has no effect: blocks have no padding",
            "leave it out, or set data.packing to best_fit or none",
        )


def groups_by_length(recipe: Recipe) -> bool:
    """Whether the Trainer is asked to make batches of samples of similar lengths."""
    return bool(recipe.training_keys.get("train_sampling_strategy") == "group_by_length")


def _trackers(recipe: Recipe) -> Iterator[Flaw]:
    asked = asked_trackers(recipe)
    for name in asked:
        if name != "all" and name not in TRACKERS:
            near = nearest(name, TRACKERS)
            guess = f"did you mean {near}?" if near else f"there are {', '.join(TRACKERS)}, all and none"
            yield Flaw(("training", "report_to"), f"transformers reports to no {name!r}", guess)
    listed = recipe.training_keys.get("report_to")
    if ("all" in asked and len(asked) > 1) or (isinstance(listed, list) and "none" in listed and len(listed) > 1):
        yield Flaw(("training", "report_to"), "all and none stand alone", "write one of them, or names")


def _maps(recipe: Recipe) -> list[SourceSection]:
    """List the sources that are maps."""
    named = (recipe.data.source, recipe.data.eval_source or [])
    return [entry for one in named if isinstance(one, list) for entry in one if isinstance(entry, SourceSection)]


RULES: tuple[Callable[[Recipe], Iterator[Flaw]], ...] = (
    _batch_divides,
    _evaluation,
    _best_model,
    _steps,
    _optimizer_arguments,
    _loader,
    _compile,
    _tokenizer,
    _sources_fit_the_task,
    _task_has_its_keys,
    labels_fit,
    metrics_fit,
    early_stopping_evaluates,
    _trackers,
    _packing,
)
