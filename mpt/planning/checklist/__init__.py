"""The optimisation checklist on a recipe and a machine: what is done, what is not for this case, what there is to gain.
Pure. `mpt doctor RECIPE` prints it.

A rule looks at the plan, and asks for other plans of the same recipe where it must know what a change would give. To
add one: a function from `Case` to `Verdict`, and a row in `POINTS`.
"""

from collections.abc import Callable

from mpt.planning.checklist import matrices, numbers, space, upkeep
from mpt.planning.checklist.point import Case, Point, Verdict

Rule = Callable[[Case], Verdict]

# Code, title, rule: in the order of print.
POINTS: tuple[tuple[str, str, Rule], ...] = (
    ("sixteen_bit", "Matrices multiply in 16 bits on tensor cores", numbers.sixteen_bit),
    ("tf32", "What stays fp32 multiplies in TF32", numbers.tf32),
    ("fp8", "fp8 where the card has it and the matrices are large", numbers.fp8),
    ("loss_scale", "fp16 has a loss scale that moves", numbers.loss_scale),
    ("master_weights", "Small updates are not rounded away", numbers.master_weights),
    ("batch", "A pass is large enough for the matrix units", matrices.batch),
    ("dimensions", "Dimensions are multiples of 8 (fp8: 16)", matrices.dimensions),
    ("attention", "A fused attention kernel", matrices.attention),
    ("packing", "No compute for padding", matrices.packing),
    ("compile", "torch.compile", matrices.compiling),
    ("loss", "The logits never stand whole in fp32", space.logits),
    ("gradient_checkpointing", "Gradient checkpointing where it is needed", space.gradient_checkpointing),
    ("fused_optimizer", "A fused optimizer", space.fused_optimizer),
    ("optimizer_states", "Optimizer states as small as they must be", space.optimizer_states),
    ("sharding", "No more divided over devices than must be", space.sharding),
    ("offload", "Nothing waits for the bus that need not", space.offload),
    ("communication", "Gradients travel in as few bytes as the links bear", upkeep.communication),
    ("loader", "The loader keeps ahead of the device", upkeep.loader),
    ("evaluation", "The model is evaluated on text that it does not learn", upkeep.evaluation),
    ("saving", "A crash costs little, and saving too", upkeep.saving),
    ("health", "The loss is watched", upkeep.health),
)


def check_list(case: Case) -> tuple[Point, ...]:
    """Apply every rule."""
    return tuple(Point(code, title, **rule(case).parts()) for code, title, rule in POINTS)
