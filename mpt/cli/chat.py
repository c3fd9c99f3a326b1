"""`mpt chat`: talk to what was trained."""

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mpt.planning.plan import Plan
    from mpt.running.chat import Chat
    from mpt.running.trained import Trained

Message = dict[str, str]


def chat(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a folder with a model, or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this and leave. Piped text is a prompt too.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message; needs a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time; higher draws more freely.")
    ] = 0.7,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw among the likeliest tokens of this share together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the same answers again.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Of a run: a step, best or final. Left out: the final model, else the newest checkpoint."),
    ] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    machine: Annotated[str | None, typer.Option(help="`cpu` keeps off the GPUs.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with --prompt or piped text.")
    ] = False,
) -> None:
    """Talk to a trained model: by its chat template where the tokenizer has one, else it goes on with your text.

    Ctrl-C ends an answer, Ctrl-D leaves, and /new begins another conversation.
    """
    import os

    from mpt.errors import MptError
    from mpt.running.chat import Chat
    from mpt.running.trained import find_trained

    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is not None and not prompt.strip():
        raise MptError("the prompt is empty", remedy="Write --prompt TEXT, or start it in a terminal to talk.")
    if as_json and prompt is None:
        raise MptError("--json is for one answer", remedy="Add --prompt TEXT.")
    trained = find_trained(model, runs_dir, checkpoint)
    plan = _plan(trained, machine)
    if trained.note:
        _say(trained.note)
    _say(f"loading {trained.place} in {plan.value('weights_dtype')} on {plan.machine.label} ...")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with Chat(plan, trained.place if trained.is_adapter else None, os.environ) as loaded:
        if system is not None and not loaded.ready["chat_template"]:
            raise MptError(
                "--system needs a chat template, and the tokenizer has none",
                remedy="Leave --system out: the model goes on with your text as it is.",
            )
        opening = [] if system is None else [{"role": "system", "content": system}]
        if prompt is not None:
            _answer_once(loaded, [*opening, {"role": "user", "content": prompt}], settings, as_json)
        else:
            _converse(loaded, opening, settings)


def _plan(trained: "Trained", machine: str | None) -> "Plan":
    import os

    from mpt.errors import UnsupportedError
    from mpt.hardware.detect import detect_machine
    from mpt.hardware.packages import installed_packages
    from mpt.hardware.specs import parse_machine
    from mpt.measuring.chat_plan import to_chat
    from mpt.measuring.trained_plan import plan_trained, with_weights, without_recipe
    from mpt.running.trained import newest_plan_of

    of_run = None if trained.run is None else newest_plan_of(trained.run)
    if of_run is None:
        recipe = without_recipe(trained)
    else:
        one = ["distributed={processes_per_node: 1}"]
        recipe = with_weights(of_run.recipe, trained, of_run=of_run, data=None, overrides=one)
    here = detect_machine(os.environ) if machine is None else parse_machine(machine)
    if machine is not None and not here.is_cpu:
        raise UnsupportedError(
            f"--machine {machine}: a chat runs on this machine", remedy="Leave it out, or write cpu."
        )
    return to_chat(plan_trained(recipe, here, installed_packages(), "chat"))


def _answer_once(loaded: "Chat", messages: list[Message], settings: Mapping[str, Any], as_json: bool) -> None:
    began = time.monotonic()
    text, done = _answer(loaded, messages, settings, shows=not as_json)
    if as_json:
        took = {"tokens": done["tokens"], "seconds": round(time.monotonic() - began, 3)}
        print(json.dumps({"prompt": messages[-1]["content"], "text": text, **took}))
    if done["interrupted"]:
        from mpt.errors import ExitCode

        raise typer.Exit(ExitCode.INTERRUPTED)


def _converse(loaded: "Chat", opening: list[Message], settings: Mapping[str, Any]) -> None:
    """Ask and answer until Ctrl-D. Without a chat template nothing is remembered: each text is gone on with."""
    import readline  # noqa: F401 - input() edits lines and remembers them with it

    remembers = loaded.ready["chat_template"]
    if not remembers:
        _say("the tokenizer has no chat template: the model goes on with each text as it is")
    _say("Ctrl-C ends an answer, Ctrl-D leaves, /new begins another conversation")
    conversation = list(opening)
    while True:
        try:
            asked = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _say("Ctrl-D leaves")
            continue
        if asked.strip() == "/new":
            conversation = list(opening)
        elif asked.strip():
            messages = [*conversation, {"role": "user", "content": asked}]
            text, done = _answer(loaded, messages, settings, shows=True)
            _note(done)
            if remembers:
                conversation = [*messages, {"role": "assistant", "content": text}]


def _answer(
    loaded: "Chat", messages: list[Message], settings: Mapping[str, Any], *, shows: bool
) -> tuple[str, Mapping[str, Any]]:
    """Show an answer while it comes; Ctrl-C ends it."""
    from mpt.reporting.samples import printable

    text = ""
    done: Mapping[str, Any] = {}
    with _ctrl_c_ends_the_answer(loaded):
        for told in loaded.ask(messages, **settings):
            done = told.get("done", done)
            text += told.get("text", "")
            if shows:
                print(printable(told.get("text", "")), end="\n" if done else "", flush=True)
    return text, done


@contextmanager
def _ctrl_c_ends_the_answer(loaded: "Chat") -> Iterator[None]:
    """Ask the model to stop at the first Ctrl-C, whose end is then waited for; leave at a second one."""
    asked: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        loaded.interrupt()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _note(done: Mapping[str, Any]) -> None:
    if done["dropped"]:
        _say(f"[the {done['dropped']} oldest messages no longer fit and were left out]")
    if done["cut"]:
        _say("[the beginning of the text does not fit and was left out]")
    if done["tokens"] >= done["room"] and not done["interrupted"]:
        _say(f"[cut after {done['tokens']} tokens]")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
