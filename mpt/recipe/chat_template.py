"""Chat templates that a recipe can name: those that come with mpt, and files. Asked before a run, and by the worker.

A template is Jinja as transformers reads it, with `{% generation %}` around what the model is to learn.
"""

import re
from importlib.resources import files
from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpt.errors import MptError

# Name -> the special tokens that it writes, beside those that a tokenizer has for the beginning and end of a text.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "zephyr": (),
    "vicuna": (),
    "alpaca": (),
}
SUFFIX = ".jinja"


def read_template(asked: str) -> str:
    """Read a template by its name or path. Raises MptError where there is none, or where its syntax is wrong."""
    if asked in BUILT_IN:
        return files("mpt.recipe").joinpath("chat_templates", f"{asked}{SUFFIX}").read_text(encoding="utf-8")
    path = Path(asked)
    if path.suffix != SUFFIX:
        raise MptError(
            f"data.chat_template: there is no {asked}",
            remedy=f"Built in are {', '.join(BUILT_IN)}; a template of your own is the path of a {SUFFIX} file.",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MptError(
            f"data.chat_template: {path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})",
            remedy="Write the template anew in UTF-8.",
        ) from error
    except OSError as error:
        raise MptError(
            f"data.chat_template: {path} can't be read: {error.strerror}",
            remedy=f"Mend the path; mpt looked in {Path.cwd()}.",
        ) from error
    check_syntax(text, str(path))
    return text


def control_tokens(text: str) -> tuple[str, ...]:
    """Find what a template writes in the form of a special token.

    >>> control_tokens("{{ '<|im_start|>' + role }}<|im_end|><|im_start|>")
    ('<|im_start|>', '<|im_end|>')
    """
    return tuple(dict.fromkeys(re.findall(r"<\|\w+\|>", text)))


def check_syntax(text: str, name: str) -> None:
    """Parse a template. Raises MptError with `name` and line where its syntax is wrong."""
    if not text.strip():
        raise MptError(f"data.chat_template: {name} is empty", remedy="Write a template into it, or name another.")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        environment.parse(text)
    except TemplateSyntaxError as error:
        raise MptError(
            f"{name}:{error.lineno}: the chat template's syntax is wrong: {error.message}",
            remedy="Mend that line; a template is Jinja, as transformers' chat templates are.",
        ) from error


class _Generation(Extension):
    """Transformers' own tag, as far as its syntax goes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> Node:
        """Take the block as it stands."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body).set_lineno(line)
