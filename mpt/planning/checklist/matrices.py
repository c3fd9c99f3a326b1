"""Points about the multiplications of a step: how large, of which sizes, and for nothing. Pure."""

from collections.abc import Iterator
from typing import Any

from mpt.planning.batching import LARGEST_MICRO_BATCH
from mpt.planning.checklist.point import Case, Verdict, not_applicable, ticked, to_gain
from mpt.planning.model_shapes import FAMILIES
from mpt.planning.plan import Plan
from mpt.planning.sharding import TOKENS_ENOUGH
from mpt.planning.speed import attention_share, has_tensor_cores, tokens_to_be_busy
from mpt.terms import FP8_MODES, Attention, Feature, Precision, Strategy, Task

NEGLIGIBLE_SHARE = 0.05
# Shah et al. 2024 (arXiv:2407.08608): Flash Attention 3 is 1.5 to 2.0 times as fast as 2 on an H100.
FASTER_BY_FA3 = 2.0


def batch(case: Case) -> Verdict:
    """Whether a pass holds enough tokens, and whether fewer and larger passes would fit."""
    plan = case.plan
    micro, accumulated = plan.value("micro_batch_size"), plan.value("gradient_accumulation_steps")
    tokens = micro * plan.value("sequence_length")
    said = f"{micro} samples a pass, {tokens} tokens"
    if not has_tensor_cores(plan.machine):
        return not_applicable(f"{said}: {plan.machine.label} has no tensor cores to keep busy")
    busy = tokens_to_be_busy(plan.machine, Precision(plan.value("precision")))
    if busy is not None:
        said += f" ({tokens / busy:.0f} times what keeps it computing rather than reading weights)"
    larger = _larger(case, micro, accumulated)
    if accumulated > 1 and larger is not None:
        size, other = larger
        return to_gain(
            f"{said}, {accumulated} passes a step, and {size} samples would fit",
            _batch_keys(plan, other),
            memory_gib=case.freed_gib(other),
            gain=f"{other.value('gradient_accumulation_steps')} passes a step in place of {accumulated}, the same "
            "global batch: weights are read and kernels launched less often",
        )
    if tokens >= TOKENS_ENOUGH or (larger is not None and accumulated > 1):
        return ticked(said)
    wider = _wider(case, micro)
    if wider is not None:
        size, other = wider
        return to_gain(
            f"{said}, below {TOKENS_ENOUGH}: the matrix units idle, and memory is left",
            _batch_keys(plan, other),
            memory_gib=case.freed_gib(other),
            gain=f"{size} samples a pass; a larger global batch wants another learning rate and fewer steps",
        )
    return ticked(f"{said}: the largest that fits; what frees memory makes room for more")


def dimensions(case: Case) -> Verdict:
    """Whether every side of the multiplications is a multiple of 16 bytes.

    NVIDIA, Matrix Multiplication Background, section 4.1: from cuBLAS 11 on any size uses the tensor cores, and they
    are fastest at multiples of 16 bytes: 8 numbers of 16 bits, 16 of 8, 4 of TF32.
    """
    plan = case.plan
    mode = Precision(plan.value("precision"))
    if not has_tensor_cores(plan.machine) or not plan.machine.all_compute(Feature.FP16_TENSOR_CORES):
        return not_applicable(f"{plan.machine.label} has no tensor cores")
    if mode is Precision.FP32:
        return not_applicable("fp32 does not use them")
    multiple = multiple_for(mode)
    odd = dict(odd_sizes(plan, multiple))
    if not odd:
        return ticked(f"hidden, inner, head and vocabulary sizes and the length are multiples of {multiple}")
    said = ", ".join(f"{name} {size}" for name, size in odd.items())
    keys = mending_keys(plan, odd, multiple)
    if not keys:
        return not_applicable(f"{said}: no multiple of {multiple}, and a checkpoint's sizes are what they are")
    return to_gain(
        f"{said}: no multiple of {multiple}",
        keys,
        gain="kernels for aligned matrices; how much that is, depends on the library and is not known here",
    )


def multiple_for(mode: Precision) -> int:
    """Numbers in 16 bytes."""
    return 16 if mode in FP8_MODES else 4 if mode is Precision.TF32 else 8


def odd_sizes(plan: Plan, multiple: int) -> Iterator[tuple[str, int]]:
    """Name the sizes of matrices that are no multiple."""
    facts = plan.facts
    sizes = {name: getattr(facts, name) for name in ("hidden_size", "intermediate_size", "head_dim")}
    if plan.value("task") != Task.SEQUENCE_CLASSIFICATION:
        sizes["vocab_size"] = facts.vocab_size
    sizes["sequence_length"] = plan.value("sequence_length")
    return ((name, size) for name, size in sizes.items() if size % multiple)


def mending_keys(plan: Plan, odd: dict[str, int], multiple: int) -> dict[str, Any]:
    """Say which keys of the recipe make the odd sizes multiples; a checkpoint's own can't be changed."""
    keys: dict[str, Any] = {}
    config = plan.recipe.model.config
    family = FAMILIES.get(plan.facts.model_type)
    for name, size in odd.items():
        if name == "sequence_length":
            keys["data.sequence_length"] = size // multiple * multiple or multiple
        elif config is not None and name != "head_dim":
            own = family.names.get(name, name) if family is not None else name
            keys[f"model.config.{own}"] = -(-size // multiple) * multiple
    return keys


def attention(case: Case) -> Verdict:
    """Whether a fused kernel computes attention, and the newest that the device has."""
    plan = case.plan
    kernel, decision = plan.value("attention"), plan.values["attention"]
    share = attention_share(plan)
    said = f"{kernel}: {decision.reason} ({share:.0%} of the operations at this length)"
    if kernel == Attention.EAGER:
        other = case.with_only({"attention": "auto"})
        if other is None or other.value("attention") == Attention.EAGER:
            return not_applicable(said)
        return to_gain(
            f"eager holds every score in memory, {plan.value('sequence_length')} a token and head",
            {"attention": other.value("attention")},
            memory_gib=case.freed_gib(other),
            gain="scores that are never written to memory (Dao et al. 2022)",
        )
    missing = next(
        (o for o in decision.rejected if o.value == Attention.FLASH_ATTENTION_3 and "install" in o.reason), None
    )
    if kernel != Attention.SDPA or missing is None or share < NEGLIGIBLE_SHARE:
        return ticked(said)
    return to_gain(
        said,
        {"attention": Attention.FLASH_ATTENTION_3.value},
        memory_gib=0.0,
        speed=1 / (1 - share + share / FASTER_BY_FA3),
        gain=f"1.5 to 2 times as fast as Flash Attention 2 on these (Shah et al. 2024); {missing.reason}",
    )


def packing(case: Case) -> Verdict:
    """Whether positions are spent on padding."""
    plan = case.plan
    decision = plan.values["packing"]
    if decision.value not in (False, "none"):
        return ticked(decision.reason)
    if plan.recipe.training_keys.get("train_sampling_strategy") == "group_by_length":
        return ticked("samples of like length go into a batch")
    if plan.value("task") in (Task.CAUSAL_LM, Task.SFT):
        for value in ("best_fit", True):
            other = case.with_only({"data.packing": value})
            if other is not None:
                return to_gain(
                    "every sample is padded to the longest of its batch",
                    {"data.packing": value},
                    memory_gib=case.freed_gib(other),
                    gain="as many times the tokens a second as positions are padding: `mpt check` counts them",
                )
    return to_gain(
        "every sample is padded to the longest of its batch",
        {"training.train_sampling_strategy": "group_by_length"},
        memory_gib=0.0,
        gain="less padding where lengths differ: `mpt check` counts it",
    )


def compiling(case: Case) -> Verdict:
    """Whether the compiler fuses what stands between the multiplications."""
    plan, decision = case.plan, case.plan.values["compile"]
    if decision.value:
        return ticked(decision.reason)
    if plan.value("distributed.strategy") == Strategy.ZERO3:
        return not_applicable("ZeRO-3 gathers weights in hooks, which break the compiler's graphs at every layer")
    blocks_alone = plan.value("distributed.strategy") in (Strategy.SINGLE, Strategy.DDP)
    asked = "torch_compile" in plan.recipe.training_keys
    key, value = ("training.torch_compile", True) if asked else ("compile", "regional" if blocks_alone else True)
    lengths = "" if plan.value("packing") not in (False, "none") else "; batches of many lengths are compiled anew"
    return to_gain(
        "eager: each operation between the multiplications is a kernel of its own, from memory to memory",
        {key: value},
        gain="1.41 times as fast on average over 180 models on an A100 (Ansel et al. 2024), here unknown; the first "
        f"step takes minutes{lengths}",
    )


def _batch_keys(plan: Plan, other: Plan) -> dict[str, Any]:
    """Write another plan's batch under the keys that the recipe gives; the micro batch where it gives none."""
    recipe, keys = plan.recipe, {}
    for key, own, theirs in (
        ("global_batch_size", recipe.global_batch_size, "global_batch_size"),
        ("micro_batch_size", recipe.micro_batch_size, "per_device_train_batch_size"),
        ("gradient_accumulation_steps", recipe.gradient_accumulation_steps, "gradient_accumulation_steps"),
    ):
        if plan.value(key) == other.value(key):
            continue
        if theirs in recipe.training_keys:
            keys[f"training.{theirs}"] = other.value(key)
        elif own is not None:
            keys[key] = other.value(key)
    return keys or {"micro_batch_size": other.value("micro_batch_size")}


def _larger(case: Case, micro: int, accumulated: int) -> tuple[int, Plan] | None:
    """Find the largest micro batch above the planned one that divides a rank's samples and fits."""
    share = micro * accumulated
    for size in range(min(share, LARGEST_MICRO_BATCH), micro, -1):
        if share % size == 0:
            other = case.with_only({"micro_batch_size": size})
            if other is not None and other.memory.fits:
                return size, other
    return None


def _wider(case: Case, micro: int) -> tuple[int, Plan] | None:
    """Find the largest power of two above the micro batch that fits, with as much larger a global batch."""
    plan = case.plan
    size = 1 << (LARGEST_MICRO_BATCH.bit_length() - 1)
    enough = -(-TOKENS_ENOUGH // plan.value("sequence_length"))
    while size // 2 >= enough:
        size //= 2
    while size > micro:
        total = size * plan.value("world_size") * plan.value("gradient_accumulation_steps")
        other = case.with_only({"micro_batch_size": size, "global_batch_size": total})
        if other is not None and other.memory.fits:
            return size, other
        size //= 2
    return None
