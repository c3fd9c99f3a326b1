"""The keys of `training:`: those of transformers' TrainingArguments, less the ones that mpt itself decides.

The list with types and defaults is read from `training_arguments.json`, which `scripts/regenerate` writes from the
installed transformers: validating a recipe must not import torch.
"""

import json
from importlib.resources import files
from types import NoneType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model

from mpt.recipe.scalars import Flag, Integer, Number

PYTHON_TYPES: dict[str, Any] = {
    "integer": Integer,
    "number": Number,
    "boolean": Flag,
    "string": str,
    "array": list[str],
    "object": dict[str, Any],
    "null": NoneType,
}

# Keys that TrainingArguments has and a recipe says elsewhere, or that mpt must own for what it promises.
OWNED: dict[str, str] = {
    "output_dir": "give the directory with --runs-dir and the name with --name",
    "bf16": "write `precision: bf16` at the top level",
    "fp16": "write `precision: fp16` at the top level",
    "tf32": "write `precision: tf32` at the top level",
    "bf16_full_eval": "evaluation runs in the run's precision; leave it out: it would round the weights that are saved",
    "fp16_full_eval": "evaluation runs in the run's precision; leave it out: it would round the weights that are saved",
    "use_cpu": "write `--machine cpu` on the command line",
    "deepspeed": "write `distributed: {strategy: zero2}` at the top level; mpt writes DeepSpeed's configuration",
    "fsdp": "write `distributed: {strategy: fsdp2}` at the top level",
    "fsdp_config": "write `distributed: {strategy: fsdp2}` at the top level",
    "parallelism_config": "write `distributed:` at the top level",
    "local_rank": "the launcher sets it",
    "ddp_backend": "mpt takes nccl on GPUs and gloo on CPUs",
    "resume_from_checkpoint": "write `--resume auto|never|CHECKPOINT` on the command line",
    "do_train": "`mpt train` trains; leave it out",
    "do_eval": "set eval_strategy instead",
    "do_predict": "leave it out",
    "logging_nan_inf_filter": "mpt keeps it off: it hides a NaN loss behind a logged 0.0",
    "enable_jit_checkpoint": "mpt saves on SIGTERM by itself, all ranks at one step; leave it out",
    "auto_find_batch_size": "mpt plans micro_batch_size; leave it out or set micro_batch_size",
    "save_only_model": "mpt resumes from its checkpoints and needs the optimizer in them; leave it out",
    "save_on_each_node": "the checkpoint belongs in the shared run directory; leave it out",
    "ignore_data_skip": "mpt resumes at the very sample; leave it out",
    "full_determinism": "leave it out; runs on one machine repeat bit for bit without it on CPUs",
    "disable_tqdm": "mpt draws its own progress; leave it out",
    "log_level": "the worker's log holds everything; leave it out",
    "log_level_replica": "the worker's log holds everything; leave it out",
    "hub_token": "set HF_TOKEN in the environment: a recipe is no place for a secret",
    "remove_unused_columns": "mpt prepares the columns; leave it out",
    "label_names": "mpt prepares the columns; leave it out",
}

# Keys of older versions: the message names what to write now (transformers 4.57 -> 5.23, difference of the two
# classes).
REMOVED: dict[str, str] = {
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of all steps",
    "save_safetensors": "leave it out: checkpoints are always safetensors",
    "fp16_backend": "write `precision: fp16` at the top level",
    "half_precision_backend": "write `precision: fp16` or `precision: bf16` at the top level",
    "fp16_opt_level": "write `precision: fp16` at the top level: apex is gone",
    "evaluation_strategy": "write eval_strategy",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "overwrite_output_dir": "leave it out: `--resume never` begins anew",
    "per_gpu_train_batch_size": "write micro_batch_size at the top level",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "no_cuda": "write `--machine cpu` on the command line",
    "use_mps_device": "leave it out: the device is found",
    "use_ipex": "leave it out",
    "jit_mode_eval": "leave it out",
    "tpu_num_cores": "leave it out",
    "tpu_metrics_debug": "leave it out",
    "past_index": "leave it out",
    "fsdp_min_num_params": "write `distributed: {strategy: fsdp2}` at the top level",
    "fsdp_transformer_layer_cls_to_wrap": "write `distributed: {strategy: fsdp2}` at the top level",
    "adafactor": "write `optim: adafactor`",
    "group_by_length": "write `train_sampling_strategy: group_by_length`",
    "use_legacy_prediction_loop": "leave it out",
    "include_inputs_for_metrics": "write `include_for_metrics: [inputs]`",
    "include_tokens_per_second": "leave it out: mpt reports tokens per second; to count, include_num_input_tokens_seen",
    "push_to_hub_model_id": "write hub_model_id",
    "push_to_hub_organization": "write hub_model_id with the organisation in it",
    "push_to_hub_token": "set HF_TOKEN in the environment: a recipe is no place for a secret",
    "mp_parameters": "leave it out",
    "torchdynamo": "write torch_compile_backend",
    "ray_scope": "leave it out",
    "evaluate_during_training": "write eval_strategy",
    "max_seq_length": "write data.sequence_length",
}


# What TrainingArguments' numbers can be; it checks few of them itself. -1 steps: by epochs.
POSITIVE: dict[str, float] = {"gt": 0}
NOT_NEGATIVE: dict[str, float] = {"ge": 0}
SHARE: dict[str, float] = {"ge": 0, "lt": 1}
RANDOM_SEED: dict[str, float] = {"ge": 0, "lt": 2**32}  # numpy's
RANGES: dict[str, dict[str, float]] = {
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps", "num_train_epochs", "ddp_timeout"), POSITIVE),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), POSITIVE),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "dataloader_prefetch_factor"), POSITIVE),
    **dict.fromkeys(("save_total_limit", "ddp_bucket_cap_mb", "torch_empty_cache_steps"), POSITIVE),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("eval_delay", "dataloader_num_workers", "neftune_noise_alpha"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), RANDOM_SEED),
    "max_steps": {"ge": -1},
}


def training_arguments() -> dict[str, dict[str, Any]]:
    """Read every key of TrainingArguments with its types, choices, default and help."""
    text = files("mpt.recipe").joinpath("training_arguments.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["keys"])


def _annotation(key: str, entry: dict[str, Any]) -> Any:
    types = [PYTHON_TYPES[name] for name in entry["types"] if not (name == "string" and "choices" in entry)]
    if key in RANGES:
        limits: Any = RANGES[key]
        types = [part if part is NoneType else Annotated[part, Field(**limits)] for part in types]
    if "choices" in entry:
        types.append(Literal[tuple(entry["choices"])])
    return Union[tuple(types)]  # noqa: UP007  # made at run time


def _build_section() -> type[BaseModel]:
    fields: dict[str, Any] = {
        key: (_annotation(key, entry), Field(default=entry["default"], description=entry["help"]))
        for key, entry in training_arguments().items()
        if key not in OWNED
    }
    return create_model(
        "TrainingSection",
        __config__=ConfigDict(extra="forbid", frozen=True, protected_namespaces=()),
        __doc__="Keys of transformers.TrainingArguments, under their own names.",
        **fields,
    )


TrainingSection = _build_section()
