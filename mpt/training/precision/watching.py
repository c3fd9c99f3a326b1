"""See what a forward pass computes in, from the operators that torch runs: for the audit.

The dtypes of a Linear or an island are read where the operator gets its operands, below autocast and below whatever
replaced a `forward`; nothing is concluded from settings. Each watch looks at one forward pass and is gone.
Operators inside a compiled region can't be seen: do not install watches around `torch.compile`.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.float8_e4m3fnuz: "fp8",
    torch.float8_e5m2fnuz: "fp8",
    torch.float8_e8m0fnu: "mxfp8",  # the shared exponents of MX blocks; OCP Microscaling Formats 1.0, table 1
}
# Operators that multiply an input by a weight, and which operand is which.
MATMULS: dict[str, tuple[int, int]] = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "linear": (0, 1),
    "mkldnn_linear": (0, 1),
    "convolution": (0, 1),
    "_scaled_mm": (0, 1),
    "_scaled_mm_v2": (0, 1),
    "_scaled_grouped_mm": (0, 1),
    "_grouped_mm": (0, 1),
    # bitsandbytes': the weight is packed, and is unpacked into the format of the input, in which it multiplies.
    "gemm_4bit": (0, 0),
    "int8_mixed_scaled_mm": (0, 0),
}
# What scaled_dot_product_attention can come to (aten/src/ATen/native/transformers/attention.cpp); without any, "math".
SDPA_KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash",
    "_scaled_dot_product_efficient_attention": "mem_efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_attention_math_for_mps": "math",
    "_scaled_dot_product_fused_attention_overrideable": "overrideable",
}
FLASH_ATTN = re.compile(r"flash_?attn_?(\d)?")  # flash_attn, flash_attn_3, and the hub's _flash_attn2_<hash>


class MatmulWatch:
    """Note, for each module, the dtypes that its first matrix multiplication takes and gives."""

    is_any_operator = False

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._seen: dict[str, dict[str, str | None]] = {}
        self._logs: dict[str, _OperandLog] = {}
        self._handles: dict[str, list[RemovableHandle]] = {}
        for name, module in modules.items():
            self._handles[name] = [
                module.register_forward_pre_hook(partial(self._begin, name)),
                # First of the hooks, before ZeRO-3's releases the weights; also when the forward pass fails.
                module.register_forward_hook(partial(self._end, name), prepend=True, always_call=True),
            ]

    def seen(self) -> dict[str, dict[str, str | None]]:
        """Give `input`, `weight` and `output` by module; None: no such operand (an embedding's input is integers).

        A module that has not run, or whose operator torch did not dispatch, is missing.
        """
        return dict(self._seen)

    def remove(self) -> None:
        """Take every hook away; what was seen stays."""
        for name in list(self._handles):
            self._release(name)

    def _release(self, name: str) -> None:
        for handle in self._handles.pop(name, ()):
            handle.remove()

    def _begin(self, name: str, module: nn.Module, inputs: Any) -> None:
        if name not in self._logs:
            self._logs[name] = _OperandLog(module.parameters(), is_any_operator=self.is_any_operator)
            self._logs[name].__enter__()

    def _end(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        log = self._logs.pop(name, None)
        if log is None:
            return
        log.__exit__(None, None, None)
        if output is None:  # the forward pass failed, and torch is walking through the hooks
            return
        if log.found is not None:
            self._seen[name] = log.found
        self._release(name)


class IslandWatch(MatmulWatch):
    """Note it for any module with weights, an embedding or a norm too: where its input first meets a weight.

    A module without weights is seen by its first operator that computes.
    """

    is_any_operator = True


class _OperandLog(TorchDispatchMode):
    """Listen to the operators of one module's forward pass, and keep the dtypes of the one that matters."""

    def __init__(self, weights: Iterable[torch.Tensor], *, is_any_operator: bool) -> None:
        super().__init__()
        self.found: dict[str, str | None] | None = None
        self._is_any_operator = is_any_operator
        # Weights, and what is made of weights alone: autocast's copies, transposed views, scales.
        self._weights = {id(weight): weight for weight in weights}
        self._has_weights = bool(self._weights)
        self._is_settled = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_settled:
            self._note(func.overloadpacket.__name__, func, args, kwargs, result)
        return result

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if name in MATMULS:
            source, weight = MATMULS[name]
            self.found = _dtypes(args[source], args[weight], result)
            self._is_settled = True
            return
        operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        weights = [value for value in operands if id(value) in self._weights]
        others = [value for value in operands if id(value) not in self._weights]
        if weights and not others:
            self._weights |= {id(value): value for value in tree_leaves(result) if isinstance(value, torch.Tensor)}
        elif self._is_any_operator and self.found is None and (weights or not self._has_weights):
            floating = next((value for value in others if value.is_floating_point()), None)
            if weights or (floating is not None and not _only_moves(func, name)):
                heaviest = max(weights, key=torch.Tensor.numel) if weights else None
                self.found = _dtypes(floating, heaviest, result)


class GradientWatch:
    """Note the dtypes of the first gradients that reach weights, whatever an engine then makes of them."""

    def __init__(self) -> None:
        self._seen: set[torch.dtype] = set()

    def watch(self, weights: Iterable[torch.Tensor]) -> None:
        """Hook each weight for one gradient."""
        for weight in weights:
            handle: list[RemovableHandle] = []
            handle.append(weight.register_hook(partial(self._note, handle)))

    def seen(self) -> set[torch.dtype]:
        """Give the dtypes that came so far."""
        return set(self._seen)

    def _note(self, handle: list[RemovableHandle], gradient: torch.Tensor) -> None:
        self._seen.add(gradient.dtype)
        handle.pop().remove()


class SumWatch(TorchDispatchMode):
    """Note in which dtypes tensors are summed over ranks while it is entered; single numbers, such as norms, aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.overloadpacket.__name__:
            tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            self.seen |= {value.dtype for value in tensors if value.is_floating_point() and value.numel() > 1}
        return func(*args, **(kwargs or {}))


class AttentionWatch:
    """Note which attention kernels the first forward pass of `model` runs."""

    def __init__(self, model: nn.Module) -> None:
        self._log: _AttentionLog | None = None
        self._operators: dict[str, str] = {}
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, prepend=True, always_call=True),
        ]

    def kernels(self) -> list[str]:
        """Give what was found: flash, mem_efficient, cudnn, math (all scaled_dot_product_attention), eager, flex,
        flash_attn_2, flash_attn_3; empty where none was recognised."""
        return sorted(set(self._operators.values()))

    def operators(self) -> dict[str, str]:
        """Give the operator behind each, as torch names it, and what it is counted as."""
        return dict(self._operators)

    def remove(self) -> None:
        """Take the hooks away; what was seen stays."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if self._log is None:
            self._log = _AttentionLog(self._operators)
            self._log.__enter__()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._log is None:
            return
        self._log.__exit__(None, None, None)
        self._log = None
        if output is not None:
            self.remove()


class _AttentionLog(TorchFunctionMode):
    """Listen to the calls of torch's functions: the operators below do not tell the "math" of
    scaled_dot_product_attention from a model's own, and listening to those breaks flex attention."""

    def __init__(self, found: dict[str, str]) -> None:
        super().__init__()
        self._found = found
        self._scores, self._probabilities = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            with _SdpaLog() as log:
                result = func(*args, **keywords)
            self._found[log.operator] = SDPA_KERNELS.get(log.operator, "math")
            return result
        result = func(*args, **keywords)
        name = getattr(func, "__name__", "")
        if name == "flex_attention":
            self._found[name] = "flex"
        elif isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            version = FLASH_ATTN.search(str(func))
            if version is not None:
                self._found[str(func)] = f"flash_attn_{version[1] or 2}"
        elif isinstance(result, torch.Tensor) and result.dim() > 2 and args:
            self._follow(name, args, result)
        return result

    def _follow(self, name: str, args: Any, result: torch.Tensor) -> None:
        """Find an attention written out: a product of activations, its softmax, and that multiplied again."""
        first = args[1] if name == "einsum" else args[0]
        if name in ("matmul", "__matmul__", "bmm", "baddbmm", "einsum"):
            if any(value in self._probabilities for value in args if isinstance(value, torch.Tensor)):
                self._found["softmax"] = "eager"
            self._scores[result] = True
        elif not isinstance(first, torch.Tensor):
            return
        elif name == "softmax" and first in self._scores:
            self._probabilities[result] = True
        else:  # scaled, masked, cast, dropped out, reshaped
            for followed in (self._scores, self._probabilities):
                if first in followed:
                    followed[result] = True


class _SdpaLog(TorchDispatchMode):
    """Name the fused kernel that one call of scaled_dot_product_attention comes to."""

    operator = "scaled_dot_product_attention"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SDPA_KERNELS:
            self.operator = name
        return func(*args, **(kwargs or {}))


def _dtypes(source: Any, weight: Any, result: Any) -> dict[str, str | None]:
    output = next((value for value in tree_leaves(result) if isinstance(value, torch.Tensor)), None)
    return {"input": _dtype(source), "weight": _dtype(weight), "output": _dtype(output)}


def _dtype(tensor: Any) -> str | None:
    """Name the format that a tensor holds; a scaled one says in `dtype` what it stands for, so look inside."""
    if not isinstance(tensor, torch.Tensor):
        return None
    if is_traceable_wrapper_subclass(tensor):
        inside = {_dtype(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]}
        return next((name for name in ("mxfp8", "fp8") if name in inside), DTYPE_NAMES.get(tensor.dtype))
    return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _only_moves(func: Any, name: str) -> bool:
    """Whether an operator hands on what it got: a view, a cast, a copy."""
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
    return is_view or name in ("_to_copy", "to", "clone", "copy_", "detach", "contiguous")
