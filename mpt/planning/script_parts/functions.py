"""The functions of a script that differ from plan to plan, composed line by line; the others are pieces. Pure."""

from mpt.planning.plan import Plan
from mpt.planning.script_parts import needs
from mpt.planning.script_parts.constants import weights_dtype
from mpt.terms import DeviceKind, Feature


def read_documents(plan: Plan) -> str:
    """Write what reads the text and divides it."""
    data = plan.recipe.data
    source = data.source if isinstance(data.source, str) else data.source_names
    eval_source = data.eval_source if isinstance(data.eval_source, str) else data.eval_source_names
    read = _reading(plan, "SOURCE", source, "SPLIT")
    if data.eval_source is not None:
        other = _reading(plan, "EVAL_SOURCE", eval_source, "SPLIT")
    elif data.eval_split is not None:
        other = _reading(plan, "SOURCE", source, "EVAL_SPLIT")
    else:
        other = "None"
    lines = ["def read_documents(seed):", '    """Read the text: (what is trained on, what is evaluated on)."""']
    if not data.streaming:
        lines.append(f"    return hold_out({read}, seed)" if needs.holds_out(plan) else f"    return {read}, {other}")
    else:
        lines.append(f"    documents = {read}")
        if needs.holds_out(plan):
            lines.append("    held_out = documents.take(STREAMED_EVAL_DOCUMENTS)")
            lines.append("    documents = documents.skip(STREAMED_EVAL_DOCUMENTS)")
            other = "held_out"
        lines.append(f"    return documents.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), {other}")
    joins = "concatenate_datasets(" in f"{read}{other}"
    return "\n".join([*["from datasets import concatenate_datasets"] * joins, *lines])


def _reading(plan: Plan, constant: str, source: str | list[str], split: str) -> str:
    """Write the expression that reads one source, or several joined."""
    verb = "stream" if plan.recipe.data.streaming else "read"

    def call(one: str, kind: str) -> str:
        return {"builtin": f"{verb}_builtin()", "files": f"{verb}_files({one})"}.get(
            kind, f"{verb}_hub({one}, {split})"
        )

    if isinstance(source, str):
        return call(constant, needs.kind_of(source))
    found = [needs.kind_of(one) for one in source]
    if len(source) == 1:
        return call(f"{constant}[0]", found[0])
    if len(set(found)) == 1 and found[0] != "builtin":
        return f"concatenate_datasets([{call('source', found[0])} for source in {constant}])"
    calls = [call(f"{constant}[{place}]", kind) for place, kind in enumerate(found)]
    return f"concatenate_datasets([{', '.join(calls)}])"


def build_arguments(plan: Plan) -> str:
    """Write what makes TrainingArguments and sets the process up for them."""
    machine = plan.machine
    lines = ["def build_arguments(output):", '    """Set the process up, and say how it trains."""']
    if needs.threads(plan) is not None:
        lines += ['    if "OMP_NUM_THREADS" not in os.environ:', "        torch.set_num_threads(THREADS)"]
    if machine.is_cpu and plan.deepspeed is not None:
        lines.append('    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for a GPU')
    given = ", deepspeed=DEEPSPEED" if plan.deepspeed is not None else ""
    lines.append(f"    arguments = TrainingArguments(output_dir=output{given}, **TRAINING_ARGUMENTS)")
    if plan.deepspeed is not None:
        lines.append("    join_deepspeed()")
    if not machine.is_cpu and not needs.needs_launcher(plan):
        lines.append("    # One process trains on one device: the Trainer would wrap the model in DataParallel.")
        lines.append("    arguments._n_gpu = min(1, arguments.n_gpu)")
    tf32 = _tf32(plan)
    if tf32 is not None:
        lines.append("    # What stays fp32 beside 16-bit matrix multiplications may use TF32; an fp32 run means fp32.")
        lines.append(f"    enable_tf32({tf32})")
    lines.append("    return arguments")
    imports = ["import torch", "from transformers import TrainingArguments"]
    imports += ["import os"] * ("os." in "".join(lines))
    imports += ["from transformers.utils.import_utils import enable_tf32"] * (tf32 is not None)
    return "\n".join([*imports, *lines])


def _tf32(plan: Plan) -> bool | None:
    """Whether fp32 matrix multiplications use TF32; None where the device has none."""
    if plan.machine.kind is not DeviceKind.CUDA or not plan.machine.all_compute(Feature.TF32):
        return None
    return bool(plan.value("tf32"))


def _shape_model(plan: Plan) -> list[str]:
    """What is done to the built model, in this order, before the Trainer sees it."""
    kept = needs.wide_islands(plan)
    lines = []
    if needs.casts_weights(plan):
        wide = ', [name for name, dtype in ISLANDS.items() if dtype == "fp32"]' * bool(kept)
        lines.append(f"    cast_weights(model, {weights_dtype(plan)}{wide})")
    lines += ["    install_islands(model, ISLANDS)"] * bool(needs.islands(plan))
    lines += ["    convert_to_float8(model)"] * bool(needs.float8_modules(plan))
    lines += ["    accumulate_in_fp32(model)"] * needs.accumulates_in_fp32(plan)
    section = plan.recipe.lora
    if section is None:
        return lines
    lines.append("    model = add_adapters(model)")
    return lines + ["    beginning = keep_beginning(model)"] * (needs.save(plan) == "converted_save")


def _chunk_loss(plan: Plan) -> list[str]:
    if plan.value("loss") != "chunked":
        return []
    model = "model" if plan.recipe.lora is None else "model.get_base_model()"
    return [
        '    scaler = getattr(trainer.accelerator, "scaler", None)',
        f"    install_chunked_loss({model}, LOSS_TOKENS, lambda: foretold_scale(scaler))",
    ]


def main(plan: Plan, trainer: str) -> str:
    """Write `main`; `trainer` names the class that trains."""
    shaping, converts = _shape_model(plan), needs.save(plan) == "converted_save"
    lines = [
        "import argparse",
        "from pathlib import Path",
        "import torch",
        *["from transformers import Trainer"] * (trainer == "Trainer"),
        "def main():",
        '    """Prepare data and model; train, evaluate, save."""',
        '    parser = argparse.ArgumentParser(description=f"Train {NAME}.")',
        '    parser.add_argument("output", nargs="?", default=f"{NAME}-output", help="folder to write to")',
        '    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint there")',
        *['    parser.add_argument("--local_rank", help="given by DeepSpeed\'s launcher")']
        * (plan.deepspeed is not None),
        "    options = parser.parse_args()",
        *["    check_launcher()"] * needs.needs_launcher(plan),
        "    arguments = build_arguments(options.output)",
        '    with arguments.main_process_first(desc="preparing the data"):',
        "        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed",
        "        documents, held_out = read_documents(seed)",
        "        tokenizer = load_tokenizer(documents, arguments)",
        "        samples, held_out_samples = build_samples(documents, held_out, tokenizer)",
        "    model = build_model(arguments, tokenizer)",
        *shaping,
        "    pad_token_id = model.config.pad_token_id",
        f"    trainer = {trainer}(",
        "        model=model,",
        "        args=arguments,",
        f"        train_dataset={'RepeatedStream(samples)' if plan.recipe.data.streaming else 'samples'},",
        "        eval_dataset=held_out_samples,",
        "        data_collator=build_collator(tokenizer),",
        "        processing_class=tokenizer,",
        *["        optimizer_cls_and_kwargs=pure_bf16_optimizer(arguments),"] * needs.has_own_optimizer(plan),
        "    )",
        *_chunk_loss(plan),
        "    trainer.train(resume_from_checkpoint=options.resume or None)",
        "    trainer.save_state()  # every loss that was logged, in trainer_state.json",
        *["    if held_out_samples is not None:", "        trainer.evaluate()"] * needs.evaluates(plan),
        "    # The Trainer has copied the tokenizer's pad into the configuration. A model built from that again would",
        "    # freeze the embedding of that token, which often is the end of text (torch.nn.Embedding, padding_idx).",
        "    model.config.pad_token_id = pad_token_id",
        f'    save(trainer, tokenizer, Path(options.output) / "final"{", beginning" * converts})',
        *["    sample(trainer, tokenizer)"] * (plan.recipe.sample is not None),
    ]
    return "\n".join(lines)
