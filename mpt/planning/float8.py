"""Choose what is computed in fp8: the layers, and the library that does it. Pure; `mpt.planning.plan` asks.

fp8 halves the bytes and doubles the peak of a matrix multiplication, and pays for it by measuring and rounding both
factors first: large layers gain, small ones lose. What the kernels can't take and what is known to need more precision
stays in bf16.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from mpt.errors import MptError, UnsupportedError
from mpt.planning.modules import MATMULS, matches, near_patterns

TORCHAO_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")  # torchao 0.18, Float8LinearRecipeName
# transformer_engine.common.recipe, by our names. Float8BlockScaling and NVFP4BlockScaling are not offered.
TE_RECIPES = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling", "mxfp8": "MXFP8BlockScaling"}
RECIPES = {"torchao": TORCHAO_RECIPES, "transformer_engine": tuple(TE_RECIPES)}

TORCHAO_INSTALL = "pip install 'mpt[fp8]'"
TE_INSTALL = 'pip install --no-build-isolation "transformer_engine[pytorch]"'

# A mixture's router: it picks the experts by comparing its few outputs, where a rounding changes the choice.
ROUTERS = frozenset({"gate", "router"})
FUSED_EXPERTS = "fused experts: fp8 takes torch.nn.Linear alone"
# Why fp8 does not take a multiplication that is no torch.nn.Linear. A subclass may never call its own forward pass.
OTHERS = {"conv1d": "a Conv1D, which holds its weight transposed", "linear subclass": "a subclass of torch.nn.Linear"}


class MatmulModule(Protocol):
    """What must be known of a module; `mpt.planning.modules.ModuleShape` is one."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def is_head(self) -> bool: ...


def choose_float8_layers(
    modules: Sequence[MatmulModule],
    *,
    recipe: str,
    keep_patterns: Sequence[str] = (),
    keep_first: int = 1,
    keep_last: int = 1,
    auto_filter: bool = False,
) -> dict[str, tuple[bool, str]]:
    """Say of every matrix multiplication of a model whether it is fp8, and why. `modules` come in the model's order.

    `keep_first` and `keep_last` count linear layers of the blocks, in that order; the output head is none of them and
    is kept anyway. So 1 and 1 keep the first block's first and the last block's last layer, as accelerate does, and
    the last four blocks of a Llama are `keep_last: 28`, or the pattern `model.layers.2[89].*` and its like.

    Raises MptError for a pattern that matches no linear layer, and for `auto_filter` with a recipe that nobody has
    published a rule for.
    """
    linear = [module for module in modules if module.kind == "linear"]
    for pattern in keep_patterns:
        if not any(matches(module.name, pattern) for module in linear):
            near = near_patterns(pattern, [module.name for module in linear])
            raise MptError(
                f"precision.fp8.keep_high_precision: {pattern} matches no linear layer of the model"
                + (f"; did you mean {' or '.join(near)}?" if near else ""),
                remedy="A pattern means a module by its whole name, such as model.layers.0.mlp.down_proj or *.mlp.",
            )
    if auto_filter and recipe not in _PAYS:
        raise MptError(
            f"precision.fp8.auto_filter: there is no published rule for the recipe {recipe}",
            remedy=f"Remove auto_filter, or ask for one of {', '.join(_PAYS)}.",
        )
    in_blocks = [module.name for module in linear if _is_in_block(module.name) and not module.is_head]
    first = frozenset(in_blocks[:keep_first])
    last = frozenset(in_blocks[-keep_last:] if keep_last else ())

    def reason_to_keep(module: MatmulModule) -> str | None:
        if module.kind != "linear":
            return f"{OTHERS[module.kind]}: fp8 takes torch.nn.Linear alone"
        if module.is_head:
            return "the output head: its rounding errors go into the loss directly"
        for pattern in keep_patterns:
            if matches(module.name, pattern):
                return f"kept by {pattern} (precision.fp8.keep_high_precision)"
        if module.name.rpartition(".")[2] in ROUTERS:
            return "a router: a rounding changes which experts are chosen"
        multiple, kernels = (32, "mxfp8 blocks") if recipe == "mxfp8" else (16, "fp8 kernels")
        for letter, size in (("K", module.in_features), ("N", module.out_features)):
            if size % multiple:
                return f"{letter}={size} is no multiple of {multiple}, which the {kernels} need"
        if module.name in first:
            return f"among the first {keep_first} linear layers (precision.fp8.keep_first)"
        if module.name in last:
            return f"among the last {keep_last} linear layers (precision.fp8.keep_last)"
        if auto_filter and not pays(recipe, module.in_features, module.out_features):
            return f"K={module.in_features}, N={module.out_features} is too small to gain from {recipe} (auto_filter)"
        return None

    chosen = {}
    for module in modules:
        if module.kind in MATMULS:
            reason = reason_to_keep(module)
            chosen[module.name] = (reason is None, reason or f"K={module.in_features}, N={module.out_features}")
    return chosen


def check_some_converted(chosen: Mapping[str, tuple[bool, str]]) -> None:
    """Raise MptError where fp8 was asked for and no layer of the model would be fp8."""
    if any(is_fp8 for is_fp8, _ in chosen.values()):
        return
    reasons = Counter(reason for _, reason in chosen.values())
    listed = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.most_common(3)) or "it has none"
    raise MptError(
        f"precision fp8 was asked for and not one linear layer of this model would be fp8 ({listed})",
        remedy="Set precision.fp8 keep_first, keep_last, keep_high_precision and auto_filter to keep less, or ask for "
        "bf16.",
    )


def pays(recipe: str, in_features: int, out_features: int) -> bool:
    """Whether a layer of that size is expected to be faster in fp8 than in bf16, under torch.compile.

    torchao's rule from its measurements on H100 (torchao 0.18, `_auto_filter_for_recipe`), whose other half, multiples
    of 16, stands in `choose_float8_layers`.

    >>> pays("tensorwise", 4096, 1024), pays("tensorwise", 4096, 1040)
    (False, True)
    >>> pays("rowwise", 4096, 2048), pays("rowwise", 2048, 4096), pays("rowwise", 2048, 14336)
    (False, False, True)
    """
    return _PAYS[recipe](in_features, out_features)


def _pays_tensorwise(k: int, n: int) -> bool:
    return k > 4096 or n > 1024


def _pays_rowwise(k: int, n: int) -> bool:
    return n > 2048 and k > 1024 and not (n <= 4096 and k <= 2048)


_PAYS = {"tensorwise": _pays_tensorwise, "rowwise": _pays_rowwise}


def to_te_recipe(recipe: str) -> str:
    """Translate a recipe's name into Transformer Engine's class. Raises MptError for one that it lacks.

    >>> to_te_recipe("tensorwise")
    'Float8CurrentScaling'
    """
    check_recipe("transformer_engine", recipe)
    return TE_RECIPES[recipe]


def check_recipe(backend: str, recipe: str) -> None:
    """Raise MptError for a recipe that a backend has no equivalent of."""
    if recipe in RECIPES[backend]:
        return
    others = [other for other, recipes in RECIPES.items() if recipe in recipes]
    remedy = f"{backend} has {', '.join(RECIPES[backend])}"
    remedy += f"; for {recipe} ask for precision.fp8.backend {others[0]}." if others else "."
    raise MptError(f"precision.fp8.recipe: {backend} has no {recipe}", remedy=remedy)


def check_backend(
    backend: str, recipe: str, *, is_cpu: bool, is_cuda: bool, emulated: bool, packages: frozenset[str] | None
) -> None:
    """Check that a backend can do a recipe here. `packages` None: nobody knows what will be installed there.

    Raises MptError for a recipe that the backend lacks, UnsupportedError where the device or the package is missing.
    """
    check_recipe(backend, recipe)
    if backend == "transformer_engine" and (is_cpu or emulated or not is_cuda):
        where = "on a CPU" if is_cpu else "emulated" if emulated else "without CUDA"
        raise UnsupportedError(
            f"precision.fp8.backend: transformer_engine can't compute fp8 {where}",
            remedy="Ask for backend torchao, which can be emulated (allow_emulation), or for bf16.",
        )
    if packages is not None and backend not in packages:
        install = TORCHAO_INSTALL if backend == "torchao" else TE_INSTALL
        raise UnsupportedError(f"precision fp8 needs {backend}, which is not installed", remedy=f"Run {install}")


def compiles(backend: str, recipe: str) -> tuple[bool, str]:
    """Whether training in this fp8 is to be compiled, and why."""
    if backend == "torchao":
        return True, "torchao's scaling is many small operations, slower than bf16 until torch.compile fuses them"
    if recipe == "delayed":
        return False, "Transformer Engine's delayed scaling refuses torch.compile"
    return False, "Transformer Engine brings fused kernels of its own, which torch.compile does not look into"


def recomputes(backend: str, recipe: str) -> tuple[bool, str]:
    """Whether activation checkpointing gives the same fp8 numbers twice, and why."""
    if backend == "torchao":
        return True, "torchao scales by what it sees, the same both times"
    if recipe == "delayed":
        return False, "torch's checkpointing would enter the recomputed maxima into the history a second time"
    return True, "the recomputation enters Transformer Engine's autocast again"


def _is_in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
