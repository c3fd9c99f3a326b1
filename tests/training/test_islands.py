"""Modules that compute in a precision of their own, in real tiny models: seen at the operators, not in the settings."""

import ast
import copy
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from mpt.training.precision import islands
from mpt.training.precision.islands import install_islands
from mpt.training.precision.watching import IslandWatch, MatmulWatch
from tests.training.tiny_runs import LLAMA, free_port

TOKENS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How the model around the island is stored, and the autocast that it runs in.
BF16_AUTOCAST, FP16_AUTOCAST = (torch.float32, torch.bfloat16), (torch.float32, torch.float16)
BF16_PURE, FP32 = (torch.bfloat16, None), (torch.float32, None)
Engine = tuple[torch.dtype, torch.dtype | None]

HEAD = ("lm_head",)
INSIDE = ("model.layers.0.mlp.down_proj", "model.embed_tokens", "model.norm", "model.layers.1.input_layernorm")
LINEARS = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj")


def llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**LLAMA | {"vocab_size": 256, "tie_word_embeddings": tied} | changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def run(model: Any, autocast: torch.dtype | None) -> Any:
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        return model(TOKENS, labels=TOKENS)


def gradients(model: Any, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
    run(model, autocast).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("engine", "around", "kind", "names"),
    [
        (BF16_AUTOCAST, "bf16", "fp32", HEAD),
        (BF16_AUTOCAST, "bf16", "fp32", INSIDE),
        (BF16_PURE, "bf16", "fp32", HEAD),
        (BF16_PURE, "bf16", "fp32", INSIDE),
        (BF16_PURE, "bf16", "fp32", (*HEAD, "model.embed_tokens")),
        (FP16_AUTOCAST, "fp16", "fp32", INSIDE),
        (FP16_AUTOCAST, "fp16", "bf16", HEAD),
        (FP16_AUTOCAST, "fp16", "bf16", LINEARS),
        (FP32, "fp32", "bf16", HEAD),
        (FP32, "fp32", "bf16", LINEARS),
        (FP32, "fp32", "fp16", LINEARS),
    ],
)
def test_an_island_computes_in_its_own_precision_and_every_other_module_in_the_models(
    engine: Engine, around: str, kind: str, names: tuple[str, ...], tied: bool
) -> None:
    stored, autocast = engine
    model = llama(stored, tied=tied)
    install_islands(model, dict.fromkeys(names, kind))
    modules = dict(model.named_modules())
    inside = IslandWatch({name: modules[name] for name in names})
    outside = MatmulWatch({name: module for name, module in linears(model).items() if name not in names})

    run(model, autocast).loss.backward()

    assert inside.seen().keys() == set(names)
    for name, dtypes in inside.seen().items():
        source = None if name == "model.embed_tokens" else kind  # an embedding is given integers
        assert dtypes == {"input": source, "weight": kind, "output": kind}, name
    assert len(outside.seen()) == len(linears(model).keys() - set(names))
    assert {tuple(dtypes.values()) for dtypes in outside.seen().values()} == {(around, around, around)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for name in names if kind == "fp32" else ():
        assert {(weight.dtype, weight.grad.dtype) for weight in modules[name].parameters()} == {(torch.float32,) * 2}
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    assert run(model, autocast).loss.isfinite()


def test_the_logits_of_an_fp32_head_are_the_exact_fp32_product_of_what_it_was_given() -> None:
    model = llama()
    rounded = run(model, torch.bfloat16).logits
    install_islands(model, {"lm_head": "fp32"})
    given: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    logits = run(model, torch.bfloat16).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, given[0].float() @ model.lm_head.weight.T)
    assert (logits - rounded).abs().max() > 1e-4  # bf16 keeps eight bits of logits near 0.1


def test_in_pure_bf16_the_head_is_given_bf16_values_and_keeps_fp32_logits() -> None:
    model = llama(torch.bfloat16)
    install_islands(model, {"lm_head": "fp32"})
    given: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    logits = run(model, None).logits
    assert given[0].dtype == torch.bfloat16
    assert torch.equal(logits, given[0].float() @ model.lm_head.weight.T)


def test_a_classifiers_head_keeps_fp32_logits_too() -> None:
    config = AutoConfig.for_model(**LLAMA | {"vocab_size": 256, "num_labels": 3, "pad_token_id": 0})
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    install_islands(model, {"score": "fp32"})
    assert model(TOKENS).logits.dtype == torch.float32


@pytest.mark.parametrize("names", [("lm_head",), ("model.embed_tokens",), ("lm_head", "model.embed_tokens")])
def test_a_tied_weight_stays_one_and_the_embedding_hands_on_what_the_model_computes_in(names: tuple[str, ...]) -> None:
    model = llama(torch.bfloat16, tied=True)
    install_islands(model, dict.fromkeys(names, "fp32"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    embedded = model.model.embed_tokens(TOKENS)
    assert embedded.dtype == torch.bfloat16
    assert torch.equal(embedded, model.lm_head.weight[TOKENS].bfloat16())
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = run(model, None).loss
    first.backward()
    optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(before, model.lm_head.weight)
    assert run(model, None).loss < first
    head = MatmulWatch({"lm_head": model.lm_head})
    run(model, None)
    assert head.seen()["lm_head"]["weight"] == ("fp32" if "lm_head" in names else "bf16")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_were_kept_in_fp32_while_the_model_was_cast_are_used_as_they_are(tied: bool) -> None:
    names = ("lm_head", "model.embed_tokens")
    model = llama(tied=tied, vocab_size=8192)  # most of this model is in fp32, and it computes in bf16 all the same
    kept = {id(weight) for name in names for weight in model.get_submodule(name).parameters()}
    for weight in model.parameters():
        if id(weight) not in kept:
            weight.data = weight.data.bfloat16()
    whole = model.lm_head.weight.detach().clone()
    install_islands(model, dict.fromkeys(names, "fp32"))
    assert torch.equal(model.lm_head.weight, whole)
    assert model.model.embed_tokens(TOKENS).dtype == torch.bfloat16
    assert all(grad.isfinite().all() for grad in gradients(model, None).values())


def test_inside_autocast_a_bf16_models_embedding_hands_on_bf16() -> None:
    model = llama(torch.bfloat16)
    install_islands(model, {"model.embed_tokens": "fp32"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.model.embed_tokens(TOKENS).dtype == torch.bfloat16


def test_a_weight_that_two_modules_share_is_lowered_for_each_in_its_own_dtype() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[2].weight = model[0].weight
    install_islands(model, {"1": "bf16"})
    watch = MatmulWatch(dict(model.named_children()))
    with torch.autocast("cpu", dtype=torch.float16):
        model(torch.randn(3, 16))
    assert [dtypes["weight"] for dtypes in watch.seen().values()] == ["fp16", "bf16", "fp16"]


def test_an_activation_can_be_an_island() -> None:
    model = llama(torch.bfloat16)
    name = "model.layers.0.mlp.act_fn"
    install_islands(model, {name: "fp32"})
    watch = IslandWatch({name: model.get_submodule(name)})
    run(model, None).loss.backward()
    assert watch.seen()[name] == {"input": "fp32", "weight": None, "output": "fp32"}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("engine", [BF16_AUTOCAST, BF16_PURE], ids=["autocast", "pure"])
def test_gradient_checkpointing_gives_the_same_gradients(engine: Engine, use_reentrant: bool) -> None:
    stored, autocast = engine
    chosen = dict.fromkeys((*HEAD, *INSIDE), "fp32")
    plain, checkpointed = llama(stored), llama(stored)
    install_islands(plain, chosen)
    install_islands(checkpointed, chosen)
    checkpointed.train().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    modules = dict(checkpointed.named_modules())
    watch = IslandWatch({name: modules[name] for name in chosen})
    expected, found = gradients(plain.train(), autocast), gradients(checkpointed, autocast)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {dtypes["output"] for dtypes in watch.seen().values()} == {"fp32"}


def test_a_bf16_island_holds_what_overflows_fp16() -> None:
    def overflowing() -> Any:
        model = llama()  # whose first down_proj gives more than fp16 holds, as trained models' do, from less
        mlp = model.model.layers[0].mlp
        mlp.up_proj.weight.data *= 1e4
        mlp.down_proj.weight.data *= 1e4
        return model

    def largest(model: Any) -> float:
        found: list[float] = []
        down_proj = model.model.layers[0].mlp.down_proj
        down_proj.register_forward_hook(lambda module, inputs, output: found.append(output.abs().max().item()))
        assert run(model, torch.float16).loss.isfinite() == (found[0] < float("inf"))
        return found[0]

    assert largest(overflowing()) == float("inf")
    model = overflowing()
    install_islands(model, {"model.layers.0.mlp.down_proj": "bf16"})
    assert 65504 < largest(model) < float("inf")


def test_names_types_and_a_copy_of_the_model_stay_what_they_were(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    install_islands(model, dict.fromkeys((*HEAD, *INSIDE), "fp32"))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    copied = copy.deepcopy(model)
    model.lm_head.weight.data.zero_()
    assert run(copied, torch.bfloat16).logits.any()
    copied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(run(loaded, None).logits, run(copied, None).logits)


def test_adapters_go_around_an_island() -> None:
    peft = pytest.importorskip("peft")
    model = llama(torch.bfloat16)
    island = model.model.layers[0].mlp.down_proj
    install_islands(model, {"model.layers.0.mlp.down_proj": "fp32"})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"]))
    watch = IslandWatch({"down_proj": island})
    run(adapted, torch.bfloat16).loss.backward()
    assert set(watch.seen()["down_proj"].values()) == {"fp32"}
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)


def test_a_model_of_other_layers_has_islands_too() -> None:
    config = AutoConfig.for_model(
        "gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0
    )
    names = ("transformer.h.0.ln_1", "transformer.h.0.attn.c_attn", "transformer.wpe")  # LayerNorm, Conv1D, Embedding
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    install_islands(model, dict.fromkeys(names, "fp32"))
    modules = dict(model.named_modules())
    watch = IslandWatch({name: modules[name] for name in names})
    run(model, None).loss.backward()
    assert {tuple(dtypes.values()) for dtypes in watch.seen().values()} == {
        ("fp32", "fp32", "fp32"),
        (None, "fp32", "fp32"),
    }
    assert Counter(weight.dtype for weight in model.parameters())[torch.float32] == 5


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"model.head": "fp32"}, "the model has no module model.head"),
        ({"lm_head": "fp8"}, "lm_head: fp8 is none of fp32, bf16, fp16"),
        ({"model.norm": "bf16"}, "model.norm: autocast lowers matrix multiplications alone, and LlamaRMSNorm has none"),
        ({"model.embed_tokens": "fp16"}, "Embedding has none"),
    ],
)
def test_what_can_not_be_an_island_is_refused_before_any_weight_is_cast(chosen: dict[str, str], words: str) -> None:
    model = llama(torch.bfloat16)
    with pytest.raises(ValueError, match=words):
        install_islands(model, {"model.layers.0.mlp.down_proj": "fp32"} | chosen)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_integer_weights_have_no_fp32_form() -> None:
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"torch\.uint8, which has no fp32 form"):
        install_islands(nn.Sequential(quantised), {"0": "fp32"})


DIVIDED = """
import deepspeed
from torch import nn
from mpt.training.precision.islands import install_islands

deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def build(**formats):
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}} | formats
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert model[0].weight.numel() == 0
    return model


install_islands(build(), {"0": "bf16", "1": "fp32"})
try:
    install_islands(build(bf16={"enabled": True}), {"0": "fp32"})
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_weights_that_zero3_has_divided_make_an_fp32_island_only_where_they_are_fp32() -> None:
    pytest.importorskip("deepspeed")
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", DIVIDED],
        env=os.environ | place | {"MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "refused: 0: ZeRO-3 has divided its torch.bfloat16 weights; build the model in fp32" in done.stdout


def test_the_file_needs_nothing_but_torch_and_the_standard_library() -> None:
    tree = ast.parse(Path(islands.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert {str(module).partition(".")[0] for module in imported} <= {"torch", *sys.stdlib_module_names}
