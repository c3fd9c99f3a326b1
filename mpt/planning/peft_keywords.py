"""The plan's adapters and quantisation in the words of peft's LoraConfig and transformers' BitsAndBytesConfig: keywords
as literals, for the worker and for generated scripts. Pure."""

from collections.abc import Mapping
from typing import Any

from mpt.recipe.schema import LoraSection
from mpt.terms import Task

TASK_TYPES = {Task.CAUSAL_LM: "CAUSAL_LM", Task.SFT: "CAUSAL_LM", Task.SEQUENCE_CLASSIFICATION: "SEQ_CLS"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "uint8": "uint8"}


def to_lora_config(section: LoraSection, planned: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Give LoraConfig's keywords that the recipe is about, and no default of peft's beside them.

    `planned` is the plan's value `adapters`.
    """
    keywords: dict[str, Any] = {
        "r": section.rank,
        "lora_alpha": section.scaling_alpha,
        "lora_dropout": section.dropout,
        "target_modules": planned["target_modules"],
    }
    optional = {
        "task_type": TASK_TYPES.get(Task(task)) if task in set(Task) else None,
        "use_rslora": section.rslora,
        "use_dora": section.dora,
        "init_lora_weights": None if section.init == "default" else section.init,
        "bias": None if section.bias == "none" else section.bias,
        "modules_to_save": planned["modules_to_save"],
        "ensure_weight_tying": planned["ties_weights"],
        "rank_pattern": dict(section.rank_pattern),
        "alpha_pattern": dict(section.alpha_pattern),
    }
    return keywords | {key: value for key, value in optional.items() if value}


def to_bitsandbytes_config(planned: Mapping[str, Any]) -> dict[str, Any]:
    """Give BitsAndBytesConfig's keywords; `planned` is the plan's value `quantization`."""
    skipped = {} if planned["skipped"] is None else {"llm_int8_skip_modules": planned["skipped"]}
    if planned["bits"] == 8:
        return {"load_in_8bit": True, "llm_int8_threshold": planned["threshold"]} | skipped
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": planned["type"],
        "bnb_4bit_use_double_quant": planned["double_quantization"],
        "bnb_4bit_compute_dtype": DTYPES[planned["compute_dtype"]],
        "bnb_4bit_quant_storage": DTYPES[planned["storage_dtype"]],
    } | skipped
