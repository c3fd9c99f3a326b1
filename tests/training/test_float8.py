"""fp8 layers in real models: what is converted, what it computes, and that the weights move."""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchao.float8
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mpt.errors import MptError, UnsupportedError
from mpt.planning.float8 import TE_RECIPES, TORCHAO_RECIPES, pays
from mpt.training.precision import transformer_engine
from mpt.training.precision.float8 import convert, count_converted, float8_modules

BF16, FP32 = torch.bfloat16, torch.float32
TOKENS = (torch.arange(8)[:, None] * 31 + torch.arange(24) * 5) % 96
MODES = {"autocast": (FP32, True), "bf16 weights": (BF16, False), "fp32": (FP32, False)}


def build(dtype: torch.dtype = FP32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=96,
        max_position_embeddings=32,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def in_blocks(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, module in model.named_modules() if ".layers." in name and type(module) is nn.Linear)


def converted(recipe: str = "tensorwise", dtype: torch.dtype = FP32) -> LlamaForCausalLM:
    model = build(dtype)
    convert(model, in_blocks(model), recipe=recipe, emulate=True)
    return model


def step(model: nn.Module, *, autocast: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """One forward and backward pass: the loss, and the gradients in fp32. 7 rows a sample: no multiple of 16."""
    with torch.autocast("cpu", BF16, enabled=autocast):
        loss = model(input_ids=TOKENS[:3, :7], labels=TOKENS[:3, :7]).loss
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def decibels(signal: torch.Tensor, other: torch.Tensor) -> float:
    """The signal-to-quantisation-noise ratio of `other`."""
    return float(20 * torch.log10(signal.norm() / (signal - other).norm()))


# --- what is converted


def test_exactly_the_named_modules_become_fp8_and_keep_their_parameters() -> None:
    model = build()
    before = dict(model.named_parameters())
    names = frozenset({"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"})
    assert convert(model, names, recipe="rowwise", emulate=True) == 2
    found = {name for name, module in model.named_modules() if "Float8" in type(module).__name__}
    assert found == names == set(float8_modules(model))
    assert count_converted(model) == 2
    after = dict(model.named_parameters())
    assert list(after) == list(before)  # the optimizer's and the checkpoint's order
    assert all(after[name] is before[name] for name in before)
    assert all(module.config.emulate for module in map(model.get_submodule, names))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.7.mlp.up_proj", "no such module"),
        ("model.norm", "a LlamaRMSNorm"),
        ("model.embed_tokens", "an? Embedding"),
        ("model.layers.0.mlp", "a LlamaMLP"),
    ],
)
def test_a_name_that_is_no_linear_layer_is_refused_and_nothing_is_converted(name: str, says: str) -> None:
    model = build()
    with pytest.raises(MptError, match=says):
        convert(model, in_blocks(model) | {name}, recipe="tensorwise", emulate=True)
    assert count_converted(model) == 0


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8", "Tensorwise"])
def test_a_recipe_that_torchao_lacks_is_refused(recipe: str) -> None:
    with pytest.raises(MptError, match="torchao has no fp8 recipe"):
        convert(build(), frozenset(), recipe=recipe, emulate=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_real_fp8_without_an_accelerator_is_refused() -> None:
    model = build()
    with pytest.raises(UnsupportedError, match="no accelerator"):
        convert(model, in_blocks(model), recipe="tensorwise", emulate=False)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_shape_rule_is_torchaos(recipe: str) -> None:
    theirs = torchao.float8._auto_filter_for_recipe(recipe, filter_fqns=[])
    sizes = [size for edge in (16, 1024, 2048, 4096, 8192) for size in (edge - 16, edge, edge + 16) if size > 0]
    for k in sizes:
        for n in sizes:
            assert pays(recipe, k, n) is theirs(nn.Linear(k, n, device="meta"), "a"), (k, n)


# --- what it computes


@pytest.mark.parametrize("recipe", TORCHAO_RECIPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_recipe_trains_in_the_dtypes_of_every_engine_close_to_bf16(recipe: str, mode: str) -> None:
    dtype, autocast = MODES[mode]
    loss, gradients = step(converted(recipe, dtype), autocast=autocast)
    reference_loss, reference = step(build(dtype), autocast=autocast)
    assert loss != reference_loss
    assert abs(loss - reference_loss) < 0.01 * reference_loss
    # One rounding of all values leaves a signal-to-noise ratio of 26 dB in E5M2 (2 bits of mantissa) and 32 dB in E4M3
    # (3 bits). A gradient here has come through some five of them, whose noise adds: 26 - 10 log10(5) = 19 dB with the
    # E5M2 gradients of tensorwise, 25 with rowwise's E4M3. A wrong scale or a wrong factor leaves less than 6 dB.
    for name, gradient in gradients.items():
        if not name.endswith("k_proj.bias"):  # a shift of every key leaves the softmax alone: that gradient is noise
            assert 15 < decibels(reference[name], gradient) < 40, name


@pytest.mark.parametrize("recipe", TORCHAO_RECIPES)
def test_fp32_weights_under_autocast_compute_what_bf16_weights_compute(recipe: str) -> None:
    outputs, gradients = [], []
    for dtype, autocast in ((FP32, True), (BF16, False)):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(32, 48)).to(dtype)
        convert(layer, frozenset({"0"}), recipe=recipe, emulate=True)
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        with torch.autocast("cpu", BF16, enabled=autocast):
            output = layer(x)
        assert output.dtype is BF16
        output.float().square().sum().backward()
        outputs.append(output)
        gradients.append([x.grad.float(), *(p.grad.float() for p in layer.parameters())])
    assert torch.equal(*outputs)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("recipe", TORCHAO_RECIPES)
def test_with_bf16_weights_it_computes_what_torchao_computes(recipe: str) -> None:
    theirs = build(BF16)
    names = in_blocks(theirs)
    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    convert_to_float8_training(theirs, config=config, module_filter_fn=lambda _, name: name in names)
    loss, gradients = step(converted(recipe, BF16), autocast=False)
    their_loss, their_gradients = step(theirs, autocast=False)
    assert loss == their_loss
    assert all(torch.equal(gradients[name], their_gradients[name]) for name in gradients)


@pytest.mark.parametrize("recipe", TORCHAO_RECIPES)
def test_activation_checkpointing_gives_the_same_gradients(recipe: str) -> None:
    plain, recomputed = converted(recipe).train(), converted(recipe).train()
    recomputed.activation_checkpointing_enable({"use_reentrant": False})
    calls: list[Any] = []
    recomputed.model.layers[0].mlp.up_proj.register_forward_hook(lambda *call: calls.append(call))
    loss, gradients = step(plain, autocast=True)
    again, recomputed_gradients = step(recomputed, autocast=True)
    assert len(calls) == 2
    assert loss == again
    assert all(torch.equal(gradients[name], recomputed_gradients[name]) for name in gradients)


def test_an_engine_may_take_the_weight_away_between_forward_and_backward() -> None:
    """ZeRO-3 does: a view that were saved for the backward pass would keep every gathered weight in memory."""
    gradients = []
    for is_taken in (False, True):
        layer = nn.Sequential(nn.Linear(32, 48, bias=False))
        layer[0].weight.data.copy_(torch.linspace(-1, 1, 32 * 48).view(48, 32))
        convert(layer, frozenset({"0"}), recipe="tensorwise", emulate=True)
        x = torch.linspace(-2, 2, 4 * 32).view(4, 32).requires_grad_()
        output = layer(x)
        if is_taken:
            weight = layer[0].weight
            gathered, copy = weight.data, weight.data.clone()
            weight.data = torch.empty(0)
            gathered.zero_()
            weight.data = copy
        output.square().sum().backward()
        gradients.append((x.grad, layer[0].weight.grad))
    assert gradients[0][0].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("autocast", [True, False])
def test_it_compiles_as_one_graph_with_the_same_numbers(autocast: bool) -> None:
    layers = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32, bias=False))
    convert(layers, frozenset({"0", "2"}), recipe="tensorwise", emulate=True)
    x = torch.randn(3, 7, 32)
    results = []
    with torch._dynamo.config.patch(disable=False):
        for function in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
            layers.zero_grad()
            with torch.autocast("cpu", BF16, enabled=autocast):
                output = function(x)
            output.float().square().mean().backward()
            results.append([output, *(p.grad.clone() for p in layers.parameters())])
    torch._dynamo.reset()
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["autocast", "bf16 weights"])
def test_adapters_train_around_frozen_fp8_layers(mode: str) -> None:
    dtype, autocast = MODES[mode]
    model = converted("rowwise", dtype)
    names = float8_modules(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    assert float8_modules(adapted) == names
    _, gradients = step(adapted, autocast=autocast)
    assert len(gradients) == 8  # A and B of two layers in two blocks
    assert all("lora_" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())


def test_importing_torchao_is_quiet_once_it_was_asked_to_be() -> None:
    program = (
        "from mpt.training.precision.float8 import quiet_torchao\n"
        "quiet_torchao()\n"
        "import torchao.float8, peft, logging\n"
        "logging.getLogger('torchao').warning('other news')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "other news\n"


# --- training


@pytest.fixture
def forget_accelerate() -> Iterator[None]:
    """accelerate remembers the first precision that a process asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(model: LlamaForCausalLM, folder: Path, *, bf16: bool) -> tuple[list[float], list[str]]:
    """Train with the HF Trainer: the losses by step, and which weights are bitwise what they were."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=bf16,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    samples: Any = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    after = {name: getattr(p, "_tensor", p).detach() for name, p in trainer.model.named_parameters()}
    return losses, [name for name in before if torch.equal(before[name], after[name])]


def test_the_weights_move_in_training_and_the_loss_stays_close_to_bf16s(
    tmp_path: Path, forget_accelerate: None
) -> None:
    reference, _ = train(build(), tmp_path, bf16=True)
    for recipe in TORCHAO_RECIPES:
        losses, frozen = train(converted(recipe), tmp_path, bf16=True)
        assert frozen == []
        assert losses[-1] < 0.9 * losses[0]
        assert losses != reference
        # Each step's gradient is off by a tenth of its norm, in a direction of its own; measured is 0.3 % of the loss.
        assert all(abs(one - other) < 0.01 * other for one, other in zip(losses, reference, strict=True))


def test_accelerates_own_route_to_fp8_leaves_the_weights_frozen(
    tmp_path: Path, forget_accelerate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why mpt converts by itself. When this fails, accelerate has mended it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    # accelerate's default configuration, emulated: it gives the others itself.
    monkeypatch.setattr(torchao.float8, "Float8LinearConfig", functools.partial(Float8LinearConfig, emulate=True))
    model = build()
    losses, frozen = train(model, tmp_path, bf16=False)
    in_fp8 = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert len(in_fp8) == 13  # all but the first linear layer and the head
    assert {f"{name}.weight" for name in in_fp8} == set(frozen)
    assert losses[-1] < losses[0]  # by what is left: nothing on the screen tells


# --- Transformer Engine, which needs a GPU: what is decided without it


class StandInLinear(nn.Module):
    """Takes what `transformer_engine.pytorch.Linear` takes, and has its parameters' names and its extra state."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, device: str):
        super().__init__()
        self.built_on = device
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None: ...


def recorded(calls: list[dict[str, Any]], **keywords: Any) -> AbstractContextManager[None]:
    calls.append(keywords)
    return nullcontext()


@pytest.mark.parametrize(("recipe", "has_state"), [("tensorwise", False), ("mxfp8", False), ("delayed", True)])
def test_transformer_engines_layers_take_over_our_parameters(recipe: str, has_state: bool) -> None:
    model = build(BF16)
    before = dict(model.named_parameters())
    names = frozenset({"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"})
    te = SimpleNamespace(Linear=StandInLinear)
    assert transformer_engine.convert(model, names, recipe=recipe, te=te) == 2
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(after[name] is before[name] for name in before)
    assert {model.get_submodule(name).built_on for name in names} == {"meta"}
    assert set(float8_modules(model)) == names
    # A stateless recipe's checkpoint is an ordinary one; delayed scaling's history is part of it.
    assert any(name.endswith("_extra_state") for name in model.state_dict()) is has_state


def test_transformer_engine_refuses_what_is_no_linear_layer() -> None:
    with pytest.raises(MptError, match="LlamaRMSNorm"):
        transformer_engine.convert(
            build(), frozenset({"model.norm"}), recipe="delayed", te=SimpleNamespace(Linear=StandInLinear)
        )


@pytest.mark.parametrize(("name", "keyword"), [("autocast", "recipe"), ("fp8_autocast", "fp8_recipe")])
@pytest.mark.parametrize("recipe", TE_RECIPES)
def test_autocast_has_one_recipe_object_under_the_name_that_the_version_knows(
    name: str, keyword: str, recipe: str
) -> None:
    calls: list[dict[str, Any]] = []
    recipes = SimpleNamespace(**{known: type(known, (), {}) for known in TE_RECIPES.values()})
    te = SimpleNamespace(**{name: functools.partial(recorded, calls)})
    context = transformer_engine.autocast(recipe, te=te, recipes=recipes)
    for _ in range(2):
        with context():
            pass
    assert [set(call) for call in calls] == [{"enabled", keyword}] * 2
    assert type(calls[0][keyword]).__name__ == TE_RECIPES[recipe]
    assert calls[0] == calls[1]


def test_a_version_without_the_recipe_lists_those_that_it_has() -> None:
    recipes = SimpleNamespace(DelayedScaling=object, MXFP8BlockScaling=object, Format=object)
    with pytest.raises(
        UnsupportedError, match="no recipe Float8CurrentScaling, only DelayedScaling, MXFP8BlockScaling"
    ):
        transformer_engine.autocast("tensorwise", te=SimpleNamespace(), recipes=recipes)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)
def test_without_transformer_engine_the_install_line_is_given() -> None:
    model = build()
    with pytest.raises(UnsupportedError) as raised:
        transformer_engine.convert(model, in_blocks(model), recipe="tensorwise")
    assert 'pip install --no-build-isolation "transformer_engine[pytorch]"' in raised.value.remedy


def test_a_recomputation_enters_the_context_again() -> None:
    entered: list[str] = []

    class Context:
        def __enter__(self) -> None:
            entered.append("enter")

        def __exit__(self, *_: object) -> None:
            entered.append("exit")

    def block(x: torch.Tensor) -> torch.Tensor:
        entered.append("block")
        return x.exp().sin()

    contexts = transformer_engine.checkpoint_contexts(Context)
    output = checkpoint(block, torch.ones(3, requires_grad=True), use_reentrant=False, context_fn=contexts)
    assert entered == ["block"]
    output.sum().backward()
    assert entered == ["block", "enter", "block", "exit"]
