"""Many training programs, each forked from one process that made the imports: they cost more than a tiny run does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tests.training.tiny_runs import LLAMA

# A prelude defines `run(name)`, which carries one program out; `sys.argv` is the program's own.
MPT_WORKER = """
import sys
from mpt.training.worker import main, quiet_libraries
quiet_libraries()
def run(name):
    sys.exit(main(sys.argv[1:]))
"""
# Processes that train together find one another as torchrun has them do. Each program's output goes to its log.
FORKS = """
import json, os, socket, sys
import datasets, deepspeed, numpy, peft, tokenizers, torch, torchao
from transformers import AutoModelForCausalLM, Trainer
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

def start(program, rank, world_size, port):
    child = os.fork()
    if child:
        return child
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(program["log"], "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = program["argv"]
    run(sys.argv[0])
    sys.exit()

for program in json.loads(sys.argv[1]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [start(program, rank, program["processes"], port) for rank in range(program["processes"])]
    ended = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    if ended != {program.get("ends", 0)}:
        sys.exit(f"{program['argv']} ended with {ended}: {open(program['log']).read()[-6000:]}")
"""


def carry_out(prelude: str, programs: list[dict[str, Any]], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Carry the programs out one after another.

    Each has `argv`, `processes` (how many train together), `log`, and `ends`: its exit status, 0 unless told.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", f"{prelude}{FORKS}", json.dumps(programs)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def save_base(folder: Path) -> str:
    """Save a tiny Llama, as its seed draws it, to put adapters on."""
    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

    from mpt.training.tokenizer import train_tokenizer

    set_seed(42)
    config = LlamaConfig(vocab_size=512, **{key: value for key, value in LLAMA.items() if key != "model_type"})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer((topics[name] for name in sorted(topics)), 512).save_pretrained(folder)
    return str(folder)
