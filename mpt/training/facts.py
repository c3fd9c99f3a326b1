"""What a model is, asked of the model itself: built on the meta device, where parameters have shapes and no memory.

`python -m mpt.training.facts REQUEST` takes one JSON object (config or name_or_path, revision, trust_remote_code,
vocab_size, task) and prints one JSON object with the fields of `mpt.planning.model_facts.ModelFacts`; with `modules:
true` in the request, the list of the model's modules. Started by `mpt.planning.facts_child`; may fetch a configuration
from the hub, and never weights. Ends with 2 and a line on stderr where the model can't be learnt.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from mpt.errors import ExitCode, MptError
from mpt.planning.model_facts import DTYPES, OVERFLOWING, ModelFacts, stored_dtype
from mpt.terms import Task
from mpt.training.imports import heavy_imports, leave


def learn_from_model(request: dict[str, Any]) -> ModelFacts:
    """Build the model without memory and count it.

    Raises MptError for a model type that transformers does not know or can't build for the task.
    """
    config = load_config(request)
    model = build_on_meta(config, Task(request["task"]), bool(request.get("trust_remote_code")))
    text = config.get_text_config()
    blocks = find_blocks(model)
    linear = [
        (name, module.weight)
        for block in blocks
        for name, module in block.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    largest = max([_count(block) for block in blocks] + [_count(table) for table in _tables(model)])
    head_table = model.get_output_embeddings()
    tables = {id(table.weight): table.weight.numel() for table in (*_tables(model), head_table) if table is not None}
    heads = int(_first(text, "num_attention_heads", "n_head", "num_heads", otherwise=1))
    hidden = int(_first(text, "hidden_size", "n_embd", "d_model", "dim", otherwise=0))
    name_or_path = request.get("name_or_path")
    return ModelFacts(
        model_type=config.model_type,
        parameters=_count(model),
        embedding_parameters=sum(tables.values()),
        tied_embeddings=head_table is not None and head_table.weight is model.get_input_embeddings().weight,
        layers=len(blocks),
        hidden_size=hidden,
        intermediate_size=int(_first(text, "intermediate_size", "n_inner", "d_ff", "ffn_dim", otherwise=4 * hidden)),
        attention_heads=heads,
        key_value_heads=int(_first(text, "num_key_value_heads", otherwise=heads)),
        head_dim=int(_first(text, "head_dim", "d_kv", otherwise=hidden // heads)),
        vocab_size=int(_first(text, "vocab_size", otherwise=0)),
        max_positions=_first(text, "max_position_embeddings", "n_positions", "max_seq_len"),
        largest_layer_parameters=largest,
        linear_parameters=sum(weight.numel() for _, weight in linear),
        gated_mlp=any("gate" in name for name, _ in linear),
        layer_norm=any(type(module).__name__ == "LayerNorm" for module in model.modules()),
        activation=str(_first(text, "hidden_act", "hidden_activation", "activation_function", otherwise="unknown")),
        query_key_norm=any(name.endswith(("q_norm", "k_norm")) for name, _ in model.named_modules()),
        attention_dropout=bool(_first(text, "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")),
        hidden_dropout=bool(_first(text, "hidden_dropout", "resid_pdrop", "hidden_dropout_prob", "dropout")),
        checkpoint_dtype=_checkpoint_dtype(config, name_or_path),
        overflows_in_fp16=name_or_path is not None and config.model_type in OVERFLOWING,
        source="the model itself, built on the meta device",
    )


def list_modules(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Build the model without memory and list the modules that hold parameters of their own, in its order.

    The entries are the fields of `mpt.planning.modules.ModuleShape`.
    """
    model = build_on_meta(load_config(request), Task(request["task"]), bool(request.get("trust_remote_code")))
    model.tie_weights()
    head = model.get_output_embeddings()
    owners: dict[int, str] = {}
    listed = []
    for name, module in model.named_modules():
        weights = list(module.parameters(recurse=False))
        if not weights:
            continue
        tied_to = next((owners[id(weight)] for weight in weights if id(weight) in owners), None)
        owners |= {id(weight): name for weight in weights if id(weight) not in owners}
        kind, inputs, outputs = _kind(module)
        listed.append(
            {
                "name": name,
                "kind": kind,
                "in_features": inputs,
                "out_features": outputs,
                "parameters": sum(weight.numel() for weight in weights),
                "is_head": module is head,
                "tied_to": tied_to,
            }
        )
    return listed


def _kind(module: Any) -> tuple[str, int, int]:
    import torch

    if isinstance(module, torch.nn.Linear):
        # fp8 replaces torch's own alone (`mpt.training.precision.float8.refuse_others`).
        kind = "linear" if type(module) is torch.nn.Linear else "linear subclass"
        return kind, module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's: its weight lies transposed
        return "conv1d", module.weight.shape[0], module.weight.shape[1]
    is_convolution = hasattr(module, "kernel_size")
    if not is_convolution and any(weight.dim() == 3 for weight in module.parameters(recurse=False)):
        return "experts", 0, 0
    return ("embedding" if isinstance(module, torch.nn.Embedding) else "other"), 0, 0


def load_config(request: dict[str, Any]) -> Any:
    """Make the configuration that a request names, or fetch it."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if request.get("config") is None:
        return AutoConfig.from_pretrained(
            request["name_or_path"],
            revision=request.get("revision") or "main",
            trust_remote_code=bool(request.get("trust_remote_code")),
        )
    keys = dict(request["config"])
    kind = keys.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise MptError(f"transformers knows no model_type {kind}", remedy="See transformers' list of models.")
    if keys.get("vocab_size") is None and request.get("vocab_size"):
        keys["vocab_size"] = request["vocab_size"]
    return AutoConfig.for_model(kind, **keys)


def build_on_meta(config: Any, task: Task, trust_remote_code: bool) -> Any:
    """Build the model with the head that the task needs, without memory."""
    import torch
    import transformers

    heads = {
        Task.MASKED_LM: transformers.AutoModelForMaskedLM,
        Task.SEQUENCE_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
    }
    head = heads.get(task, transformers.AutoModelForCausalLM)
    with torch.device("meta"):
        return head.from_config(config, trust_remote_code=trust_remote_code)


def find_blocks(model: Any) -> list[Any]:
    """Find the repeated blocks: the module lists that hold the most parameters and are not inside one another.

    Encoder-decoders have two such lists of equal rank; both count.
    """
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    inner = {id(child) for outer in lists for child in outer.modules() if child is not outer}
    outermost = [blocks for blocks in lists if id(blocks) not in inner]
    if not outermost:
        raise MptError("the model has no list of blocks", remedy="mpt plans models that repeat a block.")
    largest = max(_count(blocks) for blocks in outermost)
    return [block for blocks in outermost if _count(blocks) > largest / 3 for block in blocks]


def _tables(model: Any) -> list[Any]:
    return [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Embedding") and hasattr(module, "weight")
    ]


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _first(config: Any, *names: str, otherwise: Any = None) -> Any:
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return otherwise


def _checkpoint_dtype(config: Any, name_or_path: str | None) -> str | None:
    if name_or_path is None:
        return None
    said = str(config.dtype).removeprefix("torch.")
    return DTYPES.get(said) or stored_dtype(Path(name_or_path).expanduser())


def main() -> NoReturn:
    """Answer one request."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with contextlib.redirect_stdout(sys.stderr), heavy_imports():  # remote code and upstreams may print
            request = json.loads(sys.argv[1])
            if request.get("modules"):
                answer: dict[str, Any] = {"modules": list_modules(request)}
            else:
                answer = learn_from_model(request).to_json()
    except MptError as error:
        print(error.problem, file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    except Exception as error:  # noqa: BLE001 - a main function: whatever an upstream raises is the answer
        print(str(error).strip().split("\n")[0] or type(error).__name__, file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    print(json.dumps(answer))
    leave(ExitCode.DONE)


if __name__ == "__main__":
    main()
