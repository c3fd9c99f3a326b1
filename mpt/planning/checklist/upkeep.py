"""Points about what goes on around the steps: communication, loading, evaluating, saving, watching. Pure."""

from mpt.planning.checklist.point import Case, Verdict, not_applicable, ticked, to_gain
from mpt.planning.plan import Plan
from mpt.planning.speed import matmul_seconds
from mpt.recipe.training_keys import training_arguments
from mpt.terms import Method, Strategy

# A PCIe 4.0 x16 link carries 32 GB/s each way at the most, and about 25 in practice: the slowest link that GPUs of one
# node have; between nodes it is a network of 100 to 400 Gbit/s a node that all of a node's devices share.
PCIE_GB_S = 25.0
SMALL_GB = 0.25
LONG_RUN_STEPS = 1000
FREQUENT_STEPS = 20


def communication(case: Case) -> Verdict:
    """Whether the gradients' way over the links can hide behind the backward pass."""
    plan = case.plan
    world, dtype = plan.value("world_size"), plan.value("reduce_dtype")
    if world == 1:
        return not_applicable("one process: nothing is summed over ranks")
    trained = plan.facts.parameters if plan.value("method") == Method.FULL else None
    if plan.machine.is_cpu:
        return not_applicable("processes of one machine sum in its memory")
    if dtype != "fp32":
        return ticked(f"{dtype}: {plan.values['reduce_dtype'].reason}")
    if trained is None:
        return ticked("adapters are few: their gradients are soon summed")
    # A ring sends and receives 2 (n - 1) / n times what it sums (Patarasuk and Yuan 2009).
    sent = 2 * (world - 1) / world * trained * 4 / 1e9
    if sent < SMALL_GB:
        return ticked(f"fp32 gradients: {sent * 1000:.0f} MB a device and step are soon summed")
    computing = matmul_seconds(plan)
    said = f"fp32 gradients: {sent:.1f} GB a device and step"
    if computing is not None and sent / computing < PCIE_GB_S and plan.machine.nodes == 1:
        return ticked(f"{said}, hidden behind the computing by a link of {sent / computing:.0f} GB/s")
    if computing is not None:
        said += f", which hide behind the computing only on links above {sent / computing:.0f} GB/s"
    keys = {"precision.reduce_dtype": "bf16"}
    other = case.with_only(keys)
    if other is None or plan.value("precision") == "fp32":
        return ticked(f"{said}; fp32 is what the precision asks for")
    return to_gain(
        said,
        keys,
        memory_gib=case.freed_gib(other),
        gain=f"{sent / 2:.1f} GB less on the links, whose rates nobody knows here; sums over {world} ranks keep 8 bits",
    )


def loader(case: Case) -> Verdict:
    """Whether batches are made beside the training, and copied from pinned memory."""
    plan = case.plan
    keys, known = plan.recipe.training_keys, training_arguments()
    workers = keys.get("dataloader_num_workers", plan.training_arguments.get("dataloader_num_workers", 0))
    pins = keys.get("dataloader_pin_memory", known["dataloader_pin_memory"]["default"])
    if plan.machine.is_cpu:
        return not_applicable("the CPU that would load ahead is the one that trains; nothing is copied to a device")
    if not pins:
        return to_gain(
            "dataloader_pin_memory is false: each copy to the device waits",
            {"training.dataloader_pin_memory": True},
            gain="copies beside the computing; small, as a batch of tokens is",
        )
    if workers:
        return ticked(f"{workers} loader processes a rank, pinned memory")
    if plan.recipe.data.streaming:
        return to_gain(
            "a stream is read and tokenised between the steps",
            {"training.dataloader_num_workers": 2},
            gain="reading and tokenising beside the training; how much that is, depends on the text and the disk",
        )
    return ticked("samples are tokenised before the run and read from a memory-mapped table: microseconds a batch")


def evaluation(case: Case) -> Verdict:
    """Whether over-fitting would be seen, at what price."""
    plan = case.plan
    keys, data = plan.recipe.training_keys, plan.recipe.data
    strategy = keys.get("eval_strategy", "no")
    if data.eval_source is None and data.eval_split is None and data.eval_fraction == 0:
        return to_gain(
            "data.eval_fraction is 0: nothing is held out",
            {"data.eval_fraction": 0.05, "training.eval_strategy": "epoch"},
            gain="one sees when the model begins to learn the text by heart",
        )
    if strategy == "no":
        return to_gain(
            "the held-out text is looked at once, at the end",
            {"training.eval_strategy": "epoch"} if plan.value("max_steps") is None else _eval_steps(plan),
            gain="one sees when the model begins to learn the text by heart",
        )
    every = _every(plan, "eval_steps")
    if strategy == "steps" and every is not None and every < FREQUENT_STEPS:
        return to_gain(
            f"the whole held-out text every {every:g} steps",
            {"training.eval_steps": _tenth(plan)},
            gain="an evaluation costs a third of the training steps that see as much text",
        )
    return ticked(f"by {strategy}" + (f", every {every:g}" if strategy == "steps" and every is not None else ""))


def saving(case: Case) -> Verdict:
    """Whether a crash loses much, and whether saving stops the training."""
    plan = case.plan
    keys = plan.recipe.training_keys
    strategy = keys.get("save_strategy", "steps")
    steps, every = plan.value("max_steps"), _every(plan, "save_steps")
    if strategy == "no":
        return to_gain(
            "save_strategy is no: a crash loses everything",
            {"training.save_strategy": "steps", "training.save_steps": _tenth(plan)},
            gain="a restart goes on from the last checkpoint",
        )
    if strategy == "steps" and steps is not None and every is not None and every >= steps > FREQUENT_STEPS:
        return to_gain(
            f"the first checkpoint would come at step {every:g}, and the run ends at {steps}",
            {"training.save_steps": _tenth(plan)},
            gain="a restart goes on from the last checkpoint",
        )
    if (
        strategy == "steps"
        and every is not None
        and 1 <= every < FREQUENT_STEPS
        and (steps or LONG_RUN_STEPS) > 10 * every
    ):
        where = "in the background" if plan.value("background_saving") else "while the training waits"
        return to_gain(
            f"a checkpoint every {every:g} steps, written {where}",
            {"training.save_steps": _tenth(plan)},
            gain=f"{_checkpoint_gib(plan):.1f} GiB are written less often",
        )
    beside = plan.values["background_saving"]
    how = "in the background" if beside.value else f"while the training waits ({beside.reason})"
    return ticked(f"by {strategy}" + (f", every {every:g}" if strategy == "steps" and every else "") + f", {how}")


def health(case: Case) -> Verdict:
    """Whether losses that are finite and bad are seen."""
    section = case.plan.recipe.health
    if not section.spikes:
        return to_gain(
            "health.spikes is false: only what is not finite is seen",
            {"health.spikes": True},
            memory_gib=0.0,
            gain="a loss that runs away ends the attempt before it spoils a checkpoint",
        )
    return ticked("every step's loss and gradient norm are judged before the update")


def _every(plan: Plan, key: str) -> float | None:
    """Steps between two evaluations or saves; a share of all steps is turned into steps where these are known."""
    keys, known = plan.recipe.training_keys, training_arguments()
    every = keys.get(key, known[key]["default"])
    if every is None:
        every = keys.get("logging_steps", known["logging_steps"]["default"])
    steps = plan.value("max_steps")
    if every < 1:
        return None if steps is None else max(1.0, every * steps)
    return float(every)


def _eval_steps(plan: Plan) -> dict[str, object]:
    return {"training.eval_strategy": "steps", "training.eval_steps": _tenth(plan)}


def _tenth(plan: Plan) -> float | int:
    """A tenth of a run in the words of `save_steps`: steps where their number is known, else a share."""
    steps = plan.value("max_steps")
    return 0.1 if steps is None else max(1, steps // 10)


def _checkpoint_gib(plan: Plan) -> float:
    """Weights and optimizer states of all ranks."""
    parts, world = plan.memory.parts_gib, plan.value("world_size")
    states = parts.get("optimizer", 0.0) * (world if Strategy(plan.value("distributed.strategy")).zero_stage else 1)
    return parts.get("weights", 0.0) + states
