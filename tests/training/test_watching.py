"""What the watches say is what ran: read at the operators of real models, and gone after one forward pass."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import AutoConfig, AutoModelForCausalLM

from mpt.planning.attention import SEEN_EAGERLY
from mpt.training.precision.watching import AttentionWatch, IslandWatch, MatmulWatch
from tests.training.tiny_runs import LLAMA

TOKENS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 16)


def tiny(model_type: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**LLAMA | {"model_type": model_type, "vocab_size": 256} | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def is_any_mode_active() -> bool:
    return _get_current_dispatch_mode() is not None or bool(_get_current_function_mode_stack())


class WithoutAutocast(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 16)])
def test_operands_are_named_below_autocast_and_below_what_opts_out_of_it(
    context: Callable[[], Any], bias: bool, shape: tuple[int, ...]
) -> None:
    model = nn.ModuleDict({"usual": nn.Linear(16, 16, bias), "apart": WithoutAutocast(16, 16, bias)})
    watch = MatmulWatch(dict(model.items()))
    with context(), torch.autocast("cpu", dtype=torch.bfloat16):
        for module in model.values():
            module(torch.randn(shape))
    assert watch.seen() == {
        "usual": {"input": "bf16", "weight": "bf16", "output": "bf16"},
        "apart": {"input": "fp32", "weight": "fp32", "output": "fp32"},
    }


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        (nn.Embedding(8, 4), torch.tensor([1]), (None, "fp32", "fp32")),
        (nn.LayerNorm(16), ROWS, ("fp32", "fp32", "fp32")),
        (nn.LayerNorm(16).bfloat16(), ROWS.bfloat16(), ("bf16", "bf16", "bf16")),
        (nn.RMSNorm(16), ROWS, ("fp32", "fp32", "fp32")),
        (nn.Conv1d(3, 4, 2), ROWS, ("fp32", "fp32", "fp32")),
        (nn.Linear(16, 4).double(), ROWS.double(), ("fp64", "fp64", "fp64")),
        (nn.SiLU(), ROWS.bfloat16(), ("bf16", None, "bf16")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_an_island_of_any_kind_is_seen_where_input_and_weight_meet(
    module: nn.Module, given: torch.Tensor, expected: tuple[str | None, ...]
) -> None:
    watch = IslandWatch({"it": module})
    module(given)
    assert tuple(watch.seen()["it"].values()) == expected


def test_a_norm_that_widens_its_input_is_named_by_what_first_reaches_its_weight() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.float()
            x = (x * x.pow(2).mean(-1, keepdim=True).rsqrt() * (1.0 + self.weight.float())).bfloat16()
            return x + self.weight

    norm = Norm()
    watch = IslandWatch({"norm": norm})
    norm(ROWS.bfloat16())
    assert watch.seen()["norm"] == {"input": "fp32", "weight": "fp32", "output": "fp32"}


@pytest.mark.parametrize("autocast", [True, False])
def test_fp8_operands_are_named_fp8_whatever_they_stand_for(autocast: bool) -> None:
    float8 = pytest.importorskip("torchao.float8")
    model = tiny()
    config = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name("tensorwise"), emulate=True)
    float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: "mlp" in name)
    watch = MatmulWatch(linears(model))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(TOKENS, labels=TOKENS).loss.backward()
    around = "bf16" if autocast else "fp32"
    for name, dtypes in watch.seen().items():
        operands = "fp8" if "mlp" in name else around
        assert dtypes == {"input": operands, "weight": operands, "output": around}, name


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_watched_step_has_the_gradients_of_any_other_and_leaves_nothing_behind(use_reentrant: bool | None) -> None:
    def gradients(model: Any) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        return [weight.grad for weight in model.parameters()]

    plain, watched = tiny(), tiny()
    if use_reentrant is not None:
        watched.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    before = hooks(watched)
    matmuls, islands, attention = MatmulWatch(linears(watched)), IslandWatch(linears(watched)), AttentionWatch(watched)
    assert hooks(watched) > before
    assert all(map(torch.equal, gradients(plain), gradients(watched)))
    assert hooks(watched) == before
    assert not is_any_mode_active()
    assert matmuls.seen() == islands.seen()
    assert matmuls.seen().keys() == linears(watched).keys()
    assert attention.kernels() == ["flash"]


def test_the_first_forward_pass_is_the_one_that_counts() -> None:
    model = tiny()
    watch = MatmulWatch(linears(model))
    model(TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(TOKENS)
    assert {dtypes["output"] for dtypes in watch.seen().values()} == {"fp32"}


def test_what_did_not_run_is_missing_and_removed_watches_see_nothing() -> None:
    model = tiny()
    idle = nn.Linear(4, 4)
    watch = MatmulWatch({"idle": idle, "lm_head": model.lm_head})
    gone = (MatmulWatch(linears(model)), AttentionWatch(model))
    for removed in gone:
        removed.remove()
    model(TOKENS)
    watch.remove()
    assert watch.seen().keys() == {"lm_head"}
    assert gone[0].seen() == {} and gone[1].kernels() == []
    assert hooks(model) + hooks(idle) == 0


def test_a_forward_pass_that_fails_leaves_no_mode_on_and_the_next_one_is_watched() -> None:
    model = tiny()
    matmuls, attention = MatmulWatch({"head": model.lm_head}), AttentionWatch(model)
    whole = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match="shape"):
        model(TOKENS)
    assert not is_any_mode_active()
    assert matmuls.seen() == {}
    model.lm_head.weight = whole
    model(TOKENS)
    assert matmuls.seen()["head"]["output"] == "fp32"
    assert attention.kernels() == ["flash"]
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("config", "backend", "kernel"),
    [
        ({}, None, "flash"),
        ({}, SDPBackend.MATH, "math"),
        ({"attention": "eager"}, None, "eager"),
        ({"model_type": "gpt_neox", "attention": "eager"}, None, "eager"),
        ({"model_type": "gpt2", "attention": "eager", "attn_pdrop": 0.0}, None, "eager"),
        ({"model_type": "gpt2", "attn_pdrop": 0.1}, None, "math"),  # the CPU's flash kernel has no dropout
        # A router's softmax is no attention's.
        ({"model_type": "mixtral", "num_key_value_heads": 4, "num_local_experts": 2}, None, "flash"),
    ],
)
def test_the_attention_kernel_that_ran_is_named(
    config: dict[str, Any], backend: SDPBackend | None, kernel: str
) -> None:
    model = tiny(**config).train()
    watch = AttentionWatch(model)
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        model(TOKENS)
    assert watch.kernels() == [kernel]
    assert set(watch.operators().values()) == {kernel}


@pytest.mark.parametrize("model_type", sorted(SEEN_EAGERLY))
def test_the_eager_attention_of_the_models_that_auto_gives_it_is_recognised(model_type: str) -> None:
    sizes = {"attn_pdrop": 0.0} if model_type == "gpt2" else {"num_key_value_heads": 4, "pad_token_id": 0}
    model = tiny(model_type, "eager", **sizes).train()
    watch = AttentionWatch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(TOKENS)
    assert watch.kernels() == ["eager"]


class Attending(nn.Module):
    """A module that calls the attention that it is given."""

    def __init__(self, attend: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x)


def external(namespace: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Register an operator under the namespace of an attention package, and call it as those do: inside a Function."""
    name = f"{namespace}::forward_of_a_test"
    torch.library.define(name, "(Tensor x) -> Tensor")
    torch.library.impl(name, "CPU", lambda x: x.clone())
    operator = getattr(torch.ops, namespace).forward_of_a_test

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return operator(x)

    return Attention.apply


@pytest.mark.parametrize(
    ("namespace", "kernel"),
    [
        ("flash_attn", "flash_attn_2"),
        ("flash_attn_3", "flash_attn_3"),
        ("_flash_attn2_588b404", "flash_attn_2"),
        ("_vllm_flash_attn3_f1a0c5e", "flash_attn_3"),
    ],
)
def test_the_kernels_of_other_packages_are_known_by_their_operators(namespace: str, kernel: str) -> None:
    module = Attending(external(namespace))
    watch = AttentionWatch(module)
    module(torch.randn(1, 2, 4, 8))
    assert watch.kernels() == [kernel]


def test_two_kernels_in_one_model_are_both_named() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        x = functional.scaled_dot_product_attention(x, x, x)
        scores = torch.einsum("bhqd,bhkd->bhqk", x, x) / 8
        return torch.einsum("bhqk,bhkd->bhqd", scores.float().softmax(-1).to(x.dtype), x)

    module = Attending(attend)
    watch = AttentionWatch(module)
    module(torch.randn(1, 2, 4, 8))
    assert watch.kernels() == ["eager", "flash"]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: functional.softmax(x @ x.transpose(-1, -2), -1).argmax(-1).float(),
        lambda x: functional.softmax(x, -1).transpose(-1, -2) @ x,
    ],
    ids=["multiplies nothing", "of no product"],
)
def test_a_softmax_alone_is_no_attention(compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = Attending(compute)
    watch = AttentionWatch(module)
    module(torch.randn(1, 2, 4, 8))
    assert watch.kernels() == []
