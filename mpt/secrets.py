"""Credentials never leave the environment: they are cut out of what is journalled, logged and printed, and a recipe
that holds one is refused.

What is a secret is known in two ways: the values of environment variables that are named like one (HF_TOKEN,
WANDB_API_KEY, MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY), and texts that look like one (user:password@ in a
URL, a hub token, a signed URL). The journal, the worker's streams and the command line's go through here.
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO, cast

REDACTED = "[redacted]"
SECRET_NAMES = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PAT|API_?KEY|(ACCESS|PRIVATE|SECRET|ACCOUNT|AUTH)_?KEY(_ID)?)$",
    re.IGNORECASE,
)
# Shorter values are words such as "true" or "none", which stand in texts for other reasons.
SHORTEST = 8
SHAPES = (
    # Credentials in a URL: user:password@, and a token alone.
    (re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)(?:[^\s/@:\"']*:[^\s/@\"']+|[\w.~%-]{20,})@"), rf"\1{REDACTED}@"),
    # A signed URL.
    (
        re.compile(
            r"(?i)([?&](?:access_token|token|api_key|password|secret|sig|signature|x-amz-(?:signature|credential|"
            r"security-token)|x-goog-signature)=)[^&\s\"']+"
        ),
        rf"\1{REDACTED}",
    ),
    # Hugging Face, GitHub, AWS, OpenAI and GitLab say what their tokens begin with.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
            r"|sk-[A-Za-z0-9_-]{20,}|glpat-[\w-]{20,})"
        ),
        REDACTED,
    ),
    (re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"), rf"\1{REDACTED}"),
    (
        re.compile(r"(?i)\b((?:push_to_)?hub_token|use_auth_token|password|api_key)(\s*[=:]\s*)[^\s,;\"']+"),
        rf"\1\2{REDACTED}",
    ),
)


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """List the values of variables that are named like a secret, the longest first.

    >>> secret_values({"HF_TOKEN": "opensesame", "WANDB_API_KEY": "short", "PAD_TOKEN_ID": "1234567890"})
    ('opensesame',)
    """
    values = {value.strip() for name, value in environ.items() if SECRET_NAMES.search(name)}
    return tuple(sorted((value for value in values if len(value) >= SHORTEST), key=lambda value: (-len(value), value)))


def redact(text: str, secrets: Iterable[str] | None = None) -> str:
    """Cut every secret out of a text; `secrets` are known ones, None: those of this process's environment.

    >>> redact("GET https://me:hunter2@host/data failed for opensesame", ["opensesame"])
    'GET https://[redacted]@host/data failed for [redacted]'
    """
    for secret in secret_values(os.environ) if secrets is None else secrets:
        text = text.replace(secret, REDACTED)
    for shape, instead in SHAPES:
        text = shape.sub(instead, text)
    return text


def redact_all(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """Cut every secret out of the texts in JSON values; keys stay."""
    known = secret_values(os.environ) if secrets is None else tuple(secrets)
    if isinstance(value, str):
        return redact(value, known)
    if isinstance(value, dict):
        return {key: redact_all(entry, known) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(entry, known) for entry in value]
    return value


def holds_secret(text: str, secrets: Iterable[str]) -> bool:
    """Whether a text has a secret in it.

    >>> holds_secret("s3://key:secret@bucket/data", []), holds_secret("hub:owner/name", [])
    (True, False)
    """
    return redact(text, secrets) != text


class RedactingStream:
    """A text stream that writes no secret, and is otherwise the one that it is put before.

    What one `write` gets is looked at as a whole: a traceback, a log record and a printed line each come in one piece.
    """

    def __init__(self, stream: TextIO, environ: Mapping[str, str]) -> None:
        self._stream = stream
        self._secrets = secret_values(environ)

    def write(self, text: str) -> int:
        """Write a text; give the length that the caller knows."""
        self._stream.write(redact(text, self._secrets))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_streams(environ: Mapping[str, str]) -> None:
    """Let nothing that this process prints hold a secret; called by the two `main` functions."""
    sys.stdout = cast(TextIO, RedactingStream(sys.stdout, environ))
    sys.stderr = cast(TextIO, RedactingStream(sys.stderr, environ))
