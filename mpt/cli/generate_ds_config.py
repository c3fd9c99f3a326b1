"""`mpt generate-ds-config`: DeepSpeed's configuration of a recipe, for mpt's own runs or anyone else's."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mpt.planning.plan import Plan

SHOWN = (
    "precision",
    "distributed.strategy",
    "offload",
    "gradient_checkpointing",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "reduce_dtype",
    "grad_accum_dtype",
)


def generate_ds_config(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe's.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it here, not to stdout.")
    ] = None,
    stage: Annotated[int | None, typer.Option(help="ZeRO stage 1, 2 or 3, in place of the recipe's strategy.")] = None,
    offload: Annotated[
        str | None, typer.Option(help="none, cpu, or optimizer=cpu,parameters=nvme,nvme_path=DIR.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="For this machine: T4, 8xH100, 2x8xA100-80GB, cpu, or a file.")
    ] = None,
) -> None:
    """Print DeepSpeed's configuration as JSON, every number written out; the decisions go to stderr."""
    plan, notes = _make_plan(recipe, overrides or [], stage, offload, machine)
    text = json.dumps(plan.deepspeed, indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        from mpt.cli.output import write_output

        write_output(output, text)
    for line in decision_lines(plan, notes):
        print(line, file=sys.stderr)
    if output is not None:
        print(f"written: {output}", file=sys.stderr)


def decision_lines(plan: "Plan", notes: tuple[str, ...]) -> list[str]:
    """Say what was decided and why, what was left to transformers, and whether it fits."""
    lines = [f"DeepSpeed's configuration of {plan.name} on {plan.machine.label}"]
    for key in SHOWN:
        decision = plan.values[key]
        value = decision.value
        if key == "offload":
            moved = [f"{what} to {value[what]}" for what in ("optimizer", "parameters") if value[what] != "none"]
            value = ", ".join(moved) or "none"
        lines.append(f"  {key}: {value} ({decision.origin.value}): {decision.reason}")
    lines += [f"  note: {note}" for note in notes]
    memory = plan.memory
    if memory.capacity_gib is not None:
        verdict = "fits" if memory.fits else "DOES NOT FIT"
        lines.append(f"  memory: about {memory.peak_gib:.1f} of {memory.capacity_gib:.1f} GiB a process: {verdict}")
    if memory.host_gib:
        lines.append(f"  host memory: about {memory.host_gib:.1f} GiB a node for what is offloaded")
    return lines


def _make_plan(
    recipe: str, overrides: list[str], stage: int | None, offload: str | None, machine: str | None
) -> "tuple[Plan, tuple[str, ...]]":
    import os

    from mpt.hardware.detect import detect_machine
    from mpt.hardware.packages import installed_packages
    from mpt.hardware.specs import parse_machine
    from mpt.planning.deepspeed_plan import read_offload, resolve_for_deepspeed
    from mpt.planning.model_facts import learn_model_facts
    from mpt.planning.modules import learn_modules
    from mpt.recipe.catalog import find_recipe
    from mpt.recipe.load import load_recipe

    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides)
    return resolve_for_deepspeed(
        loaded,
        detect_machine(os.environ) if machine is None else parse_machine(machine),
        learn_model_facts(loaded),
        name=loaded.name or path.stem,
        stage=stage,
        offload=None if offload is None else read_offload(offload),
        packages=installed_packages() if machine is None else None,
        modules=learn_modules(loaded),
    )
