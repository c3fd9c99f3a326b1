"""The reference of `scripts/bench_overhead` and `bench_health`: a script for that run as one would write it by itself.

Same model, tokenizer, data, schedule and precision as the quickstart recipe; nothing is watched or audited. With
`--save-steps` it saves, goes on from its last checkpoint, and writes a line for each step.
"""

import argparse
import json
import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--save-steps", type=int)
options = parser.parse_args()

documents = list(pydoc_data.topics.topics.values())
tokenizer = ByteLevelBPETokenizer()
tokenizer.train_from_iterator(documents, vocab_size=2048, special_tokens=["<|endoftext|>"], show_progress=False)
tokens = [token for encoding in tokenizer.encode_batch(documents) for token in [*encoding.ids, 0]]
length = 256
blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]

set_seed(42)
config = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
trainer = Trainer(
    model=LlamaForCausalLM(config),
    args=TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        weight_decay=0.1,
        bf16=options.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": torch.tensor(block), "labels": torch.tensor(block)} for block in blocks],
)
if options.save_steps:
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)

    class Told(TrainerCallback):
        """Writes down that a step was made, and by which process."""

        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            with folder.joinpath("steps.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": state.global_step, "pid": os.getpid()}) + "\n")

    trainer.add_callback(Told())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output))
else:
    trainer.train()
