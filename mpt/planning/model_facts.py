"""What planning must know of a model, and where it is learnt: from a formula, a file, a table, or the model itself.

Reads files; reaches no network. What no formula and no file tells is asked of `python -m mpt.training.facts`, which
builds the model without memory (on the meta device) and may fetch a configuration.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mpt.errors import MptError
from mpt.planning.adapter_file import read_adapter
from mpt.planning.facts_child import FactsAsker, Json, RunChild, default_cache, run_facts_child
from mpt.planning.model_shapes import shape_of
from mpt.planning.safetensors_header import read_header
from mpt.recipe.schema import Recipe, TokenizerSection
from mpt.terms import Task

# Families whose checkpoints are known to leave fp16's range in the forward pass, where no loss scale helps.
OVERFLOWING: dict[str, str] = {
    "t5": "huggingface/transformers#5651: 66246 in T5DenseReluDense",
    "mt5": "huggingface/transformers#10956",
    "umt5": "huggingface/transformers#10956, same blocks",
    "longt5": "huggingface/transformers#19229",
    "gemma": "huggingface/transformers#39972, same residual growth",
    "gemma2": "huggingface/transformers#39972, same residual growth",
    "gemma3": "huggingface/transformers#39972",
    "gemma3_text": "huggingface/transformers#39972",
    "qwen2": "QwenLM/Qwen3#868, #670 (training on V100)",
    "qwen2_vl": "huggingface/transformers#33312",
    "qwen3": "vllm-project/vllm#33972",
}
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's size and shape. Sums of parameters count shared (tied) tensors once.

    `embedding_parameters`: token and position tables, the output's own table included where it is not tied.
    `max_positions`: the longest sequence that the configuration is made for; None: no limit.
    `largest_layer_parameters`: the biggest block or embedding table, what ZeRO-3 gathers at once. `linear_parameters`:
    those of the blocks' linear layers, what QLoRA quantises. `checkpoint_dtype`: "fp32", "bf16", "fp16"; None from
    scratch or unknown. `source` says where it was learnt. `adapter` is the one that training goes on from, as
    `mpt.planning.adapter_file.read_adapter` reads it.
    """

    model_type: str
    parameters: int
    embedding_parameters: int
    tied_embeddings: bool
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int | None
    largest_layer_parameters: int
    linear_parameters: int
    gated_mlp: bool
    layer_norm: bool
    activation: str
    query_key_norm: bool
    attention_dropout: bool
    hidden_dropout: bool
    checkpoint_dtype: str | None
    overflows_in_fp16: bool
    source: str
    adapter: Json | None = None

    def to_json(self) -> Json:
        """Give the facts as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelFacts":
        """Read what `to_json` wrote; keys of later versions are ignored, a missing one raises KeyError."""
        return cls(
            **{entry.name: data[entry.name] for entry in fields(cls) if entry.name != "adapter"},
            adapter=data.get("adapter"),
        )


def facts_from_config(
    config: Mapping[str, Any],
    *,
    task: Task = Task.CAUSAL_LM,
    vocab_size: int | None = None,
    checkpoint_dtype: str | None = None,
    is_checkpoint: bool = True,
    source: str = "the model's configuration",
) -> ModelFacts | None:
    """Derive the facts by formula; None for a family that has none. Raises MptError for sizes that make no model."""
    try:
        shape = shape_of(config, task, vocab_size)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise MptError(
            f"{source}: the sizes of this {config.get('model_type')} make no model ({error})",
            remedy="Sizes are whole numbers above 0; the heads divide hidden_size, the key-value heads the heads.",
        ) from None
    if shape is None:
        return None
    for size in ("layers", "hidden_size", "intermediate_size", "attention_heads", "head_dim", "vocab_size"):
        if getattr(shape, size) < 1:
            raise MptError(
                f"{source}: {size} of this {config['model_type']} is {getattr(shape, size)}",
                remedy="Sizes are whole numbers above 0; num_attention_heads divides hidden_size.",
            )
    return ModelFacts(
        model_type=str(config["model_type"]),
        **asdict(shape),
        checkpoint_dtype=checkpoint_dtype,
        overflows_in_fp16=is_checkpoint and config["model_type"] in OVERFLOWING,
        source=source,
    )


def learn_model_facts(
    recipe: Recipe,
    *,
    cache: Path | None = None,
    run_child: RunChild | None = None,
    environ: Mapping[str, str] = os.environ,
) -> ModelFacts:
    """Learn what a recipe's model is.

    `cache` holds what a child process found, ~/.cache/mpt/facts if None; `run_child` asks that process. Raises MptError
    for a model or an adapter that is not there, can't be read, or could not be learnt.
    """
    facts = _learn(recipe, cache, run_child, environ)
    path = None if recipe.lora is None else recipe.lora.adapter
    return facts if path is None else replace(facts, adapter=read_adapter(path, recipe.model.name_or_path or ""))


def _learn(recipe: Recipe, cache: Path | None, run_child: RunChild | None, environ: Mapping[str, str]) -> ModelFacts:
    model, task = recipe.model, recipe.model_task
    asker = FactsAsker(cache or default_cache(environ), run_child or run_facts_child)
    request = model_request(recipe)
    if model.config is not None:
        vocab_size = _vocab_size(recipe, model.config)
        source = "the recipe's model.config"
        facts = facts_from_config(model.config, task=task, vocab_size=vocab_size, is_checkpoint=False, source=source)
        return facts or _asked(asker, request, what=f"a {model.config['model_type']} from scratch")
    name = model.name_or_path or ""
    if _is_local(name):
        directory = Path(name).expanduser()
        config = read_config(directory)
        dtype = _checkpoint_dtype(config, directory)
        facts = facts_from_config(config, task=task, checkpoint_dtype=dtype, source=f"{name}/config.json")
        return facts or _asked(asker, request, what=name, content=config)
    known = known_models().get(name) if model.revision is None else None
    if known is not None:
        facts = facts_from_config(
            known["config"], task=task, checkpoint_dtype=known["dtype"], source=f"mpt's table of known models, {name}"
        )
        if facts is not None:
            return facts
    snapshot = find_snapshot(name, model.revision, environ)
    if snapshot is not None:
        config = read_config(snapshot)
        dtype = _checkpoint_dtype(config, snapshot)
        facts = facts_from_config(config, task=task, checkpoint_dtype=dtype, source=f"{name} in the hub cache")
        return facts or _asked(asker, request, what=name, content=config)
    return _asked(asker, request, what=name)


def ask_about_modules(
    recipe: Recipe,
    *,
    cache: Path | None = None,
    run_child: RunChild | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[Json]:
    """Have the model list its modules; the entries are fields of `mpt.planning.modules.ModuleShape`.

    Raises MptError for a model that is not there, or could not be learnt.
    """
    name = recipe.model.name_or_path or ""
    request, content = model_request(recipe), None
    if recipe.model.config is None:
        known = known_models().get(name) if recipe.model.revision is None else None
        if _is_local(name):
            content = read_config(Path(name).expanduser())
        elif known is not None:
            request |= {"config": known["config"], "name_or_path": None}
        elif (snapshot := find_snapshot(name, recipe.model.revision, environ)) is not None:
            content = read_config(snapshot)
    asker = FactsAsker(cache or default_cache(environ), run_child or run_facts_child)
    what = f"a {request['config']['model_type']}" if request["config"] else name
    return list(asker.ask(request | {"modules": True}, what=what, content=content)["modules"])


def model_request(recipe: Recipe) -> Json:
    """Name the recipe's model in the words that `mpt.training.facts` takes."""
    model, task = recipe.model, recipe.model_task
    if model.config is not None:
        return {"config": model.config, "vocab_size": _vocab_size(recipe, model.config), "task": task.value}
    return {
        "config": None,
        "name_or_path": model.name_or_path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "vocab_size": None,
        "task": task.value,
    }


def _asked(asker: FactsAsker, request: Json, *, what: str, content: Json | None = None) -> ModelFacts:
    return ModelFacts.from_json(asker.ask(request, what=what, content=content))


def known_models() -> dict[str, Json]:
    """Read the table of well-known hub models: id -> {"config", "dtype", "parameters"}."""
    table = json.loads(files("mpt.planning").joinpath("known_models.json").read_text(encoding="utf-8"))
    return {name: entry for entry in table for name in entry["ids"]}


def read_config(directory: Path) -> Json:
    """Read a model directory's config.json; raises MptError where there is none that can be read."""
    if not directory.is_dir():
        raise MptError(
            f"model.name_or_path: there is no directory {directory}",
            remedy="Paths are relative to where mpt is started; a hub id is written OWNER/NAME.",
        )
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MptError(
            f"model.name_or_path: {directory} has no config.json",
            remedy="Point to a directory that save_pretrained wrote (a run's final/, or a checkpoint).",
        ) from None
    except (OSError, ValueError) as error:
        raise MptError(f"{path} can't be read: {error}", remedy="Fetch or save the model again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise MptError(f"{path} names no model_type", remedy="Point to a transformers model, or save it again.")
    return config


def find_snapshot(name: str, revision: str | None, environ: Mapping[str, str]) -> Path | None:
    """Find a hub model's snapshot on this disk, as huggingface_hub lays it out; None where there is none."""
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    hub = Path(environ.get("HF_HUB_CACHE") or Path(home).expanduser() / "hub")
    repository = hub / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    if not commit:
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


def stored_dtype(directory: Path) -> str | None:
    """Read from a safetensors header which dtype holds most of the weights; None where there is no such file."""
    for path in sorted(directory.glob("*.safetensors")):
        sizes: dict[str, int] = {}
        for tensor in (read_header(path) or {}).values():
            begin, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - begin
        if sizes:
            return DTYPES.get(max(sizes, key=lambda dtype: sizes[dtype]))
    return None


def _is_local(name: str) -> bool:
    """A path as the shell writes it, or something that exists; OWNER/NAME and NAME are the hub's otherwise."""
    return name.startswith(("/", ".", "~")) or Path(name).exists() or name.count("/") > 1


def _checkpoint_dtype(config: Json, directory: Path) -> str | None:
    said = config.get("dtype") or config.get("torch_dtype")
    return DTYPES.get(said) if isinstance(said, str) else stored_dtype(directory)


def _vocab_size(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Size of the vocabulary of a model from scratch: the config's, or else the tokenizer's.

    Raises MptError where the config's is too small for the tokenizer, or nobody says it.
    """
    tokenizer = recipe.tokenizer or TokenizerSection(train="byte_level_bpe")
    tokens = tokenizer.vocab_size if tokenizer.name_or_path is None else _tokens_of(tokenizer.name_or_path)
    given = config.get("vocab_size")
    if given is not None and (type(given) is not int or given < 1):
        raise MptError(f"model.config.vocab_size is {given!r}", remedy="Write a whole number above 0, or leave it out.")
    if given is None and tokens is None:
        raise MptError(
            f"model.config leaves vocab_size to the tokenizer, and {tokenizer.name_or_path} has no tokenizer.json here",
            remedy="Write model.config.vocab_size, at least the size of the tokenizer.",
        )
    if given is not None and tokens is not None and given < tokens:
        raise MptError(
            f"model.config.vocab_size is {given}, and the tokenizer has {tokens} tokens",
            remedy=f"Set model.config.vocab_size to {tokens} or more, or leave it out: then it is the tokenizer's.",
        )
    return int(given if given is not None else tokens or 0)


def _tokens_of(name: str) -> int | None:
    """Count the tokens of a tokenizer on this disk, added ones included: its highest id and one; None where unknown."""
    directory = Path(name).expanduser() if _is_local(name) else find_snapshot(name, None, os.environ)
    if directory is None:
        return None
    try:
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    return max(ids) + 1 if ids else None
