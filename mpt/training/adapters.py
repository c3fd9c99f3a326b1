"""Low-rank adapters on a frozen model, by peft: put on, counted, and written at the end."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpt.errors import MptError
from mpt.planning.peft_keywords import to_lora_config
from mpt.planning.plan import Plan


def add_adapters(model: Any, plan: Plan) -> Any:
    """Freeze the model and put the planned adapters around its layers; without a lora block give it back unchanged.

    What is trained is fp32 whatever the frozen weights are: small updates would vanish in 16 bits, and a GradScaler
    refuses fp16 gradients. Raises MptError for what peft refuses.
    """
    section = plan.recipe.lora
    if section is None:
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    try:
        if section.adapter is not None:
            model = PeftModel.from_pretrained(model, str(Path(section.adapter).expanduser()), is_trainable=True)
        else:
            keywords = to_lora_config(section, plan.value("adapters"), plan.value("task"))
            model = get_peft_model(model, LoraConfig(**keywords))
    except (ValueError, TypeError, RuntimeError) as error:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise MptError(
            f"lora: peft refuses this: {' '.join(str(error).split())[:300]}",
            remedy=f"Mend the recipe's lora block. The model's linear layers are {', '.join(ends)}.",
        ) from error
    if section.changes_base:
        _remember_beginning(model, section.init)
    for weight in model.parameters():
        if weight.requires_grad and weight.is_floating_point():
            weight.data = weight.data.float()  # peft copies a module that is trained whole in the base's format
    return model


def load_adapters(model: Any, folder: str | None) -> Any:
    """Put trained adapters on the base that they were made for; None: give the model back unchanged.

    Raises MptError for adapters of another base.
    """
    if folder is None:
        return model
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=True)
    except (ValueError, RuntimeError, OSError) as error:
        raise MptError(
            f"the adapters in {folder} don't go on this base model: {' '.join(str(error).split())[:300]}",
            remedy="Name the base that they were trained on (base_model_name_or_path of their adapter_config.json).",
        ) from error


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers that have an adapter, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    }


def trained_count(model: nn.Module) -> int:
    """Count the parameters that have a gradient, whole ones where ZeRO-3 has divided them."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in trained)


def _remember_beginning(model: Any, init: str) -> None:
    """Keep the adapters' first values: with them the trained ones become adapters of the checkpoint's own weights, from
    which their beginning was taken (peft, `path_initial_model_for_weight_conversion`)."""
    config = model.peft_config["default"]
    model.mpt_beginning = tempfile.TemporaryDirectory(prefix="mpt-adapters-")
    config.init_lora_weights = True  # so that it is loaded as it is, and takes nothing out of the weights again
    model.save_pretrained(model.mpt_beginning.name)
    config.init_lora_weights = init


def save_trained(model: Any, folder: Path, plan: Plan, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Write the trained model: every weight, its adapters, or with `lora.merge` the weights with the adapters in them.

    `state_dict` holds an engine's own weights, of adapters only what is trained; None: the model's.
    """
    section = plan.recipe.lora
    if section is not None and section.merge:
        with _masters(model, state_dict or {}):
            _save_merged(model, folder)
    elif section is not None and section.changes_base:
        with _masters(model, state_dict or {}):
            model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=model.mpt_beginning.name)
    else:  # save_pretrained empties the dictionary that it is given
        model.save_pretrained(str(folder), state_dict=None if state_dict is None else dict(state_dict))


@contextmanager
def _masters(model: Any, trained: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put an engine's masters in the place of its copies, which may be 16-bit, while the context lasts."""
    copies = {weight: weight.data for name, weight in model.named_parameters() if name in trained}
    for name, weight in model.named_parameters():
        if name in trained:
            weight.data = trained[name].to(weight.device)
    yield
    for weight, copy in copies.items():
        weight.data = copy


def _save_merged(model: Any, folder: Path) -> None:
    """Add the adapters to the weights below them and write the model as transformers built it."""
    model.merge_adapter(safe_merge=True)
    base = model.get_base_model()
    merged = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" in name or ".original_module." in name:
            continue
        merged[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    base.save_pretrained(str(folder), state_dict=merged)
