"""What is learnt from, and what the trained model is asked to write."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpt.recipe.scalars import Flag, Integer, Number, Text
from mpt.recipe.sections.base import PositiveInt, Section

Layout = Literal["auto", "messages", "prompt_completion", "sharegpt", "alpaca"]
Mixing = Literal["oversample", "undersample"]
OF_THE_HUB = ("config", "revision", "split")


class SourceSection(Section):
    """One of several data sets; what is left out here is as `data:` has it."""

    source: Text
    """A file, glob, built-in or hub data set, as in `data.source`."""
    weight: Annotated[Number, Field(gt=0)] | None = None
    """Its share of the mixture, against the weights of the others (1 where only others have one). See `data.mixing`."""
    layout: Layout | None = None
    """As `data.layout`."""
    config: Text | None = None
    """As `data.config`."""
    revision: Text | None = None
    """As `data.revision`."""
    split: Text | None = None
    """As `data.split`."""
    text_column: Text | None = None
    """As `data.text_column`."""
    messages_column: Text | None = None
    """As `data.messages_column`."""

    @model_validator(mode="after")
    def _hub_keys(self) -> Self:
        given = [key for key in OF_THE_HUB if getattr(self, key) is not None]
        if given and not self.source.startswith("hub:"):
            raise ValueError(f"{', '.join(given)}: only a hub data set has that; leave it out")
        return self


Sources = Text | list[Text | SourceSection]


class DataSection(Section):
    """The text to learn from."""

    source: Sources
    """`builtin:python-reference` (the Python language reference, on every machine; for sft `builtin:python-questions`),
    a local file or glob, or a list of them (.txt .md .jsonl .json .csv, each also with .gz or .zst, and .parquet), or
    `hub:OWNER/NAME` for `datasets.load_dataset`. An entry of the list can be a map, with a weight and keys of its
    own."""
    mixing: Mixing = "oversample"
    """How sources with weights become a pass over the mixture. `oversample`: every row is in it, and of sources that
    are short for their weights rows come again. `undersample`: no row comes again, and of long sources rows are left
    out, drawn by `training.data_seed`. (A stream has no length: it draws a source for each row.)"""
    config: Text | None = None
    """Configuration name of a hub data set, such as `wikitext-2-raw-v1`."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set."""
    split: Text = "train"
    """Split of a hub data set to train on."""
    text_column: Text = "text"
    """Column that holds the text in .jsonl, .json, .csv, .parquet and hub data."""
    text_pair_column: Text | None = None
    """Column of the second text where a sample is a pair; sequence_classification only."""
    label_column: Text = "label"
    """Column of the class, a whole number or a name, or of the number to learn; sequence_classification only."""
    labels: Literal["classes", "regression"] = "classes"
    """Whether a label is one of some classes, which are found in the data, or a number that is learnt as such;
    sequence_classification only."""
    messages_column: Text = "messages"
    """Column of the conversation, a list of {role, content}; sft only."""
    layout: Layout = "auto"
    """How a row holds a conversation; sft only. `messages`: a column of {role, content}. `prompt_completion`: `prompt`
    and `completion`, each a text or a list of messages. `sharegpt`: `conversations` of {from, value}. `alpaca`:
    `instruction`, `input`, `output`. auto: by the columns, in this order."""
    chat_template: Text | None = None
    """How a conversation is written as text; sft only: `chatml`, `llama3`, `gemma`, `zephyr`, `vicuna`, `alpaca`, or
    the path of a Jinja template (.jinja). Left out: the tokenizer's own, or one that fits its special tokens."""
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    """Which tokens are learnt; sft only. `assistant`: every answer with the token that ends it, and of a prompt with
    completion the answers of the completion. `last_assistant`: the last answer alone. `completion`: all that follows
    the prompt; for `prompt_completion`. `all`: every token."""
    mask_probability: Annotated[Number, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that the model has to guess; masked_lm only. Of those 8 in 10 are masked, 1 in 10 become
    another token and 1 in 10 stay (Devlin et al. 2019)."""
    eval_source: Sources | None = None
    """Data to evaluate on, in the words of `source`. Left out: a held-out part of `source`."""
    eval_split: Text | None = None
    """Split of a hub data set to evaluate on, such as `validation`."""
    eval_fraction: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """Share of the documents held out for evaluation where neither `eval_source` nor `eval_split` is given; 0 for
    none."""
    sequence_length: Annotated[Integer, Field(ge=2)] = 1024
    """Tokens a sample."""
    packing: Literal["auto", "blocks", "best_fit", "none"] | Flag = "auto"
    """How documents become samples of `sequence_length` tokens. `blocks`: joined, end-of-text between them, and cut.
    `best_fit`: whole documents (longer ones in pieces; sft cuts them off) share a sample and don't see one another.
    `none`: a document a sample, truncated; how many were is reported. auto: `blocks` for causal_lm, `best_fit` for
    sft where the model keeps documents apart, else `none`. True: `blocks` for causal_lm, `best_fit` for sft; false:
    `none`."""
    pad_to_multiple_of: Literal["auto"] | PositiveInt = "auto"
    """Pad batches to a multiple of so many tokens, for the matrix units. auto: on a GPU 16 in fp8 and 8 in the 16-bit
    modes; elsewhere 1."""
    streaming: Flag = False
    """Read and tokenise while training, for data larger than the disk cache. Needs `training.max_steps`."""
    workers: Literal["auto"] | PositiveInt = "auto"
    """Processes that tokenise, on each node; the result is the same for any number. `auto`: one for each core that the
    run may use, at most 32."""
    max_bad_rows: Annotated[Number, Field(ge=0)] = 0
    """Rows that may be left out because they can't be used (broken JSON or UTF-8, no text, another schema than the rows
    before): a number, or below 1 a share of all rows. 0: the first one ends the run, with its file and line."""
    max_row_bytes: Annotated[Integer, Field(ge=1024)] = 1 << 24
    """Longest row that is read, in bytes; what is longer is a bad row, and never stands in memory. Plain text files may
    be of any length: they are read as documents of about 1 MiB, cut at the ends of lines."""

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if not self.source_names:
            raise ValueError("source is an empty list; name at least one file, glob, builtin or hub data set")
        if self.eval_source == []:
            raise ValueError("eval_source is an empty list; name a source, or leave it out")
        of_hub = [source.startswith("hub:") for source in self.source_names]
        plain = [source for source in _entries(self.source) if isinstance(source, str)]
        if len(plain) > 1 and any(source.startswith("hub:") for source in plain):
            raise ValueError("a hub data set among several sources is a map; write {source: hub:OWNER/NAME}")
        given = {key for key in (*OF_THE_HUB, "eval_split") if key in self.model_fields_set}
        if given and not any(of_hub):
            keys = ", ".join(sorted(given))
            raise ValueError(f"{keys}: only a hub data set has that; leave it out or write source: hub:OWNER/NAME")
        if self.eval_split is not None and not all(of_hub):
            raise ValueError("eval_split: only hub data sets have one, and not all sources are; use eval_source")
        if self.eval_source is not None and (self.eval_split is not None or "eval_fraction" in self.model_fields_set):
            raise ValueError("eval_source, eval_split and eval_fraction are three ways to say one thing; keep one")
        if self.eval_split is not None and "eval_fraction" in self.model_fields_set:
            raise ValueError("eval_split and eval_fraction are two ways to say one thing; keep one")
        if any(isinstance(entry, SourceSection) and entry.weight for entry in _entries(self.eval_source or [])):
            raise ValueError("eval_source: a weight has no effect, for all of it is evaluated on; leave it out")
        if "mixing" in self.model_fields_set and self.weights is None:
            raise ValueError("mixing has no effect without weights; give the sources a weight, or leave it out")
        if self.max_bad_rows >= 1 and self.max_bad_rows != int(self.max_bad_rows):
            raise ValueError(f"max_bad_rows: {self.max_bad_rows:g} is neither a whole number nor a share below 1")
        if self.streaming and any(source.startswith("builtin:") for source in self.source_names):
            raise ValueError("streaming is for large data, and the built-in corpus is half a megabyte; leave it out")
        return self

    @property
    def source_names(self) -> list[str]:
        """What `source` names, each as a text."""
        return [entry if isinstance(entry, str) else entry.source for entry in _entries(self.source)]

    @property
    def eval_source_names(self) -> list[str]:
        """What `eval_source` names, each as a text."""
        return [entry if isinstance(entry, str) else entry.source for entry in _entries(self.eval_source or [])]

    @property
    def has_plain_sources(self) -> bool:
        """Whether every source is a text, so that all are read as one."""
        return all(isinstance(entry, str) for entry in (*_entries(self.source), *_entries(self.eval_source or [])))

    @property
    def parts(self) -> tuple["DataSection", ...]:
        """The section once for each of its sources, as a text with what the source's own map says."""
        return tuple(self._part(entry) for entry in _entries(self.source))

    @property
    def eval_parts(self) -> tuple["DataSection", ...]:
        """The same for `eval_source`."""
        return tuple(self._part(entry) for entry in _entries(self.eval_source or []))

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weight of each source; None where none has one."""
        found = [entry.weight if isinstance(entry, SourceSection) else None for entry in _entries(self.source)]
        return tuple(weight or 1.0 for weight in found) if any(found) else None

    def _part(self, entry: str | SourceSection) -> "DataSection":
        if isinstance(entry, str):
            return self.model_copy(update={"source": entry})
        own = {key: getattr(entry, key) for key in SourceSection.model_fields if key != "weight"}
        return self.model_copy(update={key: value for key, value in own.items() if value is not None})


def _entries(source: str | list[str | SourceSection]) -> list[str | SourceSection]:
    return [source] if isinstance(source, str) else source


class SampleSection(Section):
    """Text generated by the trained model at the end of a run; `mpt report` lists it."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    """What the text begins with, or a list of beginnings. For sft what a user asks."""
    max_new_tokens: PositiveInt = 64
    """Tokens to generate."""
    temperature: Annotated[Number, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; above it tokens are drawn, from `training.seed`, the more freely the
    higher."""
    every_eval: Flag = False
    """Generate at each evaluation of the training too (`training.eval_strategy`). What is trained does not change."""

    @property
    def prompts(self) -> list[str]:
        """The prompts, one or several."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
