"""What `scripts/bench_throughput` runs beside mpt, as one would write it by itself: NAME FOLDER STEPS.

Imports nothing of mpt, and runs in the environment of the tool that it is about. The folder holds the tokenizer, the
model's configuration and the documents. Same blocks, seed, optimizer and precision as mpt's recipe.
"""

import json
import sys
from pathlib import Path
from typing import Any

LENGTH, BATCH = 512, 8


def arguments(folder: Path, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "bf16": True,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
    } | more


def blocks_of(folder: Path) -> list[list[int]]:
    """Tokenise, join, and cut into blocks, each with one token more for who shifts labels by himself."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = [json.loads(line)["text"] for line in folder.joinpath("documents.jsonl").open(encoding="utf-8")]
    tokens = [token for encoding in tokenizer.encode_batch(texts) for token in [*encoding.ids, end]]
    return [tokens[start : start + LENGTH + 1] for start in range(0, len(tokens) - LENGTH, LENGTH)]


def plain(folder: Path, steps: int, *, compiles: bool, attention: str = "sdpa") -> None:
    """Train by the Trainer of transformers: tokenise, join, cut into blocks."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed

    blocks = [block[:LENGTH] for block in blocks_of(folder)]
    set_seed(42)
    config = LlamaConfig(**json.loads(folder.joinpath("model.json").read_text()))
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config, attn_implementation=attention),
        args=TrainingArguments(**arguments(folder, steps, torch_compile=compiles)),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
    )
    trainer.train()


def trl(folder: Path, steps: int) -> None:
    """Train by TRL's SFTTrainer, whose wrapped packing makes the same blocks."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(42)
    config = LlamaConfig(**json.loads(folder.joinpath("model.json").read_text()))
    more = {"packing": True, "packing_strategy": "wrapped", "max_length": LENGTH, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(config, dtype=torch.float32),
        args=SFTConfig(**arguments(folder, steps, **more)),
        train_dataset=load_dataset("json", data_files=str(folder / "documents.jsonl"), split="train"),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
    )
    trainer.train()


def litgpt(folder: Path, steps: int) -> None:
    """Pretrain by LitGPT, which compiles the model; its reader of data is left out, its optimizer and schedule stay."""
    import torch
    from litgpt import Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.pretrain import setup

    class Blocks(DataModule):
        def connect(self, *given: Any, **named: Any) -> None: ...

        def train_dataloader(self) -> Any:
            rows = torch.tensor(blocks_of(folder))
            return torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True)

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    model = json.loads(folder.joinpath("model.json").read_text())
    config = Config(
        name="bench",
        block_size=LENGTH,
        vocab_size=model["vocab_size"],
        padded_vocab_size=model["vocab_size"],
        n_layer=model["num_hidden_layers"],
        n_head=model["num_attention_heads"],
        n_embd=model["hidden_size"],
        intermediate_size=model["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    often = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "max_seq_length": LENGTH, "max_norm": 1.0}
    sys.argv[1:] = ["bench"]  # which it reads again at the end, to write down how it was called
    setup(
        "bench",
        model_config=config,
        out_dir=folder / "lit",
        precision="bf16-mixed",
        data=Blocks(),
        train=TrainArgs(save_interval=10**6, log_interval=10, max_tokens=steps * BATCH * LENGTH, **often),
        eval=EvalArgs(interval=10**6, max_iters=1, initial_validation=False, final_validation=False),
        devices=1,
        logger_name="csv",
    )


def main() -> None:
    name, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if name in ("trl", "litgpt"):
        {"trl": trl, "litgpt": litgpt}[name](folder, steps)
    else:
        plain(folder, steps, compiles=name == "plain-compiled", attention="eager" if name == "plain-eager" else "sdpa")


if __name__ == "__main__":
    main()
