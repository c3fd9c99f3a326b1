"""`mpt chat`: one answer for programs, and a conversation in a real terminal."""

import json
import os
import pty
import select
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.real_runs import MPT, Folder, environment

pytestmark = pytest.mark.slow
Trained = tuple[Folder, "subprocess.CompletedProcess[str]"]
POSITIONS = 20_000
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def chat(folder: Path, *arguments: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*MPT, "chat", *arguments], input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True, text=True, cwd=folder, env=environment(), timeout=400, check=False,
    )  # fmt: skip


def test_piped_text_gets_one_answer_within_its_limits(trained: Trained) -> None:
    settings = ("--temperature", "0", "--max-new-tokens", "6", "--json")
    done = chat(trained[0].path, "tiny", *settings, stdin="The module\n")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["prompt"], told["tokens"]) == ("The module", 6)
    assert told["text"].strip() and "runs/tiny/final in fp32" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing", "--prompt", "x"], "and no model either"),
        (["tiny", "--prompt", " "], "the prompt is empty"),
        (["tiny", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["tiny", "--prompt", "x", "--system", "be kind"], "--system needs a chat template"),
        (["tiny", "--prompt", "x", "--machine", "8xH100"], "runs on this machine"),
    ],
)
def test_what_cannot_be_talked_to_is_one_message(trained: Trained, arguments: list[str], says: str) -> None:
    done = chat(trained[0].path, *arguments)
    assert done.returncode in (2, 3), done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, environment() | {"TERM": "dumb"})
        self.text = ""

    def read_until(self, wanted: str, seconds: float = 300) -> str:
        """Read on until a text comes; give all that came with it."""
        until, begin = time.monotonic() + seconds, len(self.text)
        while wanted not in self.text[begin:]:
            assert time.monotonic() < until, self.text
            if select.select([self.descriptor], [], [], 1)[0]:
                try:
                    self.text += os.read(self.descriptor, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(self.text) from None
        return self.text[begin:]

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def leave(self) -> int:
        """Read to the end; give the exit status."""
        while True:
            try:
                if not os.read(self.descriptor, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def talkative(trained: Trained, tmp_path: Path) -> Path:
    """A folder `model`: of the run's, with a chat template, and with so many positions that an answer takes a while."""
    model = tmp_path / "model"
    model.mkdir()
    for file in trained[0].run.final.iterdir():
        model.joinpath(file.name).write_bytes(file.read_bytes())
    settings = json.loads(model.joinpath("tokenizer_config.json").read_text())
    model.joinpath("tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    settings = json.loads(model.joinpath("config.json").read_text())
    # An end of text that a model of such weights does not come to: no token has it.
    model.joinpath("config.json").write_text(json.dumps(settings | {"n_positions": POSITIONS, "eos_token_id": None}))
    weights = load_file(model / "model.safetensors")
    learnt = weights["transformer.wpe.weight"]
    weights["transformer.wpe.weight"] = np.resize(learnt, (POSITIONS, learnt.shape[1]))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_a_conversation_in_a_terminal(talkative: Path) -> None:
    terminal = Terminal([*MPT, "chat", "model", "--temperature", "0", "--max-new-tokens", "15000"], talkative)
    assert "no chat template" not in terminal.read_until("> ")
    terminal.type("Tell me everything\n")
    terminal.read_until("everything\r\n")
    time.sleep(1)
    terminal.type("\x03")  # Ctrl-C ends the answer
    terminal.read_until("> ")
    terminal.type("/new\n")
    terminal.read_until("> ")
    terminal.type("\x03")  # and at the prompt it only says how to leave
    terminal.read_until("Ctrl-D leaves")
    terminal.type("\x04")
    assert terminal.leave() == 0
    assert "[cut after" not in terminal.text  # it was ended, and did not come to its last token
