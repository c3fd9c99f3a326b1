"""What a person may have meant: the nearest key, the section that a key belongs to, the word that others use for it."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mpt.recipe.schema import SHORT_FORMS, Recipe
from mpt.recipe.training_keys import OWNED, REMOVED

# Words of other launchers and of the command lines of transformers' examples -> ours.
ELSEWHERE = {
    "attn_implementation": "attention",
    "batch_size": "micro_batch_size or global_batch_size",
    "dataset": "data",
    "dataset_config_name": "data.config",
    "dataset_name": "data",
    "deepspeed": "distributed: {strategy: zero2}",
    "dtype": "precision",
    "epochs": "training.num_train_epochs",
    "flash_attention": "attention: flash_attention_2",
    "load_in_4bit": "quantization: {bits: 4}",
    "load_in_8bit": "quantization: {bits: 8}",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lr": "training.learning_rate",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "mixed_precision": "precision",
    "model_name_or_path": "model",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "r": "rank",
    "scheduler": "training.lr_scheduler_type",
    "seq_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "steps": "training.max_steps",
    "tokenizer_name": "tokenizer",
    "torch_dtype": "precision",
    "zero_stage": "distributed: {strategy: zero2}",
}


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Find the section that a field holds; None where it holds a plain value."""
    found: list[Any] = [field.annotation]
    while found:
        one = found.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
        found += get_args(one)
    return None


@cache
def sections() -> Mapping[str, type[BaseModel]]:
    """Name every section by its dotted path; the recipe itself is ""."""
    made: dict[str, type[BaseModel]] = {"": Recipe}
    pending = [""]
    while pending:
        parent = pending.pop()
        for key, field in made[parent].model_fields.items():
            section = section_of(field)
            if section is not None:
                name = f"{parent}.{key}" if parent else key
                made[name] = section
                pending.append(name)
    return made


def name_of(path: Iterable[str | int]) -> str:
    """Name the section that a path leads to: the maps of a list are one section.

    >>> name_of(("data", "source", 0)), name_of(())
    ('data.source', '')
    """
    return ".".join(part for part in path if isinstance(part, str))


def is_list_of(name: str) -> bool:
    """Whether a section is the maps of a list, among which texts may stand."""
    parent, _, key = name.rpartition(".")
    known = sections()
    return bool(name) and name in known and "list[" in str(known[parent].model_fields[key].annotation)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Find the word that was probably meant.

    >>> nearest("bf17", ["fp32", "bf16"]), nearest("banana", ["fp32", "bf16"])
    ('bf16', None)
    """
    plain = word.strip().lower().replace("-", "_").replace(" ", "_")
    choices = list(words)
    beginnings = [word for word in choices if len(plain) > 2 and word.startswith(plain)]
    return next(iter(beginnings + get_close_matches(plain, choices, n=1, cutoff=0.6)), None)


def suggest_key(section: str, key: str) -> tuple[str, str]:
    """Say what is wrong with an unknown key of a section, and what to write instead."""
    place = section or "a recipe"
    problem = f"is no key of {place}"
    if section == "training":
        if key in OWNED:
            return "is not for the recipe to set", OWNED[key]
        if key in REMOVED:
            return "is no key of TrainingArguments any more", REMOVED[key]
    homes = [name for name, model in sections().items() if key in model.model_fields]
    own = sections()[section].model_fields
    if not homes:
        near = nearest(key, own)
        if near is not None and key not in ELSEWHERE:
            return problem, f"did you mean {near}?"
        if key in ELSEWHERE:
            return problem, f"write {ELSEWHERE[key]}"
        if key in OWNED or key in REMOVED:
            return problem, OWNED.get(key) or REMOVED[key]
        return problem, _anywhere(key) or _list_keys(place, own)
    home = min(homes, key=lambda name: (name.count("."), name not in ("", "training")))
    where = f"under {home}:" if home else "at the top level"
    return problem, f"write it {where}"


def _anywhere(key: str) -> str | None:
    """Look for a near key in the whole recipe."""
    paths = {field: (f"{name}.{field}" if name else field) for name, model in sections().items()
             for field in model.model_fields}  # fmt: skip
    near = nearest(key, paths)
    return None if near is None else f"did you mean {paths[near]}?"


def _list_keys(place: str, keys: Iterable[str]) -> str:
    names = list(keys)
    if len(names) > 32:
        return "`mpt schema` lists the keys"
    return f"the keys of {place} are {', '.join(names)}"


def suggest_missing(section: str, key: str) -> str:
    """Show how a required key is written."""
    shown = {"model": "gpt2", "data": "builtin:python-reference", "source": "builtin:python-reference"}
    example = shown.get(key, "...")
    return f"add `{key}: {example}`" if not section else f"add `{key}: {example}` under {section}:"


def keys_of(section: str) -> str:
    """Show a section as a map with its first key, and name the others."""
    names = list(sections()[section].model_fields)
    if section == "training":
        return "write `training: {learning_rate: 2e-5}`; its keys are those of transformers.TrainingArguments"
    first = SHORT_FORMS.get(section, names[0])
    return f"write `{section.rpartition('.')[2]}: {{{first}: ...}}`; its keys are {', '.join(names)}"
