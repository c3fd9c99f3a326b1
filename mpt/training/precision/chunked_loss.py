"""The cross entropy of a causal language model in chunks of tokens: the logits of a large vocabulary never stand whole.

Each chunk's gradients are computed with its loss, while its logits are at hand, and kept instead of them (as in Hsu et
al. 2024, Liger Kernel, section 3.2): a gradient the size of the hidden states, and one the size of the head. For which
models is decided by `mpt.planning.loss`; that the result is the model's own loss, the audit checks on the live model.
This file imports torch and transformers alone, for generated scripts carry its text.
"""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

IGNORED = -100  # the label that transformers' losses leave out
LossScale = Callable[[], torch.Tensor | None]


def install_chunked_loss(model: PreTrainedModel, tokens: int, loss_scale: LossScale = lambda: None) -> None:
    """Let `model` compute its loss from `tokens` tokens' logits at a time wherever it gets labels; it then gives the
    loss alone. Without labels it is as before.

    `loss_scale` gives what the loss will be multiplied by before its backward pass, on the loss's device: gradients of
    logits in fp16 are taken at that scale, or the small ones would vanish.
    """
    plain = model.forward

    @wraps(plain.__func__)  # the Trainer reads from the signature which columns the model takes
    def forward(self: PreTrainedModel, *args: Any, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return plain(*args, **inputs)
        items, shifted = inputs.pop("num_items_in_batch", None), inputs.pop("shift_labels", None)
        hidden = self.base_model(*args, **inputs)[0]
        if shifted is None:
            shifted = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        loss = chunked_cross_entropy(hidden, self.get_output_embeddings(), shifted, items, tokens, loss_scale())
        return CausalLMOutputWithPast(loss=loss)

    model.forward = MethodType(forward, model)
    model.own_forward = plain  # what the audit compares with


def foretold_scale(scaler: torch.amp.GradScaler | None) -> torch.Tensor | None:
    """Give what the scaler will multiply the next loss by, without waiting for the device; None without a scaler."""
    if scaler is None:
        return None
    scale: torch.Tensor | None = scaler._get_scale_async()
    return torch.tensor(scaler.get_scale()) if scale is None else scale  # none yet: the first one, which no device has


@torch.compiler.disable
def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: nn.Module,
    shift_labels: torch.Tensor,
    num_items: torch.Tensor | int | None,
    tokens: int,
    loss_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give the loss of the head's logits as transformers' ForCausalLMLoss does, `tokens` tokens at a time.

    `hidden`: (..., width); `shift_labels`: the same leading shape, IGNORED where nothing is learnt. The head runs as
    the module that it is, so in the precision that it has.
    """
    labels = shift_labels.reshape(-1).to(hidden.device)
    rows = hidden.reshape(-1, hidden.shape[-1])
    items = (labels != IGNORED).sum() if num_items is None else num_items
    if labels.device.type == "cpu":  # elsewhere to count what is learnt would be to wait for the device
        learnt = (labels != IGNORED).nonzero().squeeze(1)
        if len(learnt) < 0.9 * len(labels):
            rows, labels = rows.index_select(0, learnt), labels[learnt]
    linear = _active(head)
    scale = torch.ones((), device=rows.device) if loss_scale is None else loss_scale.to(rows.device)
    share = scale / torch.as_tensor(items, device=rows.device)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(
        rows, linear.weight, linear.bias, labels, share, scale, head, tokens, torch.is_grad_enabled()
    )
    return loss


def _active(head: Any) -> Any:
    """The linear layer that computes: peft keeps a trained copy of a head beside the frozen one."""
    while hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapters[0]]
    return head


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`share` is what a token's loss is multiplied by before its gradient is rounded: the loss scale / the items."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        share: torch.Tensor,
        scale: torch.Tensor,
        head: nn.Module,
        tokens: int,
        with_gradients: bool,
    ) -> torch.Tensor:
        needs = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        of_rows = torch.empty_like(rows) if needs[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        lowered: torch.Tensor | None = None
        for start in range(0, len(rows), tokens):
            part, targets = rows[start : start + tokens], labels[start : start + tokens]
            logits = head(part)
            is_learnt = targets != IGNORED
            index = targets.clamp(min=0).unsqueeze(1)
            log_probabilities = functional.log_softmax(logits.float(), dim=-1)
            total -= torch.where(is_learnt, log_probabilities.gather(1, index).squeeze(1), 0.0).sum()
            if not any(needs):
                continue
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
            gradient.mul_(torch.where(is_learnt, share, 0.0).unsqueeze(1))
            if of_bias is not None:
                of_bias += gradient.sum(0)
            rounded = gradient.to(logits.dtype)
            if of_rows is not None:
                lowered = weight.to(logits.dtype) if lowered is None else lowered
                of_rows[start : start + tokens] = rounded @ lowered
            if of_weight is not None:
                of_weight += rounded.T @ part.to(logits.dtype)
        ctx.gradients, ctx.scale = (of_rows, of_weight, of_bias), scale
        return total * (share / scale)

    @staticmethod
    def backward(ctx: Any, *of_loss: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the chunked loss gives its gradients once: retain_graph is of no use here")
        factor = of_loss[0] / ctx.scale  # 1 wherever the loss was multiplied by what was foretold
        return *(None if gradient is None else gradient.mul_(factor) for gradient in gradients), *(None,) * 6
