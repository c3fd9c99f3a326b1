"""An adapter on disk that training goes on from: what it is, read without torch.

peft writes `adapter_config.json` and `adapter_model.safetensors`; the header of the latter names every tensor with its
shape. Called by `mpt.planning.model_facts`; `mpt.planning.adapters` holds it against the model.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpt.errors import MptError
from mpt.planning.safetensors_header import read_header

PREFIX = "base_model.model."
REMEDY = "Point lora.adapter to a directory that save_pretrained of peft wrote: a LoRA run's final/."


def read_adapter(path: str, model: str) -> dict[str, Any]:
    """Read what an adapter is: `rank`, `base`, `dora`, its `layers` as {name: [rank, in, out]}, `modules_to_save`, and
    its number of `parameters`. Raises MptError where there is none, or one for another model than `model`."""
    folder = Path(path).expanduser()
    config = _read_config(folder)
    if config.get("peft_type") != "LORA":
        raise MptError(f"lora.adapter: {folder} holds a {config.get('peft_type')} adapter, no LoRA", remedy=REMEDY)
    base = str(config.get("base_model_name_or_path") or "")
    if base and _last(base) != _last(model):
        raise MptError(
            f"lora.adapter: {folder} was made for {base}, and the model is {model}",
            remedy=f"Train it on its own model: `model: {base}`. Where the two are the same, write the model's name as "
            f"base_model_name_or_path into {folder / 'adapter_config.json'}.",
        )
    shapes = {name: entry["shape"] for name, entry in _tensors(folder).items()}
    layers: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        if name.endswith(".lora_A.weight"):
            other = shapes.get(name.replace(".lora_A.", ".lora_B."), [0, 0])
            layers[name.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = [shape[0], shape[1], other[0]]
    return {
        "rank": config.get("r"),
        "base": base,
        "dora": bool(config.get("use_dora")),
        "layers": layers,
        "modules_to_save": list(config.get("modules_to_save") or []),
        "parameters": sum(_product(shape) for shape in shapes.values()),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "has no adapter_config.json" if folder.is_dir() else "is no directory here"
        raise MptError(f"lora.adapter: {folder} {what}", remedy=REMEDY) from None
    except (OSError, ValueError) as error:
        raise MptError(f"lora.adapter: {file} can't be read: {error}", remedy=REMEDY) from None
    if not isinstance(config, dict):
        raise MptError(f"lora.adapter: {file} holds no map", remedy=REMEDY)
    return config


def _tensors(folder: Path) -> dict[str, Any]:
    header = read_header(folder / "adapter_model.safetensors")
    if header is None:
        raise MptError(f"lora.adapter: {folder} has no adapter_model.safetensors that can be read", remedy=REMEDY)
    return header


def _last(name: str) -> str:
    return Path(name).name.lower()


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
