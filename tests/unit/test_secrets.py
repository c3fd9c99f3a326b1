"""What is a secret is cut out of every text, and what is none stays as it is."""

import io
import json
from pathlib import Path

import pytest

from mpt.recipe.load import check_recipe
from mpt.running.journal import Journal, read_events
from mpt.secrets import RedactingStream, redact, redact_all, secret_values

HUB_TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "GITHUB_PAT",
        "COMET_API_KEY",
        "OPENAI_APIKEY",
    ],
)
def test_a_variable_named_like_a_secret_is_one(name: str) -> None:
    assert secret_values({name: "opensesame1"}) == ("opensesame1",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/local/bin"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token"),
        ("TOKENIZERS_PARALLELISM", "false and long"),
        ("PAD_TOKEN_ID", "12345678"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"),
        ("SOME_TOKEN", "true"),
        ("EMPTY_TOKEN", ""),
    ],
)
def test_other_variables_and_short_values_are_none(name: str, value: str) -> None:
    assert secret_values({name: value}) == ()


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://me:hunter2@example.org/data.jsonl", "hunter2"),
        ("postgresql+psycopg://user:p%40ss@db:5432/mlflow", "p%40ss"),
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/key", "wJalrXUtnFEMI"),
        (f"https://{HUB_TOKEN}@huggingface.co/me/model", HUB_TOKEN),
        (f"401 for {HUB_TOKEN}: unauthorized", HUB_TOKEN),
        ("headers {'authorization': 'Bearer abcdefgh12345678'}", "abcdefgh12345678"),
        ("https://x.s3.amazonaws.com/a?X-Amz-Signature=fe5f80f77d5f&x=1", "fe5f80f77d5f"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", "ghp_0123456789abcdefghijABCDEFGHIJ012345"),
        ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
        ("training.hub_token=letmein123", "letmein123"),
    ],
)
def test_a_text_that_looks_like_a_secret_is_cut_out(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text, [])
    assert "[redacted]" in redact(text, [])


@pytest.mark.parametrize(
    "text",
    [
        "hub:owner/name",
        "https://huggingface.co/owner/name?revision=main",
        "git@github.com:owner/name.git",
        "ssh://git@github.com/owner/name",
        "eos_token=<|im_end|>, pad_token: <pad>",
        "model.layers.3.mlp.down_proj: loss 3.12 at 12:30:45",
        "num_input_tokens_seen=4096",
        "the tokenizer has 512 entries",
        "s3://bucket/some@key:part",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redact(text, []) == text


def test_the_longer_of_two_secrets_goes_first() -> None:
    secrets = secret_values({"A_TOKEN": "opensesame", "B_TOKEN": "opensesame-and-more"})
    assert redact("opensesame-and-more, opensesame", secrets) == "[redacted], [redacted]"


def test_json_stays_json_with_its_numbers() -> None:
    value = {"a": ["opensesame", 1.5, None], "b": {"c": "x https://u:p@h y"}}
    assert redact_all(value, ["opensesame"]) == {
        "a": ["[redacted]", 1.5, None],
        "b": {"c": "x https://[redacted]@h y"},
    }
    text = json.dumps([{"url": "https://host", "mail": "me:x@y"}], separators=(",", ":"))
    assert redact(text, []) == text


def test_the_journal_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "opensesame1")
    journal = Journal(tmp_path / "journal.jsonl", 1)
    journal.append("failed", problem="401: opensesame1", deep=[{"url": "https://me:opensesame1@hub"}], step=3)
    assert "opensesame1" not in journal.path.read_text()
    assert read_events(journal.path)[0]["step"] == 3


def test_a_stream_writes_no_secret_and_is_otherwise_itself() -> None:
    under = io.StringIO()
    stream = RedactingStream(under, {"WANDB_API_KEY": "opensesame1"})
    assert stream.write("key opensesame1\n") == 16
    stream.writelines(["more opensesame1", "\n"])
    print("and again", "opensesame1", file=stream)  # type: ignore[call-overload]
    assert under.getvalue() == "key [redacted]\nmore [redacted]\nand again [redacted]\n"
    assert stream.isatty() is False and stream.getvalue() == under.getvalue()


@pytest.mark.parametrize(
    ("text", "key", "secret"),
    [
        ("model: gpt2\ndata: https://me:hunter22@host/data.jsonl\n", "data", "hunter22"),
        (f"model: gpt2\ndata:\n  source:\n  - a.txt\n  - {HUB_TOKEN}\n", "data.source.1", HUB_TOKEN),
        ("model: gpt2\ndata: a.txt\ndescription: the key is opensesame1\n", "description", "opensesame1"),
        (f"model: gpt2\ndata: a.txt\ntraining: {{hub_token: {HUB_TOKEN}}}\n", "training.hub_token", HUB_TOKEN),
    ],
)
def test_a_recipe_with_a_credential_is_refused_with_its_line_and_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, key: str, secret: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "opensesame1")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    problems = check_recipe(path)
    assert [problem.key for problem in problems] == [key]
    assert problems[0].line == next(n for n, line in enumerate(text.splitlines(), 1) if secret in line)
    assert secret not in str(problems[0]) and "HF_TOKEN" in problems[0].suggestion


def test_a_credential_in_an_override_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: gpt2\ndata: a.txt\n")
    problems = check_recipe(path, ["data.source=https://me:hunter22@host/data.jsonl"])
    assert len(problems) == 1 and "credential" in problems[0].problem
