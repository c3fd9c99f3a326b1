"""DeepSpeed's configuration of every built-in recipe on five machines: what `mpt generate-ds-config` would print."""

import json

from mpt.errors import MptError
from mpt.hardware.specs import parse_machine
from mpt.planning.deepspeed_plan import resolve_for_deepspeed
from mpt.planning.model_facts import learn_model_facts
from mpt.recipe.catalog import list_recipes
from mpt.recipe.load import load_recipe

MACHINES = ("1xT4", "4xV100", "8xA100-80GB", "8xH100", "2x8xH100")


def deepspeed_files() -> dict[str, str]:
    """Make every file; a pair that can't be planned becomes a line with the reason in a file of its own."""
    files: dict[str, str] = {}
    skipped: list[str] = []
    for entry in list_recipes():
        recipe = load_recipe(entry.path)
        facts = learn_model_facts(recipe)
        for machine in MACHINES:
            name = f"{entry.name}--{machine}"
            try:
                plan, _ = resolve_for_deepspeed(recipe, parse_machine(machine), facts, name=entry.name)
            except MptError as error:
                skipped.append(f"{name}: {error.problem}\n")
                continue
            files[f"configs/deepspeed/{name}.json"] = json.dumps(plan.deepspeed, indent=2) + "\n"
    if skipped:
        files["configs/deepspeed/SKIPPED.txt"] = "".join(skipped)
    return files
