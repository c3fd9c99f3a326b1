"""What a plan's script needs, asked of the plan: the questions that decide which pieces go in. Pure."""

from mpt.planning.layers import island_dtypes
from mpt.planning.number_formats import TORCH_ADAMW
from mpt.planning.plan import Plan
from mpt.terms import FP8_MODES, Precision, Strategy

DYNAMIC_KEYS = ("initial", "growth_factor", "backoff_factor", "growth_interval")


def sources(plan: Plan) -> list[str]:
    """List every source of text, those for evaluation included."""
    return [*plan.recipe.data.source_names, *plan.recipe.data.eval_source_names]


def kind_of(source: str) -> str:
    """Name what reads a source: `builtin`, `hub` or `files`.

    >>> kind_of("text/*.md")
    'files'
    """
    kind, colon, _ = source.partition(":")
    return kind if colon and kind in ("builtin", "hub") else "files"


def kinds(plan: Plan) -> set[str]:
    """Name the readers that the script needs."""
    return {kind_of(source) for source in sources(plan)}


def evaluates(plan: Plan) -> bool:
    """Whether there is text to evaluate on."""
    data = plan.recipe.data
    return data.eval_source is not None or data.eval_split is not None or data.eval_fraction > 0


def holds_out(plan: Plan) -> bool:
    """Whether a part of the training text is kept for evaluation."""
    data = plan.recipe.data
    return data.eval_source is None and data.eval_split is None and data.eval_fraction > 0


def evaluates_on_the_way(plan: Plan) -> bool:
    """Whether evaluations fall between training steps."""
    return evaluates(plan) and plan.training_arguments.get("eval_strategy", "no") != "no"


def trains_tokenizer(plan: Plan) -> bool:
    """Whether the tokenizer is trained on the run's text (as `mpt.training.tokenizer.is_trained`)."""
    recipe = plan.recipe
    if recipe.tokenizer is not None and recipe.tokenizer.name_or_path is not None:
        return False
    asked = recipe.tokenizer is not None and recipe.tokenizer.train is not None
    return asked or recipe.model.config is not None


def threads(plan: Plan) -> int | None:
    """Say how many threads a process on a CPU gets (as `mpt.running.launcher`); None on an accelerator, or unknown."""
    if not plan.machine.is_cpu or plan.machine.cpu_cores is None:
        return None
    return int(max(1, plan.machine.cpu_cores // plan.value("processes_per_node")))


def needs_launcher(plan: Plan) -> bool:
    """Whether a launcher must start the script: several processes, or DeepSpeed, which wants a process group."""
    return plan.deepspeed is not None or plan.value("world_size") > 1


def scales_loss(plan: Plan) -> bool:
    """Whether the loss is scaled by torch's scaler; DeepSpeed has one of its own."""
    return plan.value("loss_scale") is not None and plan.deepspeed is None


def embeds_scaler(plan: Plan) -> bool:
    """Whether torch's own scaler can't do what the plan says."""
    if not scales_loss(plan):
        return False
    return any(value is not None for key, value in plan.value("loss_scale").items() if key not in DYNAMIC_KEYS)


def islands(plan: Plan) -> dict[str, str]:
    """Name the modules that compute in another format than the model around them, fp8 ones left out."""
    return island_dtypes(plan.value("layers"), Precision(plan.value("precision")))


def wide_islands(plan: Plan) -> list[str]:
    """Name the modules that keep fp32 weights in a model whose weights are 16-bit."""
    return [name for name, dtype in islands(plan).items() if dtype == "fp32"]


def float8_modules(plan: Plan) -> list[str]:
    """Name the modules that compute in fp8."""
    listed = (plan.value("layers") or {"modules": ()})["modules"]
    return [entry["name"] for entry in listed if entry["precision"] in FP8_MODES]


def adapters(plan: Plan) -> list[str]:
    """Name the pieces that put adapters on the model."""
    section = plan.recipe.lora
    if section is None:
        return []
    if section.adapter is not None:
        return ["train_in_fp32", "continue_adapter"]
    return ["train_in_fp32", *["keep_beginning"] * section.changes_base, "add_adapters"]


def save(plan: Plan) -> str:
    """Name the piece that writes the trained model."""
    section = plan.recipe.lora
    if plan.deepspeed is not None:
        return "deepspeed_save"
    if section is None or not (section.merge or section.changes_base):
        return "plain_save"
    return "merged_save" if section.merge else "converted_save"


def casts_weights(plan: Plan) -> bool:
    """Whether the built model is in another dtype than its weights are to be; DeepSpeed casts by itself."""
    if plan.value("quantization") is not None:
        return False
    is_wider = plan.recipe.model.config is not None or bool(wide_islands(plan))
    return plan.deepspeed is None and plan.value("weights_dtype") != "fp32" and is_wider


def accumulates_in_fp32(plan: Plan) -> bool:
    """Whether bf16 weights have fp32 gradients."""
    if plan.value("precision") != Precision.BF16_PURE or plan.deepspeed is not None:
        return False
    return bool(plan.value("grad_accum_dtype") == "fp32")


def has_own_optimizer(plan: Plan) -> bool:
    """Whether the optimizer is the one that rounds bf16 weights."""
    return plan.value("rounding") is not None and plan.value("optimizer") in TORCH_ADAMW


def reduces_by_hook(plan: Plan) -> bool:
    """Whether DDP may have to sum gradients in another format than theirs."""
    if plan.value("distributed.strategy") != Strategy.DDP:
        return False
    return bool(plan.value("precision") == Precision.BF16_PURE or plan.value("reduce_dtype") != "fp32")


def casts_buffers(plan: Plan) -> bool:
    """Whether DeepSpeed's engine is a 16-bit one, which casts the whole module."""
    return any((plan.deepspeed or {}).get(engine, {}).get("enabled") for engine in ("bf16", "fp16"))
