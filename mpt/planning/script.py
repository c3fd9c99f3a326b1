"""A plan -> a plain Hugging Face Trainer script that trains the same run without mpt.

The script computes what the worker (`mpt.training`) computes, in its order, so that on one machine its losses and
weights are the worker's bit for bit (`tests/cli/test_emit_script.py`). What the worker does beside the numbers is named
at the script's head. Called by `mpt train --emit-script`.
"""

from collections.abc import Mapping
from pathlib import Path

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.planning.script_parts import needs
from mpt.planning.script_parts.assembly import Piece, code, embed, join, needed_by, part
from mpt.planning.script_parts.constants import constants
from mpt.planning.script_parts.functions import build_arguments, main, read_documents
from mpt.planning.script_parts.header import header, installed
from mpt.recipe.sources import COMPRESSED
from mpt.terms import Packing, Strategy, Task

LONGEST_LINE = 120


def to_script(plan: Plan, versions: Mapping[str, str] | None = None) -> str:
    """Write the script.

    `versions` are those of the packages, for the script's head; None: of the installed ones. Raises MptError for a plan
    that a plain Trainer script can't carry out.
    """
    _refuse(plan)
    values = _excuse_length(constants(plan))
    flow = [code(f"import torch\n{values}"), *_data(plan), *_model(plan), *_trainer(plan), *_ends(plan)]
    trainer = "RunTrainer" if _mixins(plan) else "Trainer"
    imports, body = join([*flow, *_embedded(plan), code(build_arguments(plan)), code(main(plan, trainer))])
    head = _excuse_length(header(plan, installed(plan) if versions is None else versions))
    return f'{head}\n\n{imports}\n\n{body}\n\n\nif __name__ == "__main__":\n    main()\n'


def _excuse_length(text: str) -> str:
    """Mark the lines that a recipe's long path or prompt makes long: it stays in one piece."""
    return "\n".join(f"{line}  # noqa: E501" if len(line) > LONGEST_LINE else line for line in text.splitlines())


def _refuse(plan: Plan) -> None:
    wishes = []
    if plan.value("task") != Task.CAUSAL_LM:
        wishes.append(f"task: {plan.value('task')}")
    if plan.recipe.lora is not None and plan.deepspeed is not None:
        if plan.recipe.lora.merge:
            wishes.append("lora.merge under DeepSpeed")
        if plan.recipe.lora.changes_base:
            wishes.append(f"lora.init {plan.recipe.lora.init} under DeepSpeed")
    if plan.value("distributed.strategy") == Strategy.FSDP2:
        wishes.append("distributed.strategy: fsdp2")
    if (plan.value("fp8") or {}).get("backend") == "transformer_engine":
        wishes.append("precision.fp8.backend: transformer_engine")
    if plan.recipe.compile == "regional":  # where the plan chose it, the head of the script says that it is left out
        wishes.append("compile: regional")
    if plan.value("nodes") > 1:
        wishes.append(f"{plan.value('nodes')} nodes")
    if not plan.recipe.data.has_plain_sources:
        wishes.append("data.source with maps")
    if plan.value("packing") == Packing.BEST_FIT:
        wishes.append("data.packing: best_fit")
    if plan.value("padding_free"):
        wishes.append("batches without padding (data.packing: none with Flash Attention)")
    if plan.value("early_stopping") is not None:
        wishes.append("early_stopping")
    if plan.recipe.metrics:
        wishes.append("metrics")
    if "perplexity" in str(plan.training_arguments.get("metric_for_best_model")):
        wishes.append("training.metric_for_best_model: perplexity")
    if plan.recipe.data.max_bad_rows:
        wishes.append("data.max_bad_rows")
    if any(Path(source).suffix.lower() in COMPRESSED for source in needs.sources(plan)):
        wishes.append("packed files (.gz, .zst)")
    if plan.recipe.data.streaming and "builtin" in needs.kinds(plan):
        wishes.append("data.streaming of the built-in corpus")
    if wishes:
        raise MptError(
            f"no script can be written for {', '.join(wishes)}",
            remedy="Scripts train causal language models, every weight or adapters, by one process, DDP or ZeRO 1-3.",
        )


# --- the pieces


def _data(plan: Plan) -> list[Piece]:
    """From the source of the text to a batch."""
    found, is_streamed = needs.kinds(plan), plan.recipe.data.streaming
    names = ["files"] * ("files" in found)
    if found != {"builtin"}:
        names.append("stream_text_only" if is_streamed else "text_only")
    names += [f"{'stream' if is_streamed else 'read'}_{kind}" for kind in sorted(found)]
    names += ["hold_out"] * (needs.holds_out(plan) and not is_streamed)
    form = "packed" if plan.value("packing") == Packing.BLOCKS else "padded"
    rest = [
        "tokenizer_trained" if needs.trains_tokenizer(plan) else "tokenizer_loaded",
        f"samples_stream_{form}" if is_streamed else f"samples_{form}",
        *["repeat_stream"] * is_streamed,
        f"collate_{form}",
    ]
    return [*map(part, names), code(read_documents(plan)), *map(part, rest)]


def _model(plan: Plan) -> list[Piece]:
    """From the seed or checkpoint to the model that is trained."""
    divided = plan.value("distributed.strategy") == Strategy.ZERO3
    if plan.value("quantization") is not None:
        names = ["model_quantized"]
    elif plan.recipe.model.config is None:
        names = ["model_from_checkpoint"]
    else:
        names = ["model_from_config_zero3" if divided else "model_from_config"]
    names += ["cast_weights"] * needs.casts_weights(plan)
    names += ["accumulate_in_fp32"] * needs.accumulates_in_fp32(plan)
    names += ["convert_to_float8"] * bool(needs.float8_modules(plan))
    names += needs.adapters(plan)
    return [part(name) for name in names + ["pure_bf16_optimizer"] * needs.has_own_optimizer(plan)]


def _ends(plan: Plan) -> list[Piece]:
    """What comes before training begins, and what after it."""
    names = ["check_launcher"] * needs.needs_launcher(plan) + ["join_deepspeed"] * (plan.deepspeed is not None)
    names.append(needs.save(plan))
    return [part(name) for name in names + ["sample"] * (plan.recipe.sample is not None)]


def _embedded(plan: Plan) -> list[Piece]:
    names = ["islands"] * bool(needs.islands(plan))
    names += ["float8_linear"] * bool(needs.float8_modules(plan))
    names += ["pure_bf16"] * needs.has_own_optimizer(plan)
    names += ["chunked_loss"] * (plan.value("loss") == "chunked")
    names += ["loss_scaling"] * needs.embeds_scaler(plan)
    names += ["reduction"] * needs.reduces_by_hook(plan)
    return [embed(name) for name in needed_by(names)]


def _mixins(plan: Plan) -> list[tuple[str, str]]:
    """Name what stands before the Trainer's own methods: (piece, class)."""
    mixins = []
    if needs.evaluates_on_the_way(plan):
        mixins.append(("keep_randomness", "KeepRandomness"))
    if needs.scales_loss(plan):
        mixins.append(("scale_loss", "ScaleLoss"))
    if plan.deepspeed is not None and "optimizer" in plan.deepspeed:
        mixins.append(("weight_decay_groups", "WeightDecayGroups"))
    if needs.casts_buffers(plan):
        mixins.append(("keep_buffers", "KeepBuffers"))
    if needs.reduces_by_hook(plan):
        mixins.append(("reduce_gradients", "ReduceGradients"))
    return mixins


def _trainer(plan: Plan) -> list[Piece]:
    """The Trainer of this run, where it is not transformers' own as it stands."""
    mixins = _mixins(plan)
    if not mixins:
        return []
    names = ["dynamic_scaler"] * (needs.scales_loss(plan) and not needs.embeds_scaler(plan))
    bases = ", ".join(name for _, name in mixins)
    said = '    """The Trainer, with what makes this the same run."""'
    own = code(f"from transformers import Trainer\nclass RunTrainer({bases}, Trainer):\n{said}")
    return [*map(part, names), *(part(name) for name, _ in mixins), own]
