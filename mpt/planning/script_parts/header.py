"""The comment at a script's head: what it trains, how it is started, what was decided, what it leaves out."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from mpt import __version__
from mpt.planning.plan import Plan
from mpt.planning.script_parts import needs
from mpt.planning.script_parts.assembly import comment

DECIDED = (
    "precision",
    "fp8",
    "layers",
    "rounding",
    "loss_scale",
    "weights_dtype",
    "quantization",
    "adapters",
    "distributed.strategy",
    "attention",
    "global_batch_size",
    "gradient_checkpointing",
    "compile",
)
MISSING = (
    "stopping before a NaN or infinite loss or gradient reaches the weights (this script would train on with it)",
    "the audit, which compares what really runs (dtypes, autocast, optimizer, loss scale) with the plan",
    "checkpoints that appear whole or not at all; a checkpoint when a signal stops the run",
    "the restart after a crash (`restart`)",
    "the comparison with another precision before the run (`compare`), and its bounds",
    "the journal, and a row of metrics for each step (here the Trainer logs every `logging_steps`)",
    "errors that name the file and line of text that can't be read",
)


def header(plan: Plan, versions: Mapping[str, str]) -> str:
    """Write the comment. `versions` are those of the packages that the script imports."""
    recipe = plan.recipe
    value = plan.value
    said = f"Train {plan.name}: {recipe.description}" if recipe.description else f"Train {plan.name}"
    lines = [comment(f"{said.rstrip('.')}."), "#"]
    lines.append(comment(f"Written by mpt {__version__} from the recipe {plan.name}; it runs without mpt:"))
    start = f"torchrun --nproc-per-node {value('processes_per_node')}" if needs.needs_launcher(plan) else "python"
    lines += ["#", f"#     {start} THIS_FILE [OUTPUT] [--resume]", "#"]
    if "files" in needs.kinds(plan):
        lines.append(comment("Paths are relative to the folder in which it is started."))
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    repeats = "There it repeats the losses and weights of `mpt train` bit for bit."
    if not plan.machine.is_cpu:
        repeats = "There it repeats `mpt train` as closely as the device's kernels repeat themselves."
    lines.append(comment(f"Planned for {plan.machine.label}, with {named}. {repeats}"))
    lines += ["#", "# What was decided, and why:"]
    for key in DECIDED:
        decision = plan.values[key]
        if decision.value is not None:
            chosen = "" if isinstance(decision.value, Mapping) else f" {decision.value}"
            lines.append(comment(f"{key}{chosen}: {decision.reason}", first="# - ", rest="#   "))
    lines += ["#", "# What `mpt train` does beside, and this script does not:"]
    lines += [comment(missing, first="# - ", rest="#   ") for missing in MISSING]
    return "\n".join(lines)


def installed(plan: Plan) -> dict[str, str]:
    """Look up the versions of the packages that the script imports."""
    names = ["torch", "transformers", "accelerate", "datasets", "tokenizers"]
    names += ["deepspeed"] * (plan.deepspeed is not None) + ["peft"] * (plan.recipe.lora is not None)
    names += ["bitsandbytes"] * (plan.value("quantization") is not None)
    names += ["torchao"] * bool(needs.float8_modules(plan))
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "(not installed where this was written)"
    return found
