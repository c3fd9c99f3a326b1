"""Build the Trainer's arguments from the plan, and set up what they ask of the process: DeepSpeed's group, TF32."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments
from transformers.utils.import_utils import enable_tf32

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.running.run_directory import RunDirectory
from mpt.terms import DeviceKind, Feature


@contextmanager
def refused_keys() -> Iterator[None]:
    """Turn what transformers says of the recipe's `training:` keys into an MptError: trying again would not help."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise MptError(
            f"training: transformers refuses these keys: {' '.join(str(error).split())[:500]}",
            remedy="Mend the keys of the recipe's `training:` block that the message names.",
        ) from error


def build_arguments(plan: Plan, run: RunDirectory) -> TrainingArguments:
    """Build TrainingArguments from the plan's keywords. Raises MptError for a value that transformers refuses."""
    keywords = dict(plan.training_arguments)
    keywords["output_dir"] = str(run.checkpoints)
    if plan.deepspeed is not None:
        keywords["deepspeed"] = json.loads(json.dumps(dict(plan.deepspeed)))
        _stand_alone_rendezvous()
    if "tensorboard" in str(keywords.get("report_to", "")):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    with refused_keys():
        arguments = TrainingArguments(**keywords)
    if plan.deepspeed is not None:
        _join_deepspeed()
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one device: the Trainer would wrap the model in DataParallel
    if plan.machine.kind is DeviceKind.CUDA and plan.machine.all_compute(Feature.TF32):
        enable_tf32(plan.value("tf32"))
    return arguments


def _stand_alone_rendezvous() -> None:
    """Give a single process the rendezvous that DeepSpeed wants; without it DeepSpeed asks for mpi4py."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)


def _join_deepspeed() -> None:
    """Let DeepSpeed know the process group before it divides a model; on a CPU transformers leaves that out."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
