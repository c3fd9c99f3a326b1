"""The reference of `scripts/bench_overhead`: a training script without mpt, as one would write it for the same run.

Same model, tokenizer, data, schedule and precision as the quickstart recipe; nothing is watched, audited or saved.
"""

import argparse
import pydoc_data.topics

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--output", required=True)
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
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": torch.tensor(block), "labels": torch.tensor(block)} for block in blocks],
)
trainer.train()
