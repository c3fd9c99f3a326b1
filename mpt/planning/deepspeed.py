"""A plan's values -> DeepSpeed's configuration: every number written out, never "auto".

DeepSpeed ignores unknown top-level keys (`zero_optimisation` is silently no ZeRO) and transformers refuses values that
differ from TrainingArguments, so the whole file is made here from the values that TrainingArguments is made from.
Stage 0 is never emitted: with bf16 or fp16 its learning depends on the loss scale (run with DeepSpeed 0.19.8: at a
scale of 2**32 nothing is learnt and no overflow is reported). Called by `mpt.planning.plan` and through it by `mpt
generate-ds-config`.
"""

import math
from collections.abc import Mapping
from typing import Any

from mpt.errors import MptError
from mpt.planning.model_facts import ModelFacts
from mpt.planning.number_formats import SIXTEEN_BIT, TORCH_ADAMW
from mpt.recipe.training_keys import training_arguments as trainer_defaults
from mpt.terms import DeviceKind, OffloadDevice, Precision, Strategy

STEPS_PER_PRINT = 1_000_000_000  # never: mpt has its own metrics
# DeepSpeed's documented defaults of asynchronous I/O (deepspeed.ai/docs/config-json, "Asynchronous I/O").
ASYNCHRONOUS_IO = {
    "block_size": 1048576,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
}


def to_deepspeed(
    values: Mapping[str, Any], facts: ModelFacts, training_arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Build the configuration, and notes on what it leaves to transformers and why.

    `values` are the plan's values under its keys, `training_arguments` the keywords of the same plan. Raises MptError
    for a strategy that is not ZeRO, and for what DeepSpeed can't do.
    """
    stage = Strategy(values["distributed.strategy"]).zero_stage
    if stage is None:
        raise MptError(
            f"the strategy is {values['distributed.strategy']}, which needs no DeepSpeed configuration",
            remedy="Ask for zero1, zero2 or zero3.",
        )
    on_cpu = values["device"] == DeviceKind.CPU
    notes: list[str] = []
    config: dict[str, Any] = {
        "train_batch_size": values["global_batch_size"],
        "train_micro_batch_size_per_gpu": values["micro_batch_size"],
        "gradient_accumulation_steps": values["gradient_accumulation_steps"],
        "gradient_clipping": _argument(training_arguments, "max_grad_norm"),
    }
    config |= _number_formats(values)
    config["zero_optimization"] = _zero(stage, facts.hidden_size, values["offload"], on_cpu)
    if OffloadDevice.NVME in values["offload"].values():
        config["aio"] = dict(ASYNCHRONOUS_IO)
    offloads = values["offload"]["optimizer"] != OffloadDevice.NONE
    if values["precision"] == Precision.BF16_PURE and values["optimizer"] in TORCH_ADAMW:
        notes.append(
            "no optimizer section: mpt's own optimizer rounds the bf16 weights, and DeepSpeed has none that does"
        )
        config["zero_allow_untested_optimizer"] = True
    else:
        config |= _optimizer(training_arguments, offloads, on_cpu, notes)
    notes.append(_scheduler_note(training_arguments))
    config["checkpoint"] = {"use_node_local_storage": False, "load_universal": False, "tag_validation": "Fail"}
    config |= {"steps_per_print": STEPS_PER_PRINT, "wall_clock_breakdown": False}
    return config, tuple(notes)


def _number_formats(values: Mapping[str, Any]) -> dict[str, Any]:
    precision = Precision(values["precision"])
    half, accumulation = SIXTEEN_BIT.get(precision, "fp32"), values["grad_accum_dtype"]
    computes = values["gradient_dtype"]
    if accumulation not in ("fp32", computes):
        raise MptError(
            f"precision.grad_accum_dtype is {accumulation}, and DeepSpeed computes gradients in {computes}",
            remedy=f"Ask for fp32 or {computes}, or leave grad_accum_dtype out.",
        )
    blocks: dict[str, Any] = {}
    if values["autocast_dtype"] is not None:
        blocks["torch_autocast"] = _torch_autocast(values)
    elif half == "fp16":
        blocks["fp16"] = _fp16(values["loss_scale"])
    elif half == "bf16":
        # A step whose gradients are not finite is skipped, as under fp16: the weights stay whole.
        blocks["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if precision is Precision.BF16_PURE:
            # The names say what DeepSpeed makes no copy of. The states are the optimizer's own affair.
            blocks["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    # DeepSpeed's own default for both is the 16-bit type of the weights.
    blocks["communication_data_type"] = values["reduce_dtype"]
    blocks["data_types"] = {"grad_accum_dtype": accumulation}
    return blocks


def _torch_autocast(values: Mapping[str, Any]) -> dict[str, Any]:
    """fp32 weights under torch.autocast: the engine that can hold fp32 islands."""
    if values["reduce_dtype"] != "fp32":
        raise MptError(
            f"precision.reduce_dtype is {values['reduce_dtype']}, and beside fp32 islands DeepSpeed sums in fp32",
            remedy="Leave reduce_dtype out, or precision.layers.",
        )
    # DeepSpeed sums the gradients of "safe" modules in 16 bits; none are.
    return {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def _fp16(scale: Mapping[str, Any] | None) -> dict[str, Any]:
    if scale is None:
        raise MptError("fp16 needs a loss scale", remedy="Leave precision.loss_scale out for the usual one.")
    if "static" in scale:
        return {"enabled": True, "auto_cast": False, "loss_scale": scale["static"]}
    for key, only in (("growth_factor", 2), ("backoff_factor", 0.5)):
        if scale[key] != only:
            raise MptError(
                f"precision.loss_scale.{key} is {scale[key]:g}, and DeepSpeed knows only {only:g}",
                remedy="Leave it out, or ask for `distributed: {strategy: ddp}`.",
            )
    minimum = 1 if scale["min"] is None else scale["min"]
    if minimum != int(minimum):
        raise MptError(
            f"precision.loss_scale.min is {minimum:g}, and DeepSpeed takes whole numbers from 1",
            remedy=f"Set it to {max(1, round(minimum))}.",
        )
    return {
        "enabled": True,
        "auto_cast": False,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": exact_power_of_two(scale["initial"]),
        "loss_scale_window": scale["growth_interval"],
        "hysteresis": 2 if scale["hysteresis"] is None else scale["hysteresis"],
        "min_loss_scale": int(minimum),
    }


def exact_power_of_two(scale: float) -> int:
    """Give the exponent that DeepSpeed takes for a first loss scale; raises MptError where there is none.

    >>> exact_power_of_two(65536.0)
    16
    """
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        below, above = 2 ** (exponent - 1), 2**exponent
        raise MptError(
            f"precision.loss_scale.initial is {scale:g}, and DeepSpeed takes a power of two",
            remedy=f"Set it to {below} or {above}.",
        )
    return exponent - 1


def _zero(stage: int, hidden_size: int, offload: Mapping[str, Any], on_cpu: bool) -> dict[str, Any]:
    """Build zero_optimization; the bucket sizes are the formulas of transformers' "auto" (integrations/deepspeed.py,
    `trainer_config_finalize`)."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": not on_cpu,  # a CPU has no streams
        "contiguous_gradients": True,
        "reduce_bucket_size": hidden_size**2,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 10 * hidden_size,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
            "sub_group_size": 1_000_000_000,
        }
    for key, block in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        device = OffloadDevice(offload[key])
        if device is OffloadDevice.NONE:
            continue
        # Pinning on a CPU compiles an operator and gains nothing.
        zero[block] = {"device": device.value, "pin_memory": not on_cpu}
        if device is OffloadDevice.NVME:
            zero[block]["nvme_path"] = offload["nvme_path"]
    return zero


def _optimizer(arguments: Mapping[str, Any], offloads: bool, on_cpu: bool, notes: list[str]) -> dict[str, Any]:
    name, weight_decay = _argument(arguments, "optim"), _argument(arguments, "weight_decay")
    if name in TORCH_ADAMW and not arguments.get("optim_args"):
        if weight_decay:
            notes.append(
                "weight decay: mpt train gives DeepSpeed the Trainer's parameter groups, which keep it off biases and "
                "norms; another program that reads this file decays every parameter unless it does the same"
            )
        return {"optimizer": {"type": "AdamW", "params": _adamw(arguments, name, offloads, on_cpu)}}
    if name not in TORCH_ADAMW:
        reason = f"training.optim is {name}, which DeepSpeed does not build"
    else:
        reason = "training.optim_args are for transformers' optimizer"
    notes.append(f"no optimizer section: {reason}; the Trainer builds the optimizer and hands it to DeepSpeed")
    left_out: dict[str, Any] = {"zero_allow_untested_optimizer": True}
    if offloads and on_cpu:
        left_out["zero_force_ds_cpu_optimizer"] = False  # torch's own, for DeepSpeed would compile one
    elif offloads:
        notes.append("accelerate turns that optimizer into DeepSpeedCPUAdam, which the offload needs")
    return left_out


def _adamw(arguments: Mapping[str, Any], name: str, offloads: bool, on_cpu: bool) -> dict[str, Any]:
    params: dict[str, Any] = {
        "lr": _argument(arguments, "learning_rate"),
        "betas": [_argument(arguments, "adam_beta1"), _argument(arguments, "adam_beta2")],
        "eps": _argument(arguments, "adam_epsilon"),
        "weight_decay": _argument(arguments, "weight_decay"),
    }
    if on_cpu or not offloads:
        # torch's AdamW, fused as transformers' default is: DeepSpeed's FusedAdam is compiled with nvcc at the first
        # run, its CPU Adam with g++. Offloaded states want the latter (vectorised, copies back while it updates).
        params |= {"torch_adam": True} | ({"fused": True} if name == "adamw_torch_fused" else {})
    return params


def _scheduler_note(arguments: Mapping[str, Any]) -> str:
    """Say why there is never a scheduler section.

    DeepSpeed's schedulers begin at iteration -1 where torch's begin at 0, so their learning rate lags one step behind,
    the first two steps have the rate 0, and a warm-up is never shorter than 2 steps
    (deepspeed/runtime/lr_schedules.py, 0.19.8; `tests/training/test_deepspeed_accepts.py` holds it).
    """
    schedule = _argument(arguments, "lr_scheduler_type")
    return (
        f"no scheduler section: DeepSpeed's schedules lag one step behind transformers' {schedule}; the Trainer steps "
        "its own"
    )


def _argument(arguments: Mapping[str, Any], key: str) -> Any:
    """Look a keyword up, or what TrainingArguments takes for it."""
    return arguments[key] if key in arguments else trainer_defaults()[key]["default"]
