"""Plan -> keywords for `transformers.TrainingArguments`: a dict, because building the class imports torch.

The recipe's `training:` keys pass through under their own names. What mpt decides is added, and nothing else: a
default of the Trainer that mpt does not need to change is left to it.
"""

from typing import Any

from mpt.errors import MptError
from mpt.planning.compiling import COMPILE_KEY, COMPILE_OPTIONS, Compile
from mpt.planning.metrics import best_metric
from mpt.recipe.metrics import is_less_better
from mpt.recipe.schema import Recipe
from mpt.terms import FP8_MODES, Precision

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
    by_deepspeed: bool = False,
    by_deepspeed_autocast: bool = False,
    compiles: Compile = False,
    has_even_batches: bool = True,
    by_liger: bool = False,
) -> dict[str, Any]:
    """Build the keywords, less output_dir and deepspeed, which the worker knows.

    `by_deepspeed_autocast`: DeepSpeed's own torch_autocast casts, and accelerate must not turn its bf16 engine on.
    `has_even_batches`: every batch has the same shape.
    """
    asked = recipe.training_keys
    keywords: dict[str, Any] = {
        "per_device_eval_batch_size": micro_batch_size,
        "lr_scheduler_type": "linear",
        # Our defaults, the recipe's keys over them.
        "ddp_find_unused_parameters": False,
        "optim": "adamw_torch_fused",
    }
    keywords |= {key: value for key, value in asked.items() if key not in OURS}
    keywords |= {
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "bf16": (precision in (Precision.BF16, *FP8_MODES) and not by_deepspeed_autocast)
        or (precision is Precision.BF16_PURE and by_deepspeed),  # transformers compares it with DeepSpeed's block
        "fp16": precision is Precision.FP16,
        "logging_nan_inf_filter": False,  # it logs 0.0 for a NaN loss
        "disable_tqdm": True,
        "use_cpu": on_cpu,
    }
    config = asked.get("accelerator_config") or {}
    if recipe.data.streaming and not has_even_batches and isinstance(config, dict):
        # accelerate would have rank 0 read for all, and join their batches, which padding makes differ in length.
        keywords["accelerator_config"] = {"dispatch_batches": False} | config
    best = best_metric(recipe)
    if best is not None:
        keywords["metric_for_best_model"] = best
    if best is not None and "greater_is_better" not in asked:
        keywords["greater_is_better"] = not is_less_better(best)  # transformers goes by the word "loss" alone
    if by_liger:
        keywords["use_liger_kernel"] = True
    for key in (COMPILE_KEY, *COMPILE_OPTIONS) if compiles == "regional" else ():
        keywords.pop(key, None)  # the worker compiles the blocks itself, with these; the Trainer would the whole
    if compiles is True:
        keywords["torch_compile"] = True
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
        if recipe.lora is not None and options.get("use_reentrant"):
            raise MptError(
                "training: use_reentrant is true with lora, whose adapters would get no gradient: the frozen weights "
                "before a checkpointed block give it no input that needs one",
                remedy="Leave use_reentrant out: mpt sets it to false.",
            )
        keywords["activation_checkpointing_kwargs"] = {"use_reentrant": False} | options
        keywords.pop("gradient_checkpointing_kwargs", None)
    return keywords
