"""The tokenizer of a run: an existing one, or a byte-level BPE trained on the run's own text.

A model that reads a text in both directions wants it marked: [CLS] before it, [SEP] after it and between the texts of
a pair, and a [MASK] to guess at. A tokenizer trained for such a task has these; another one has an end of text.

A trained one lives in the run directory, so that every rank and every later attempt reads the very same.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mpt.errors import MptError
from mpt.recipe.schema import Recipe
from mpt.training.progress import beat
from mpt.training.turns import wait_for

END_OF_TEXT = "<|endoftext|>"
PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"  # BERT's names (Devlin et al. 2019), its pad at 0


def is_trained(recipe: Recipe) -> bool:
    """Whether the recipe's tokenizer is trained on its text: asked for, or a model from scratch without a tokenizer."""
    if recipe.tokenizer is not None and recipe.tokenizer.name_or_path is not None:
        return False
    if recipe.tokenizer is not None and recipe.tokenizer.train is not None:
        return True
    return recipe.model.config is not None


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's existing tokenizer. Raises MptError where there is none."""
    section, model = recipe.tokenizer, recipe.model
    if section is not None and section.name_or_path is not None:
        name, revision = section.name_or_path, section.revision
    else:
        name = model.name_or_path or ""
        revision = section.revision if section is not None and section.revision else model.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise MptError(
            f"no tokenizer can be loaded from {name}: {' '.join(str(error).split())[:400]}",
            remedy="Name one with `tokenizer:` (a local directory or a hub id); hub ids need the network.",
        ) from error
    return tokenizer


def trained_tokenizer(
    folder: Path,
    texts: Callable[[], Iterable[str]],
    vocab_size: int,
    *,
    is_writer: bool,
    marks_text: bool = False,
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """Load the run's own tokenizer from `folder`; where it is not there yet the writing rank trains it first.

    `texts` gives the training documents, `marks_text` is `train_tokenizer`'s. The folder appears whole or not at all.
    """
    if is_writer and not folder.exists():
        staging = folder.with_name(f".staging-{folder.name}-{os.getpid()}")
        made = train_tokenizer(map(_alive, texts()), vocab_size, marks_text=marks_text, special_tokens=special_tokens)
        made.save_pretrained(str(staging))
        staging.rename(folder)
    wait_for(folder)
    return read_tokenizer(folder)


def _alive(text: str) -> str:
    beat()
    return text


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a run has trained."""
    return AutoTokenizer.from_pretrained(str(folder))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, marks_text: bool = False, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (Radford et al. 2019, section 2.2) of at most `vocab_size` entries.

    The 256 bytes are among them, so every text can be encoded; the end of text, or with `marks_text` the four marks of
    a model that reads both ways; and `special_tokens`. The same texts give the same one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*([PAD, CLS, SEP, MASK] if marks_text else [END_OF_TEXT]), *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if marks_text:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}",
            pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
            special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in (CLS, SEP)],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            cls_token=CLS,
            sep_token=SEP,
            mask_token=MASK,
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
