"""What is trained: the model and its tokenizer."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mpt.recipe.scalars import Flag, Integer, Text
from mpt.recipe.sections.base import Section


class ModelSection(Section):
    """The model: a checkpoint to start from, or a configuration to start from scratch."""

    name_or_path: Text | None = None
    """A local directory or a model hub id. Training continues from its weights."""
    config: dict[str, Any] | None = None
    """Build the model from scratch: any `AutoConfig` model type, as `model_type` with that type's own keys.
    `vocab_size` is the tokenizer's where it is left out."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. Pin a commit for a run that can be repeated."""
    trust_remote_code: Flag = False
    """Run Python code that comes with the checkpoint. Say true only for code that you have read."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("needs one source; give name_or_path (a checkpoint) or config (from scratch)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config has no model_type; add one, such as llama, gpt2, qwen2 or bert")
        if self.config is not None and (self.revision is not None or self.trust_remote_code):
            raise ValueError("revision and trust_remote_code belong to name_or_path, not to config; leave them out")
        return self


class TokenizerSection(Section):
    """The tokenizer: the model's own where this block is left out."""

    name_or_path: Text | None = None
    """A local directory or hub id; the model's where left out."""
    revision: Text | None = None
    """Branch, tag or commit of a hub tokenizer; the model's where the tokenizer is the model's."""
    train: Literal["byte_level_bpe"] | None = None
    """Train a tokenizer on the training text. A model built from `config` without a tokenizer gets one this way. It
    ends a text with <|endoftext|>; for masked_lm and sequence_classification it has [PAD], [CLS], [SEP] and [MASK]."""
    vocab_size: Annotated[Integer, Field(ge=257)] = 4096
    """Size of the trained vocabulary, the 256 bytes and the special tokens included."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.name_or_path is not None and self.train is not None:
            raise ValueError("name_or_path and train contradict each other; take an existing tokenizer or train one")
        if "vocab_size" in self.model_fields_set and self.train is None:
            raise ValueError("vocab_size is for a trained tokenizer; add `train: byte_level_bpe` or leave it out")
        return self
