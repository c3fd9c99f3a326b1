"""The fp8 linear layer: torchao's, with one meaning in every engine and no gathered weight kept alive.

Apart from `mpt.training.precision.float8` because it imports torchao, which a run without fp8 needs not have.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args


class EngineFloat8Linear(Float8Linear):
    """A linear layer whose three matrix multiplications are fp8.

    What is rounded to fp8 are the values of input and weight in the autocast dtype of the input's device, or where
    there is no autocast in the weight's own dtype; the output has that dtype. So fp32 weights under bf16 autocast give
    the numbers that DeepSpeed's bf16 weights give (torch.compile may leave out the rounding on the way, and round to
    fp8 from fp32). torchao 0.18 asks for the CUDA autocast state whatever the device, and always rounds the weight from
    fp32: on a CPU its `rowwise_with_gw_hp` then ends in a dtype mismatch.
    """

    name_in_model: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply `input` (..., in_features) by the weight; give (..., out_features)."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        output = _Float8Matmul.apply(input.to(dtype), self.weight, self.linear_mm_config, self.config)
        return output if self.bias is None else output + self.bias.to(dtype)


class _Float8Matmul(torch.autograd.Function):
    """torchao's function, remembering the parameter instead of a view of its values.

    torchao saves the transposed weight for the backward pass. Under ZeRO-3 that view keeps the gathered weight of every
    layer in memory until then (deepspeed 0.19.8: 6 of 6 layers, where torch.nn.Linear keeps none), and under autocast
    it would be a 16-bit copy of each. A parameter is gathered again, or rounded again.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, mm_config: Any, config: Float8LinearConfig) -> Any:
        ctx.save_for_backward(input, weight)
        ctx.mm_config, ctx.config = mm_config, config
        transposed = weight.to(input.dtype).t()
        return matmul_with_hp_or_float8_args.forward(_Context(), input, transposed, mm_config, config)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        input, weight = ctx.saved_tensors
        context = _Context()
        context.saved_tensors = (input, weight.to(input.dtype).t())
        context.linear_mm_config, context.config = ctx.mm_config, ctx.config
        grad_input, grad_transposed, *_ = matmul_with_hp_or_float8_args.backward(context, grad_output)
        return grad_input, grad_transposed.t().to(weight.dtype), None, None


torch._dynamo.allow_in_graph(_Float8Matmul)  # as torchao does with its own: the compiler takes it whole


class _Context:
    """What torchao's function keeps between forward and backward."""

    saved_tensors: tuple[torch.Tensor, ...] = ()
    linear_mm_config: Any = None
    config: Any = None

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors
