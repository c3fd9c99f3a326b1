"""The folder of a file says what it may import, and the command line stays free of torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mpt

ROOT = Path(mpt.__file__).parent

# Each layer with those that it may import besides itself. `training` is started by name, so nothing may import it.
LAW: dict[str, set[str]] = {
    "errors": set(),
    "terms": set(),
    "secrets": set(),
    "hardware": {"errors", "terms"},
    "recipe": {"errors", "terms", "secrets", "hardware"},
    "planning": {"errors", "terms", "secrets", "hardware", "recipe"},
    "running": {"errors", "terms", "secrets", "hardware", "recipe", "planning"},
    "measuring": {"errors", "terms", "secrets", "hardware", "recipe", "planning", "running"},
    "reporting": {"errors", "terms", "secrets", "hardware", "recipe", "planning", "running"},
    "training": {"errors", "terms", "secrets", "hardware", "recipe", "planning", "running"},
    "cli": {"errors", "terms", "secrets", "hardware", "recipe", "planning", "running", "measuring", "reporting"},
}
TORCH_ZONE = {"torch", "transformers", "accelerate", "datasets", "deepspeed", "peft", "tokenizers", "safetensors"}


def imports_of(path: Path) -> set[str]:
    """Name every module that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if layer_of(path) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_folder_allows(path: Path) -> None:
    layer = layer_of(path)
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("mpt.")} - {layer, "__version__"}
    assert used <= LAW[layer]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_is_imported_in_the_training_folder_alone(path: Path) -> None:
    if layer_of(path) != "training":
        assert not {name.split(".")[0] for name in imports_of(path)} & TORCH_ZONE


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["detect-precision", "--machine", "8xH100", "--json"],
        ["detect-precision"],
        ["generate-ds-config", "llama3-8b-zero3", "--machine", "8xH100"],
        ["plan", "quickstart", "--machine", "T4"],
        ["validate", "quickstart"],
        ["recipes", "list"],
        ["schema"],
        ["formats", "0.1"],
        ["doctor", "quickstart", "--machine", "T4"],
        ["check", "quickstart", "--no-data"],
        ["train", "quickstart", "--dry-run"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_command_line_never_imports_torch(arguments: list[str]) -> None:
    program = (
        "import sys, json, atexit\n"
        f"sys.argv = ['mpt'] + {arguments!r}\n"
        "atexit.register(lambda: print(json.dumps(sorted(m for m in sys.modules if '.' not in m)), file=sys.stderr))\n"
        "from mpt.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stderr.splitlines()[-1])) & TORCH_ZONE
