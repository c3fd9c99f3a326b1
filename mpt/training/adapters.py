"""Low-rank adapters on a frozen model, by peft."""

from typing import Any

from torch import nn

from mpt.errors import MptError
from mpt.planning.plan import Plan


def add_adapters(model: Any, plan: Plan) -> Any:
    """Freeze the model and put the recipe's adapters around its layers; without a lora block give it back unchanged.

    The adapters are fp32 whatever the frozen weights are: small updates would vanish in 16 bits, and a GradScaler
    refuses fp16 gradients. Raises MptError for target modules that the model has not.
    """
    section = plan.recipe.lora
    if section is None:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise MptError(
            f"lora.target_modules: {' '.join(str(error).split())[:300]}",
            remedy=f"Write all-linear, or names of linear layers: {', '.join(ends)}.",
        ) from error


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


def count_adapters(model: nn.Module) -> int:
    """Count the layers that have an adapter."""
    return sum(isinstance(getattr(module, "lora_A", None), nn.ModuleDict) for module in model.modules())
