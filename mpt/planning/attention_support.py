"""What the model types of transformers do with an attention implementation. Pure.

`attention_support.json` is written by `scripts/attention_support.py`, from transformers 5.23: the lists `without_*` are
the classes' own `_supports_*`; the lists `apart_*` were measured, with tiny random models whose second document must
not notice what the first one says. Recurrent and convolutional layers carry one document into the next whatever the
mask says, so types with such layers stand in no list. The worker measures it again before it trains.
"""

import json
from functools import cache
from importlib.resources import files

from mpt.terms import Attention


def is_flash(attention: str) -> bool:
    """Whether an implementation is one of Flash Attention's, from a package or the kernels hub (as transformers asks).

    >>> is_flash("flash_attention_2"), is_flash("kernels-community/flash-attn2"), is_flash("flex_attention")
    (True, True, False)
    """
    return "flash" in attention


def has_attention(model_type: str, attention: str) -> bool:
    """Whether a model type can run an implementation; a type that transformers does not know is taken at its word."""
    if is_flash(attention):
        return model_type not in _lists()["without_flash"]
    if attention == Attention.SDPA:
        return model_type not in _lists()["without_sdpa"]
    return attention != Attention.FLEX or model_type not in _lists()["without_flex"]


def keeps_documents_apart(model_type: str, attention: str) -> bool:
    """Whether documents that share a sample can be kept from seeing one another.

    Flash Attention is told where documents end; the others build a mask from positions that begin anew.
    """
    return model_type in _lists()["apart_by_lengths" if is_flash(attention) else "apart_by_positions"]


@cache
def _lists() -> dict[str, frozenset[str]]:
    text = files("mpt.planning").joinpath("attention_support.json").read_text(encoding="utf-8")
    return {name: frozenset(types) for name, types in json.loads(text).items()}
