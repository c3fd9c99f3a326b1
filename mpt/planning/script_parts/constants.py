"""The values of a plan as the constants at the head of its script. Pure."""

from typing import Any

from mpt.planning.loss import chunk_tokens
from mpt.planning.peft_keywords import to_bitsandbytes_config, to_lora_config
from mpt.planning.plan import Plan
from mpt.planning.script_parts.assembly import comment, literal
from mpt.planning.script_parts.needs import (
    embeds_scaler,
    float8_modules,
    has_own_optimizer,
    holds_out,
    islands,
    kinds,
    needs_launcher,
    reduces_by_hook,
    scales_loss,
    threads,
    trains_tokenizer,
    wide_islands,
)
from mpt.terms import Packing

KEPT_CHECKPOINTS = 2  # as many as mpt keeps where the recipe does not say
TORCH_DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16", "fp64": "torch.float64"}
REASONS = {
    "ddp_find_unused_parameters": "every parameter takes part in every step",
    "logging_nan_inf_filter": "with it a NaN loss is logged as 0.0",
    "use_cpu": "without it bf16 on a CPU is refused",
    "activation_checkpointing_kwargs": "reentrant, it leaves adapters on a frozen base without gradient (peft#1142)",
}


def constants(plan: Plan) -> str:
    """Write every constant that the pieces of the plan's script read."""
    written = [
        *_data(plan),
        *_tokenizer(plan),
        *_model(plan),
        *_precision(plan),
        *_engine(plan),
        *_sample(plan),
        _training_arguments(plan),
    ]
    return "\n".join(written)


def weights_dtype(plan: Plan) -> str:
    """Spell the dtype of the weights in torch's words."""
    return TORCH_DTYPES[plan.value("weights_dtype")]


def _data(plan: Plan) -> list[str]:
    data, found = plan.recipe.data, kinds(plan)
    values: dict[str, Any] = {"NAME": plan.name}
    if found != {"builtin"}:
        values["SOURCE"] = data.source
        if data.eval_source is not None:
            values["EVAL_SOURCE"] = data.eval_source
        if found != {"files"}:
            values["SPLIT"] = data.split
        if data.eval_split is not None:
            values["EVAL_SPLIT"] = data.eval_split
        values["TEXT_COLUMN"] = data.text_column
    if "hub" in found:
        values |= {"HUB_CONFIG": data.config, "HUB_REVISION": data.revision}
    if holds_out(plan):
        values |= {"STREAMED_EVAL_DOCUMENTS": 200} if data.streaming else {"EVAL_FRACTION": data.eval_fraction}
    if data.streaming:
        values["SHUFFLE_BUFFER"] = 10_000
    values["SEQUENCE_LENGTH"] = plan.value("sequence_length")
    if plan.value("packing") == Packing.NONE:
        values["PAD_TO_MULTIPLE_OF"] = plan.value("pad_to_multiple_of")
    return [_constant(name, value) for name, value in values.items()]


def _tokenizer(plan: Plan) -> list[str]:
    section, model = plan.recipe.tokenizer, plan.recipe.model
    if trains_tokenizer(plan):
        return [_constant("VOCAB_SIZE", section.vocab_size if section is not None else plan.facts.vocab_size)]
    if section is not None and section.name_or_path is not None:
        name, revision = section.name_or_path, section.revision
    else:
        name = model.name_or_path or ""
        revision = section.revision if section is not None and section.revision else model.revision
    return [_constant("TOKENIZER", name), _constant("TOKENIZER_REVISION", revision or "main")]


def _model(plan: Plan) -> list[str]:
    section = plan.recipe.model
    lines = []
    if section.config is not None:
        config = {"vocab_size": plan.facts.vocab_size} | section.config
        lines.append(_constant("MODEL_CONFIG", config))
    else:
        lines += [
            _constant("MODEL", section.name_or_path),
            _constant("MODEL_REVISION", section.revision or "main"),
        ]
        quantization = plan.value("quantization")
        if quantization is not None:
            lines.append(_constant("QUANTIZATION", to_bitsandbytes_config(quantization)))
        else:
            # What is rounded once can't be widened again.
            lines.append(f"LOAD_DTYPE = {'torch.float32' if wide_islands(plan) else weights_dtype(plan)}")
    if section.config is None or not trains_tokenizer(plan):
        lines.append(_constant("TRUST_REMOTE_CODE", section.trust_remote_code))
    return [*lines, _constant("ATTENTION", plan.value("attention"))]


def _precision(plan: Plan) -> list[str]:
    lines = []
    section = plan.recipe.lora
    if islands(plan):
        lines.append(_constant("ISLANDS", islands(plan)))
    if float8_modules(plan):
        lines.append(_constant("FP8_MODULES", float8_modules(plan)))
        lines.append(_constant("FP8_RECIPE", plan.value("fp8")["recipe"]))
        lines.append(_constant("FP8_EMULATED", plan.value("fp8")["emulated"]))
    if section is not None:
        if section.adapter is not None:
            lines.append(_constant("ADAPTER", section.adapter))
        else:
            adapters = to_lora_config(section, plan.value("adapters"), plan.value("task"))
            lines.append(_constant("LORA", adapters))
    if has_own_optimizer(plan):
        lines.append(_constant("ROUNDING", plan.value("rounding")))
        lines.append(f"OPTIMIZER_STATE_DTYPE = {TORCH_DTYPES[plan.value('optimizer_state_dtype')]}")
        lines.append(_constant("MASTER_WEIGHTS", plan.value("master_weights_dtype") == "fp32"))
    if plan.value("loss") == "chunked":
        lines.append(comment("The logits of so many tokens stand at a time."))
        lines.append(_constant("LOSS_TOKENS", chunk_tokens(plan.facts.vocab_size, on_cpu=plan.machine.is_cpu)))
    if reduces_by_hook(plan):
        lines.append(f"REDUCE_DTYPE = {TORCH_DTYPES[plan.value('reduce_dtype')]}")
    return lines


def _engine(plan: Plan) -> list[str]:
    lines = []
    if needs_launcher(plan):
        lines.append(_constant("WORLD_SIZE", plan.value("world_size")))
    if threads(plan) is not None:
        lines.append(comment("How many threads share a sum decides its last bits."))
        lines.append(_constant("THREADS", threads(plan)))
    if scales_loss(plan):
        lines.append(_constant("LOSS_SCALE", _loss_scale(plan)))
    if plan.deepspeed is not None:
        lines.append(_constant("DEEPSPEED", dict(plan.deepspeed)))
    return lines


def _loss_scale(plan: Plan) -> dict[str, Any]:
    scale = dict(plan.value("loss_scale"))
    if embeds_scaler(plan):
        return scale
    return {"init_scale" if key == "initial" else key: value for key, value in scale.items() if value is not None}


def _sample(plan: Plan) -> list[str]:
    section = plan.recipe.sample
    if section is None:
        return []
    values = {
        "PROMPTS": section.prompts,
        "MAX_NEW_TOKENS": section.max_new_tokens,
        "TEMPERATURE": section.temperature,
        "MAX_POSITIONS": plan.facts.max_positions,
    }
    return [_constant(name, value) for name, value in values.items()]


def _training_arguments(plan: Plan) -> str:
    # mpt draws a progress of its own, and keeps checkpoints by step where the Trainer goes by modification time.
    keywords = {key: value for key, value in plan.training_arguments.items() if key != "disable_tqdm"}
    keywords["save_total_limit"] = plan.recipe.training_keys.get("save_total_limit") or KEPT_CHECKPOINTS
    said = {key: reason for key, reason in REASONS.items() if key != "use_cpu" or plan.machine.is_cpu}
    said |= {key: plan.values["precision"].reason for key in ("bf16", "fp16") if keywords.get(key)}
    said["per_device_train_batch_size"] = plan.values["micro_batch_size"].reason
    said["gradient_accumulation_steps"] = plan.values["gradient_accumulation_steps"].reason
    return f"TRAINING_ARGUMENTS = {literal(keywords, comments={key: said[key] for key in said if key in keywords})}"


def _constant(name: str, value: Any) -> str:
    return f"{name} = {literal(value, before=len(name) + 3)}"
