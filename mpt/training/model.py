"""The model of a run, as the plan says: from a configuration or a checkpoint, in the planned dtype and attention."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import deepspeed as hf_deepspeed

from mpt.errors import MptError, UnsupportedError
from mpt.planning.plan import Plan
from mpt.recipe.schema import ModelSection
from mpt.training.precision.apply import DTYPES, cast_weights, planned_islands
from mpt.training.quantization import prepare_quantized, quantization_config

# Names beside the fields that transformers' configuration classes take, most of them older ones, and translate.
LEGACY_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "output_attentions", "num_labels"}


def build_causal_lm(plan: Plan, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Build a causal language model, as `build_with_head` does."""
    return build_with_head(AutoModelForCausalLM, plan, tokenizer, seed=seed)


def build_with_head(
    head: Any,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    keys: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Build the model with its trainable weights in the planned dtype, the same on every rank.

    `head` is one of transformers' AutoModelFor classes; `keys` of the configuration go over the recipe's or the
    checkpoint's. Raises MptError for a configuration or checkpoint that is wrong, UnsupportedError for a missing
    attention kernel.
    """
    section = plan.recipe.model
    set_seed(seed)
    try:
        if section.config:
            model = _from_config(head, plan, section, tokenizer, seed, keys or {})
        else:
            model = _from_checkpoint(head, plan, section, keys or {})
    except ImportError as error:  # transformers' word for an attention kernel or a quantiser that is not installed
        raise UnsupportedError(
            " ".join(str(error).split())[:400], remedy="Install what is missing, or ask for `attention: sdpa`."
        ) from error
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise MptError(
            f"the tokenizer has {len(tokenizer)} entries and the model's vocabulary {size}",
            remedy="Make model.config.vocab_size at least the tokenizer's, or name the model's own tokenizer.",
        )
    if plan.value("quantization") is not None:
        return prepare_quantized(model, plan)
    if plan.deepspeed is None:  # whose engine casts by itself
        cast_weights(model, DTYPES[plan.value("weights_dtype")], islands=planned_islands(plan))
    if plan.value("weights_dtype") == "fp16":
        _check_finite(model)
    return model


def _check_finite(model: PreTrainedModel) -> None:
    """Raise MptError for a weight that left fp16's range when it was cast: a loss scale never mends it."""
    for name, weight in model.named_parameters():
        held = getattr(weight, "ds_tensor", weight)  # ZeRO-3 leaves this rank's share there
        if not held.isfinite().all():
            raise MptError(
                f"the weight {name} is not finite in fp16, which ends at 65504",
                remedy=f"Ask for `precision: bf16` or fp32, or keep it wide: `precision: {{mode: fp16, layers: "
                f"{{{name.rpartition('.')[0]}: fp32}}}}`.",
            )


def _from_config(
    head: Any,
    plan: Plan,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    keys: Mapping[str, Any],
) -> PreTrainedModel:
    given = {**(section.config or {}), **keys}
    config = to_config(given, vocab_size=plan.facts.vocab_size)
    for key in ("bos_token_id", "eos_token_id"):
        if key not in given:
            setattr(config, key, getattr(tokenizer, key))
    # Weights from scratch always begin as fp32 draws, so that every precision starts from the same numbers.
    model = _drawn(head, config, plan)
    if hf_deepspeed.is_deepspeed_zero3_enabled():
        _share_draws(model, head, config, plan, seed)
    return model


def _drawn(head: Any, config: Any, plan: Plan) -> PreTrainedModel:
    return head.from_config(
        config, dtype=torch.float32, attn_implementation=plan.value("attention"), trust_remote_code=False
    )


def _share_draws(model: PreTrainedModel, head: Any, config: Any, plan: Plan, seed: int) -> None:
    """Give a model that ZeRO-3 has divided the weights that the same seed gives without ZeRO-3.

    transformers draws divided weights in another order. Rank 0 draws them whole, in host memory, and hands them out.
    """
    import deepspeed

    active = hf_deepspeed._hf_deepspeed_config_weak_ref()
    is_source = deepspeed.comm.get_rank() == 0
    whole: dict[str, torch.Tensor] = {}
    if is_source:
        hf_deepspeed.unset_hf_deepspeed_config()
        try:
            set_seed(seed)
            whole = dict(_drawn(head, config, plan).named_parameters())
        finally:
            hf_deepspeed.set_hf_deepspeed_config(active)
    for name, weight in model.named_parameters():
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if is_source:
                weight.data.copy_(whole[name].data)


def to_config(given: dict[str, Any], *, vocab_size: int) -> Any:
    """Turn the recipe's `model.config` into a transformers configuration.

    Raises MptError for an unknown model type, a key that the type does not know, or a value that it refuses.
    """
    keys = dict(given)
    model_type = keys.pop("model_type")
    keys.setdefault("vocab_size", vocab_size)
    try:
        known = _known_keys(type(AutoConfig.for_model(model_type)))
    except ValueError as error:
        raise MptError(
            f"model.config: transformers knows no model_type {model_type}",
            remedy="Use one such as llama, qwen2 or gpt2.",
        ) from error
    unknown = sorted(set(keys) - known)
    if unknown:
        near = {key: get_close_matches(key, known, 1, 0.7) for key in unknown}
        listed = ", ".join(f"{key} (did you mean {near[key][0]}?)" if near[key] else key for key in unknown)
        raise MptError(
            f"model.config: {model_type} has no key {listed}", remedy=f"Its keys are {', '.join(sorted(known))}."
        )
    try:
        return AutoConfig.for_model(model_type, **keys)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise MptError(
            f"model.config: {' '.join(str(error).split())[:400]}",
            remedy=f"Mend that value of the {model_type} configuration.",
        ) from error


def loading(plan: Plan) -> dict[str, Any]:
    """Give the keywords of `from_pretrained` that follow from the plan, whatever head the task puts on the model.

    fp32 where some weights stay fp32 (islands, and what quantisation leaves): what is rounded once can't be widened
    again.
    """
    quantized = quantization_config(plan)
    is_wide = "fp32" in planned_islands(plan).values() or quantized is not None
    section = plan.recipe.model
    keywords: dict[str, Any] = {
        "revision": section.revision or "main",
        # transformers 5 loads the checkpoint's own dtype: bf16 master weights, unless told otherwise.
        "dtype": torch.float32 if is_wide else DTYPES[plan.value("weights_dtype")],
        "attn_implementation": plan.value("attention"),
        "trust_remote_code": section.trust_remote_code,
    }
    return keywords if quantized is None else keywords | {"quantization_config": quantized}


def _known_keys(config_class: type) -> set[str]:
    fields = {key for key in getattr(config_class, "__dataclass_fields__", {}) if not key.startswith("_")}
    return fields | set(getattr(config_class, "attribute_map", {})) | LEGACY_KEYS


def _from_checkpoint(head: Any, plan: Plan, section: ModelSection, keys: Mapping[str, Any]) -> PreTrainedModel:
    name = section.name_or_path or ""
    try:
        return head.from_pretrained(name, **loading(plan), **keys)
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise MptError(
            f"model {name} has weights of other sizes than are needed here; the worker's log lists them",
            remedy="A head that was made for another number of classes does not fit: start from the model before it.",
        ) from error
    except (OSError, ValueError) as error:
        where = "" if Path(name).exists() else " (no such directory here, so a hub id)"
        raise MptError(
            f"model {name}{where} can't be loaded: {' '.join(str(error).split())[:400]}",
            remedy="Check model.name_or_path and model.revision; hub ids need the network, and HF_TOKEN where private.",
        ) from error
