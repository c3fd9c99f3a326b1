"""A real labelled set that every machine has: docstrings of the standard library, and the package that each is from."""

import ast
import json
import sysconfig
from pathlib import Path

PACKAGES = ("asyncio", "email", "importlib", "logging")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def docstrings(package: str) -> list[str]:
    """List the docstrings of a package's functions and classes, each once."""
    files = sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py"))
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    found = {ast.get_docstring(node) for node in nodes if isinstance(node, DEFINITIONS)}
    return sorted(" ".join(text.split()) for text in found if text is not None and len(text) > 20)


def write_docstrings(path: Path) -> Path:
    """Write a row a docstring: its text, its package as `module`, and how many words it has."""
    rows = [
        {"text": text, "module": package, "words": len(text.split())}
        for package in PACKAGES
        for text in docstrings(package)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
