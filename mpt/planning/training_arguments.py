"""Plan -> keywords for `transformers.TrainingArguments`: a dict, because building the class imports torch.

The recipe's `training:` keys pass through under their own names. What mpt decides is added, and nothing else: a
default of the Trainer that mpt does not need to change is left to it.
"""

from typing import Any

from mpt.errors import MptError
from mpt.recipe.schema import Recipe
from mpt.terms import Precision

# Said elsewhere in the plan under mpt's own names, or done by mpt itself (save_total_limit: mpt prunes by step and
# keeps the best checkpoint; the Trainer goes by modification time).
OURS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "activation_checkpointing",
    "save_total_limit",
)


def to_training_arguments(
    recipe: Recipe,
    *,
    precision: Precision,
    on_cpu: bool,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    gradient_checkpointing: bool,
) -> dict[str, Any]:
    """Build the keywords, less output_dir and deepspeed, which the worker knows."""
    asked = recipe.training_keys
    keywords: dict[str, Any] = {
        "per_device_eval_batch_size": micro_batch_size,
        "lr_scheduler_type": "linear",
        # Our defaults, the recipe's keys over them.
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "optim": "adamw_torch_fused",
    }
    keywords |= {key: value for key, value in asked.items() if key not in OURS}
    keywords |= {
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "bf16": precision in (Precision.BF16, Precision.FP8, Precision.MXFP8),
        "fp16": precision is Precision.FP16,
        "logging_nan_inf_filter": False,  # it logs 0.0 for a NaN loss
        "disable_tqdm": True,
        "use_cpu": on_cpu,
    }
    if precision is Precision.TF32:
        keywords["tf32"] = True
    if gradient_checkpointing:
        keywords["activation_checkpointing"] = True  # gradient_checkpointing goes by this name since 5.23
        # Reentrant checkpointing leaves adapters on a frozen base without gradient, silently (peft#1142).
        options = asked.get("activation_checkpointing_kwargs") or asked.get("gradient_checkpointing_kwargs") or {}
        if not isinstance(options, dict):
            raise MptError(
                f"training.activation_checkpointing_kwargs is {options!r}, not a map",
                remedy="Write a map, such as {use_reentrant: false}, or leave it out.",
            )
        keywords["activation_checkpointing_kwargs"] = {"use_reentrant": False} | options
        keywords.pop("gradient_checkpointing_kwargs", None)
    return keywords
