"""The built-in recipes: `recipes/*.yaml` of a checkout, `mpt/recipes/` of an installed wheel."""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from mpt.errors import RecipeError, RecipeProblem
from mpt.recipe.yaml_text import read_yaml


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A built-in recipe."""

    name: str
    description: str
    path: Path


def recipes_directory() -> Path:
    """Find the built-in recipes: inside the installed package, else beside it in a checkout."""
    package = Path(str(files("mpt")))
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[CatalogEntry]:
    """Name every built-in recipe with the first line of its `description`, in the order of the names."""
    entries = []
    for path in sorted(recipes_directory().glob("*.yaml")):
        value = read_yaml(path.read_bytes()).value
        description = str(value.get("description") or "") if isinstance(value, dict) else ""
        entries.append(CatalogEntry(path.stem, description.strip(), path))
    return entries


def find_recipe(name_or_path: str) -> Path:
    """Find a recipe by its path or by the name of a built-in one; a file that exists wins. Raises RecipeError."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    built_in = {found.stem: found for found in recipes_directory().glob("*.yaml")}
    if name_or_path in built_in:
        return built_in[name_or_path]
    if path.exists():
        return path
    near = get_close_matches(path.name.removesuffix(".yaml").removesuffix(".yml"), sorted(built_in), n=3)
    suggestion = f"did you mean {' or '.join(near)}?" if near else f"built in are {', '.join(sorted(built_in))}"
    problem = "there is no such file and no built-in recipe of that name"
    raise RecipeError([RecipeProblem(name_or_path, None, "", problem, suggestion)])
