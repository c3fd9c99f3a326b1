"""The built-in recipes: `recipes/*.yaml` of a checkout, `mpt/recipes/` of an installed wheel."""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from mpt.errors import RecipeError, RecipeProblem
from mpt.recipe.yaml_text import read_yaml

LOOK = "`mpt recipes list` shows the built-in recipes, `mpt recipes copy NAME FILE` begins with one of them."


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


def find_built_in(name: str) -> Path:
    """Find a built-in recipe by its name; raises RecipeError with the names that are near."""
    built_in = {found.stem: found for found in recipes_directory().glob("*.yaml")}
    if name in built_in:
        return built_in[name]
    near = get_close_matches(Path(name).name.removesuffix(".yaml").removesuffix(".yml"), sorted(built_in), n=3)
    suggestion = f"did you mean {' or '.join(near)}?" if near else f"built in are {', '.join(sorted(built_in))}"
    raise RecipeError(
        [RecipeProblem(name, None, "", "there is no built-in recipe of that name", suggestion)], remedy=LOOK
    )


def find_recipe(name_or_path: str) -> Path:
    """Find a recipe by its path or by the name of a built-in one; a file that exists wins. Raises RecipeError."""
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
        return find_built_in(name_or_path)
    except RecipeError as error:
        if path.exists():
            return path
        suggestion = error.problems[0].suggestion
    except OSError as error:
        suggestion = f"check the path: {error.strerror}"
    problem = "there is no such file and no built-in recipe of that name"
    raise RecipeError([RecipeProblem(name_or_path, None, "", problem, suggestion)], remedy=LOOK)


def copied_text(path: Path) -> str:
    """Give a recipe's text without the editor's line, whose relative path holds only where the recipe came from."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("# yaml-language-server:"))
