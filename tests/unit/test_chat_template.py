"""The chat templates that a recipe can name."""

from pathlib import Path

import pytest

from mpt.errors import MptError
from mpt.recipe.chat_template import BUILT_IN, control_tokens, read_template


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_marks_its_answers_and_writes_its_tokens(name: str) -> None:
    text = read_template(name)
    assert "{% generation %}" in text
    assert all(token in text for token in BUILT_IN[name])
    assert "bos_token" in text or "eos_token" in text or set(BUILT_IN[name]) == set(control_tokens(text))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{% for m in messages %}\n{{ m.content }\n{% endfor %}", r"own.jinja:2: .*syntax"),
        (b"{% for m in messages %}\n{{ m.content }}\n", r"own.jinja:2: .*syntax"),
        (b"{% generation %}{{ messages }}", r"own.jinja:1: .*syntax"),
        (b"\xff", "own.jinja is not UTF-8"),
        (b" \n", "own.jinja is empty"),
        (None, "own.jinja can't be read: No such file"),
    ],
    ids=["brace", "no endfor", "no endgeneration", "bytes", "empty", "absent"],
)
def test_a_template_that_cant_be_used_is_one_message_with_its_line(
    content: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MptError, match=says):
        read_template(str(path))


def test_a_name_that_is_none_lists_those_that_are() -> None:
    with pytest.raises(MptError, match="there is no chatlm") as caught:
        read_template("chatlm")
    assert "chatml" in caught.value.remedy and ".jinja" in caught.value.remedy


def test_a_template_of_ones_own_may_break_out_of_loops_and_mark_answers(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}")
    assert read_template(str(path)) == path.read_text()
