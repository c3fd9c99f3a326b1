"""Checkpoints and the final model on disk: written aside, made durable, renamed. What is half-written has another name.

Hugging Face writes checkpoints in place (and chooses the highest number however incomplete); here its own saving code
writes into a staging folder, and `mpt.running.checkpoints` commits.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mpt.errors import StorageError
from mpt.running.run_directory import NO_ROOM, make_durable

# What torch's and safetensors' writers say where the system call's own error is lost.
WRITERS_WORDS = (
    "unexpected pos",
    "PytorchStreamWriter",
    "No space left",
    "quota",
    "iostream",
    "write failed",
    "os error",
)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write into a StorageError that names the place; whatever else went wrong passes through."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_storage_error(error):
            raise StorageError(
                f"{path} can't be written: {' '.join(str(error).split())[:300]}",
                remedy="Free space there (or set training.save_total_limit lower) and start the same command again.",
            ) from error
        raise


def is_storage_error(error: BaseException) -> bool:
    """Whether an exception says that a disk is full, read-only or broken."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_ROOM
    return isinstance(error, (OSError, RuntimeError, SafetensorError)) and any(
        word in str(error) for word in WRITERS_WORDS
    )


def name_best_relatively(checkpoint: Path, best: str | None) -> None:
    """Write the best checkpoint into the Trainer's state by its folder's name: the run directory may be moved."""
    state_file = checkpoint / "trainer_state.json"
    state = json.loads(state_file.read_text(encoding="utf-8"))
    state["best_model_checkpoint"] = best
    state_file.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def clear_staging(checkpoints: Path) -> None:
    """Remove what a killed attempt left half-written."""
    for leftover in checkpoints.glob(".staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def save_final(
    folder: Path, write: Callable[[Path], None], tokenizer: Any, state_dict: dict[str, torch.Tensor] | None
) -> None:
    """Write model and tokenizer so that `from_pretrained` loads them; the folder appears, or is replaced, as a whole.

    `write` writes the model. `state_dict` is what an engine gave to write, None where it is the model's own.
    """
    staging, old = folder.with_name("final.staging"), folder.with_name(".trash-final")
    for leftover in (staging, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with storage_errors(folder):
        write(staging)
        tokenizer.save_pretrained(str(staging))
        if state_dict is not None and (staging / "config.json").exists():  # adapters have none
            _name_dtype(staging, state_dict)
        for path in sorted(staging.rglob("*")):
            make_durable(path)
        make_durable(staging)
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        make_durable(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def full_weights(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """Join ZeRO's fp32 master weights: what was really trained, not its 16-bit copy. Every rank takes part.

    The result is on the CPU, and empty on a rank that does not `keep` it. Under adapters the frozen weights are left
    out: they are those of the checkpoint.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, torch.Tensor] = {}
    has_adapters = any(not weight.requires_grad for weight in model.parameters())
    for name, weight in model.named_parameters():
        if has_adapters and not weight.requires_grad:
            continue
        whole = safe_get_full_fp32_param(weight)
        if keep:
            weights[name] = (weight if whole is None else whole).detach().cpu().clone()
    if keep and not has_adapters:
        weights |= {
            name: value.cpu() for name, value in model.state_dict().items() if name in dict(model.named_buffers())
        }
    return weights


def _name_dtype(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Let config.json name the dtype that the file holds, which the engine's module need not have had."""
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(next(iter(state_dict.values())).dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
