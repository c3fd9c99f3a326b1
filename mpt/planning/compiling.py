"""Choose what torch.compile compiles: nothing, the whole model, or each of its repeated blocks. Pure."""

from typing import Any, Literal

from mpt.errors import MptError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.planning.float8 import compiles
from mpt.planning.model_facts import ModelFacts
from mpt.recipe.schema import Recipe
from mpt.terms import Strategy

Compile = bool | Literal["regional"]
"""True: the whole model, by the Trainer."""

COMPILE_KEY = "torch_compile"
COMPILE_OPTIONS = ("torch_compile_backend", "torch_compile_mode")  # either turns the Trainer's on (TrainingArguments)
COMPILER = "c++"
# Half an hour on a CPU that multiplies 10**11 numbers a second and core, as an EPYC's does in bf16 (68 to 100 GFLOP/s
# measured on matrices of 4096 x 256 x 688): what is compiled for a minute then pays.
LONG_RUN_S = 1800.0
FLOPS_A_CORE = 1e11


def choose_compile(
    recipe: Recipe,
    fp8: dict[str, Any] | None,
    strategy: Strategy,
    machine: Machine | None = None,
    facts: ModelFacts | None = None,
    *,
    tokens_a_step: int = 0,
    is_plain: bool = False,
    packages: frozenset[str] | None = None,
) -> Decision[Compile]:
    """Decide on torch.compile. By default for native fp8, and by blocks for a long training on a CPU.

    `is_plain`: every weight is trained, in one precision. `packages` hold `c++` where a compiler is. Raises MptError
    where it was asked for and the fp8 recipe, or the engine, refuses it.
    """
    keys = recipe.training_keys
    given = [key for key in (COMPILE_KEY, *COMPILE_OPTIONS) if keys.get(key) is not None]
    if recipe.compile != "auto" or given:
        return _asked(recipe, given, fp8, strategy)
    if fp8 is not None and not fp8["emulated"]:
        does, reason = compiles(fp8["backend"], fp8["recipe"])
        if does and strategy is Strategy.ZERO3:
            does, reason = False, "ZeRO-3 gathers weights in hooks, which break the compiler's graphs at every layer"
        asks = f"`compile: {str(not does).lower()}` asks for it"
        return Decision(does, Origin.AUTO, reason, (Rejected(not does, asks),))
    against = _against_blocks(recipe, machine, facts, strategy, tokens_a_step, is_plain, packages)
    if against is not None:
        return Decision(False, Origin.AUTO, f"{against}; `compile: regional` asks for it")
    reason = "fused operations between the multiplications save a fifth of a step or more, for a minute at the start"
    return Decision("regional", Origin.AUTO, reason, (Rejected(True, "takes several times as long to compile"),))


def _asked(recipe: Recipe, given: list[str], fp8: dict[str, Any] | None, strategy: Strategy) -> Decision[Compile]:
    does: Compile
    if recipe.compile != "auto":
        does, key = recipe.compile, "compile"
    else:
        does = bool(recipe.training_keys.get(COMPILE_KEY)) or given != [COMPILE_KEY]
        key = f"training.{given[0] if does else COMPILE_KEY}"
    if does and fp8 is not None and fp8["recipe"] == "delayed":
        raise MptError(
            f"{key} asks for torch.compile, which Transformer Engine's delayed scaling refuses",
            remedy=f"Remove {key}, or ask for precision.fp8.recipe tensorwise.",
        )
    if does == "regional" and strategy not in (Strategy.SINGLE, Strategy.DDP):
        raise MptError(
            f"compile: regional compiles blocks where they stand, and {strategy} works on them in hooks",
            remedy="Ask for `compile: true`, or leave it out.",
        )
    return Decision(does, Origin.ASKED, f"the recipe's {key}")


def _against_blocks(
    recipe: Recipe,
    machine: Machine | None,
    facts: ModelFacts | None,
    strategy: Strategy,
    tokens_a_step: int,
    is_plain: bool,
    packages: frozenset[str] | None,
) -> str | None:
    """Say why blocks are not compiled unasked."""
    if machine is None or facts is None or not machine.is_cpu:
        return "only native fp8 needs it"
    if not is_plain:
        return "layers of several precisions, or adapters, are compiled only when asked"
    if strategy not in (Strategy.SINGLE, Strategy.DDP):
        return f"{strategy} works on the blocks in hooks"
    if packages is None or COMPILER not in packages:
        return "no C++ compiler is known here, without which torch compiles nothing for a CPU"
    steps = recipe.training_keys.get("max_steps", -1)
    if steps <= 0:
        return "nobody knows yet how many steps there are"
    seconds = 6.0 * facts.parameters * tokens_a_step * steps / (FLOPS_A_CORE * (machine.cpu_cores or 1))
    if seconds < LONG_RUN_S:
        return f"about {seconds / 60:.1f} min of computing, and compiling takes one"
    return None
