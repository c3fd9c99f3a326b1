"""Ask a child process what a model is: `python -m mpt.training.facts` imports torch and transformers, this does not.

Its answers are remembered in ~/.cache/mpt/facts, by the content that they follow from. Called by
`mpt.planning.model_facts`.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpt.errors import MptError

Json = dict[str, Any]
RunChild = Callable[[Json], Json]

ANSWERS_VERSION = 3  # raised when the child's answers get other keys or other words
LOCAL_HELP = "A local directory with a config.json (and the weights, to train) always works: model: path/to/it."


def run_facts_child(request: Json) -> Json:
    """Ask `python -m mpt.training.facts`; raises MptError with its last line where it fails."""
    command = [sys.executable, "-m", "mpt.training.facts", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"])[-1]
    raise MptError(said, remedy=LOCAL_HELP)


class FactsAsker:
    """Asks the child and remembers its answers, by the content that they follow from."""

    def __init__(self, cache: Path, run_child: RunChild) -> None:
        self._cache = cache
        self._run_child = run_child

    def ask(self, request: Json, *, what: str, content: Json | None = None) -> Json:
        # A hub branch may move: without its content only a commit can be remembered.
        is_fixed = content is not None or request["config"] is not None or len(request.get("revision") or "") == 40
        path = self._cache / f"{_content_hash(request, content)}.json"
        if is_fixed and path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                pass  # torn: learn it again
        try:
            facts = self._run_child(request)
        except MptError as error:
            raise MptError(
                f"what {what} is could not be learnt (its size and shape decide what fits): {error.problem}",
                remedy=LOCAL_HELP,
            ) from None
        if is_fixed:
            _remember(path, facts)
        return facts


def _remember(path: Path, facts: Json) -> None:
    """Write a cache entry whole or not at all; a cache that can't be written is no reason to stop."""
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(facts), encoding="utf-8")
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()


def _content_hash(request: Json, content: Json | None) -> str:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    text = json.dumps([request, content, version, ANSWERS_VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mpt" / "facts"
