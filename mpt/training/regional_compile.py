"""Compile the repeated blocks of a model, each where it stands: no other module, no other name in a checkpoint.

The blocks are of one class and share one compilation, where a whole model is compiled layer after layer. Gradient
checkpointing goes around a compiled block, and peft's adapters lie within it.
"""

from typing import Any

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """List the blocks of the outermost stacks: lists of at least two modules of one class.

    >>> [len(list(block.parameters())) for block in repeated_blocks(nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))]
    [2, 2, 2]
    """
    if isinstance(model, nn.ModuleList) and len(model) > 1 and len({type(block) for block in model}) == 1:
        return list(model)
    return [block for child in model.children() for block in repeated_blocks(child)]


def compile_blocks(model: nn.Module, *, varies: bool, **options: Any) -> int:
    """Compile them at their first use; give their number. `varies`: batches differ in length from step to step.

    `options` are torch.compile's.
    """
    blocks = repeated_blocks(model)
    for block in blocks:
        block.compile(dynamic=True if varies else None, **options)
    return len(blocks)
