"""A class, or with `data.labels: regression` a number, for each text or pair of texts (GLUE, Wang et al. 2019)."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
from datasets.fingerprint import Hasher
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.training.data import Cuts, Documents, Samples
from mpt.training.encoding import identify
from mpt.training.labelled import PAIR, label_column, read_labelled
from mpt.training.labels import Classes, Column, check_labels, classes_of_model, find_classes, listed, to_numbers
from mpt.training.model import build_with_head, to_config
from mpt.training.row_files import TEXT

MARKS_TEXT = True


class LabelledCollator(DataCollatorWithPadding):
    """Pad to the longest sample of the batch, as the tokenizer pads."""

    draws_random_numbers = False


def read_documents(plan: Plan, *, seed: int) -> Documents:
    """Read the rows, and hold out what is evaluated on; `seed` divides them."""
    return read_labelled(plan.recipe.data, seed=seed)


def texts(documents: Documents) -> Iterator[str]:
    """Give the training texts, those of a pair one after the other."""
    columns = [column for column in (TEXT, PAIR) if column in documents.train.column_names]
    return (row[column] for row in documents.train for column in columns)


def ready_tokenizer(plan: Plan, documents: Documents | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Let a tokenizer that pads with nothing pad with its end of text: batches need it, and so does a decoder.

    Raises MptError for one that has neither.
    """
    if tokenizer.pad_token is not None:
        return []
    if tokenizer.eos_token is None:
        raise MptError(
            "the tokenizer has neither a padding nor an end-of-text token, and batches of texts need one",
            remedy="Name another with `tokenizer:`, or add a pad_token to this one and save it.",
        )
    tokenizer.pad_token = tokenizer.eos_token
    return [f"the tokenizer has no padding token: it pads with its end of text, {tokenizer.eos_token}"]


def prepare_data(plan: Plan, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """Number the labels and tokenise the texts. Raises MptError for labels that are wrong, with the row's place."""
    section = plan.recipe.data
    config = _config(plan)
    train = label_column(section, documents.train, section.source_names)
    own_names = _own_names(config)
    held_out = None
    if documents.held_out is not None:
        source = section.eval_source_names or section.source_names
        held_out = label_column(section, documents.held_out, source)
    notices = [*documents.notices]
    from_data: dict[str, Any]
    numbers: tuple[list[Any], list[Any] | None]
    if section.labels == "regression":
        numbers = to_numbers(train), None if held_out is None else to_numbers(held_out)
        from_data = {"problem_type": "regression", "num_labels": 1}
        low, high = min(numbers[0]), max(numbers[0])
        notices.append(f"regression on {len(train.values)} rows with labels from {low:g} to {high:g}")
    else:
        if own_names and section.eval_source == section.source:  # all of a file is evaluated: nothing is trained on it
            classes = classes_of_model(own_names, train)
        else:
            classes = find_classes(train, _asked_count(plan), own_names)
        if plan.recipe.model.config is None and own_names and len(own_names) != len(classes.names):
            raise MptError(
                f"{plan.recipe.model.name_or_path} tells {len(own_names)} classes apart ({listed(own_names)}), and the "
                f"data has {len(classes.names)}: {listed(classes.names)}",
                remedy="Start from the model that this one was made from, which has no head yet, or mend the labels.",
            )
        if held_out is not None:
            check_labels(held_out)
        numbers = classes.number(train), None if held_out is None else classes.number(held_out)
        from_data = {"problem_type": "single_label_classification", "classes": list(classes.names)}
        notices.append(_told(classes, train))
    has_types = getattr(config, "type_vocab_size", 0) > 1
    limit = plan.value("sequence_length")
    tables = [
        None if labels is None else _tokenise(table, labels, tokenizer, limit, has_types=has_types)
        for table, labels in zip((documents.train, documents.held_out), numbers, strict=True)
    ]
    truncated = _count_truncated(tables[0])
    if truncated:
        notices.append(f"{truncated} of {len(train.values)} rows are longer than {limit} tokens and were truncated")
    plain = [None if table is None else table.remove_columns("truncated") for table in tables]
    cuts = Cuts(truncated, lost_tokens=None)
    return Samples(plain[0], plain[1], tuple(notices), from_data=from_data, cuts=cuts)


def build_model(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, *, seed: int, from_data: Mapping[str, Any]
) -> PreTrainedModel:
    """Build the model with a head for the classes of the data, its weights drawn from `seed` where they are new."""
    keys: dict[str, Any] = {"problem_type": from_data["problem_type"]}
    if from_data.get("classes") is None:
        keys["num_labels"] = 1
    else:
        keys["id2label"] = dict(enumerate(from_data["classes"]))
        keys["label2id"] = {name: number for number, name in enumerate(from_data["classes"])}
    if plan.recipe.model.config is not None:
        keys["pad_token_id"] = tokenizer.pad_token_id
    model = build_with_head(AutoModelForSequenceClassification, plan, tokenizer, seed=seed, keys=keys)
    # A decoder judges by the last token that is no padding, which it knows by this alone. Set now,
    # it freezes no embedding: torch.nn.Embedding asks when it is made.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def build_collator(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> LabelledCollator:
    """Build what turns samples into a batch."""
    multiple = plan.value("pad_to_multiple_of")
    fits = plan.value("sequence_length") % multiple == 0  # else a full row would grow beyond the model's positions
    return LabelledCollator(tokenizer, pad_to_multiple_of=multiple if fits else None)


def _tokenise(
    table: datasets.Dataset, labels: list[Any], tokenizer: PreTrainedTokenizerBase, limit: int, *, has_types: bool
) -> datasets.Dataset:
    """Encode every row, a pair as the tokenizer joins them, to at most `limit` tokens."""
    is_pair = PAIR in table.column_names
    keys = ["input_ids"] + ["token_type_ids"] * has_types

    def encode(batch: dict[str, list[str]], rows: list[int]) -> dict[str, list[Any]]:
        given = (batch[TEXT], batch[PAIR]) if is_pair else (batch[TEXT],)
        encoded = tokenizer(*given, truncation=True, max_length=limit, return_token_type_ids=has_types)
        full = encoded["input_ids"]
        cut = [len(row) == limit for row in full]
        if any(cut) and encoded.encodings is not None:
            cut = [bool(one.overflowing) for one in encoded.encodings]
        return {key: encoded[key] for key in keys} | {"truncated": cut, "labels": [labels[row] for row in rows]}

    features = {key: datasets.List(datasets.Value("int32")) for key in keys}
    features |= {"truncated": datasets.Value("bool")}
    features |= {"labels": datasets.Value("float32" if isinstance(labels[0], float) else "int64")}
    in_memory = not table.cache_files
    what = (table._fingerprint, identify(tokenizer), limit, has_types, labels, "labelled-1")
    return table.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=table.column_names,
        features=datasets.Features(features),
        keep_in_memory=in_memory,
        load_from_cache_file=not in_memory,
        new_fingerprint=None if in_memory else Hasher.hash(what),
    )


def _config(plan: Plan) -> Any:
    """Read the configuration that the model begins with."""
    section = plan.recipe.model
    if section.config is not None:
        return to_config(section.config, vocab_size=plan.facts.vocab_size)
    try:
        return AutoConfig.from_pretrained(
            section.name_or_path, revision=section.revision or "main", trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise MptError(
            f"model {section.name_or_path} can't be loaded: {' '.join(str(error).split())[:400]}",
            remedy="Check model.name_or_path and model.revision; hub ids need the network.",
        ) from error


def _asked_count(plan: Plan) -> int | None:
    """The number of classes that the recipe's model.config says."""
    config = plan.recipe.model.config or {}
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels")


def _own_names(config: Any) -> tuple[str, ...]:
    """The class names of a configuration, where somebody has given it any; transformers' own are LABEL_0, LABEL_1."""
    names = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    return () if any(name.startswith("LABEL_") for name in names) else names


def _told(classes: Classes, column: Column) -> str:
    """Say which classes there are and how the largest one compares: what a model that always says it would reach."""
    counted = Counter(column.values)
    label, most = counted.most_common(1)[0]
    name, share = classes.names[classes.numbers[label]], most / len(column.values)
    there = f"{len(classes.names)} classes: {listed(classes.names)}"
    return f"{there}; {share:.0%} of the {len(column.values)} rows are {name}"


def _count_truncated(table: Any) -> int:
    return sum(table["truncated"][:])
