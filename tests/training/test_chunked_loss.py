"""The chunked cross entropy is the model's own loss, in value and gradients; the logits never stand whole."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mpt.planning.loss import PLAIN_HEADS
from mpt.training.collation import IGNORED
from mpt.training.precision.chunked_loss import chunked_cross_entropy, install_chunked_loss
from mpt.training.precision.islands import install_islands
from tests.training.tiny_runs import Run

VOCABULARY, WIDTH = 211, 32
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
OWN_SIZES = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY},
    "gemma": {"head_dim": 16},
}


def build(model_type: str, *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = OWN_SIZES[model_type] if model_type == "gpt2" else SIZES | OWN_SIZES.get(model_type, {})
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | config), dtype=dtype)
    return made.eval()  # no dropout: two passes are compared


def batch() -> dict[str, torch.Tensor]:
    """Two rows of tokens; most labels of the first are ignored, as those of a prompt are."""
    tokens = torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :33] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def pair(model: Any, tokens: int = 16, **keywords: Any) -> tuple[Any, Any]:
    chunked = copy.deepcopy(model)
    install_chunked_loss(chunked, tokens, **keywords)
    return model, chunked


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def agree(plain: dict[str, torch.Tensor], chunked: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare tensor by tensor, relative to each tensor's largest gradient."""
    assert plain.keys() == chunked.keys()
    for name, gradient in plain.items():
        largest = gradient.abs().max().item()
        assert (gradient - chunked[name]).abs().max().item() <= tolerance * largest, name


@pytest.mark.parametrize("model_type", sorted(PLAIN_HEADS))
def test_of_every_listed_model_the_loss_and_all_gradients_are_its_own(model_type: str) -> None:
    plain, chunked = pair(build(model_type))
    inputs = batch() | {"num_items_in_batch": torch.tensor(77)}
    own, ours = plain(**inputs).loss, chunked(**inputs).loss
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=0)  # fp32, summed in another order
    agree(gradients(plain, own), gradients(chunked, ours), 1e-5)


def test_without_a_count_of_items_it_is_the_mean_over_what_is_learnt() -> None:
    plain, chunked = pair(build("llama"))
    torch.testing.assert_close(chunked(**batch()).loss, plain(**batch()).loss, rtol=1e-6, atol=0)


def test_labels_that_are_shifted_already_are_taken_as_they_are() -> None:
    plain, chunked = pair(build("llama"))
    inputs = batch()
    inputs["shift_labels"] = inputs["labels"].roll(-1, 1)
    torch.testing.assert_close(chunked(**inputs).loss, plain(**inputs).loss, rtol=1e-6, atol=0)


def test_tied_weights_get_the_sum_of_both_gradients() -> None:
    plain, chunked = pair(build("llama", tie_word_embeddings=True))
    own, ours = plain(**batch()).loss, chunked(**batch()).loss
    agree(gradients(plain, own), gradients(chunked, ours), 1e-5)


def test_without_labels_the_model_gives_its_logits_as_before() -> None:
    plain, chunked = pair(build("llama"))
    tokens = batch()["input_ids"]
    assert torch.equal(chunked(input_ids=tokens).logits, plain(input_ids=tokens).logits)


def test_the_trainer_finds_the_same_arguments() -> None:
    plain, chunked = pair(build("llama"))
    assert inspect.signature(chunked.forward) == inspect.signature(plain.forward)


def test_in_evaluation_there_is_a_loss_and_no_gradient_is_computed() -> None:
    _, chunked = pair(build("llama"))
    with torch.no_grad():
        loss = chunked(**batch()).loss
    assert not loss.requires_grad
    assert loss.item() > 1


@pytest.mark.parametrize("island", [False, True])
def test_under_bf16_autocast_and_with_an_fp32_head_it_rounds_where_the_model_does(island: bool) -> None:
    model = build("llama")
    if island:
        install_islands(model, {"lm_head": "fp32"})
    plain, chunked = pair(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, ours = plain(**batch()).loss, chunked(**batch()).loss
    # Each token's logits are the same numbers; only their sum is taken in another order.
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=0)
    agree(
        gradients(plain, own), gradients(chunked, ours), 2**-6
    )  # a rounding to bf16 more or less, of gradients and of their sum


def test_bf16_weights_get_gradients_of_the_dtype_that_they_accumulate_in() -> None:
    for accumulates_in in (torch.bfloat16, torch.float32):
        _, chunked = pair(build("llama", dtype=torch.bfloat16))
        head = chunked.get_output_embeddings().weight
        head.grad_dtype = accumulates_in
        chunked(**batch()).loss.backward()
        assert head.grad.dtype is accumulates_in


def test_small_gradients_of_fp16_logits_are_taken_at_the_loss_scale() -> None:
    scale = torch.tensor(2.0**14)
    items = torch.tensor(2.0**16)  # a large batch: a token's share of the loss is below fp16's smallest numbers
    model = build("llama")
    plain, with_scale = pair(model, loss_scale=lambda: scale)
    _, without = pair(model)
    found = {}
    for name, one in (("own", plain), ("scaled", with_scale), ("unscaled", without)):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = one(**batch(), num_items_in_batch=items).loss
        found[name] = gradients(one, loss * scale)
    agree(found["own"], found["scaled"], 2**-8)
    with pytest.raises(AssertionError):
        agree(found["own"], found["unscaled"], 2**-8)


def test_a_frozen_head_gets_no_gradient_and_hands_one_on() -> None:
    plain, chunked = pair(build("llama"))
    for model in (plain, chunked):
        model.lm_head.weight.requires_grad_(False)
    own, ours = plain(**batch()).loss, chunked(**batch()).loss
    agree(gradients(plain, own), gradients(chunked, ours), 1e-5)
    assert chunked.lm_head.weight.grad is None


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_with_adapters_and_a_head_that_is_trained_beside_them_it_is_the_model_s_own(saved: list[str] | None) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=saved, init_lora_weights=False)
    found = []
    for is_chunked in (False, True):
        model = build("llama")
        if is_chunked:
            install_chunked_loss(model, 16)
        torch.manual_seed(2)
        adapted = get_peft_model(model, config).eval()
        loss = adapted(**batch()).loss
        found.append((loss, gradients(adapted, loss)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    agree(found[0][1], found[1][1], 1e-5)
    assert any("modules_to_save" in name for name in found[1][1]) == (saved is not None)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, chunked = pair(build("llama"))
    chunked.train().gradient_checkpointing_enable({"use_reentrant": False})
    own, ours = plain(**batch()).loss, chunked(**batch()).loss
    agree(gradients(plain, own), gradients(chunked, ours), 1e-5)


def test_a_second_backward_pass_is_refused_for_its_gradients_are_gone() -> None:
    _, chunked = pair(build("llama"))
    loss = chunked(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        loss.backward()


def test_where_nothing_is_learnt_the_loss_is_zero_and_the_gradients_too() -> None:
    _, chunked = pair(build("llama"))
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    loss = chunked(**inputs, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss.item() == 0
    assert not chunked.lm_head.weight.grad.any()


def test_no_tensor_of_a_step_is_as_large_as_the_logits() -> None:
    """Tokens x vocabulary is ten times everything else here."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
            self.elements = max([self.elements, *sizes])
            return result

    found = {}
    rows, labels = torch.randn(512, 8, requires_grad=True), torch.randint(0, 1000, (512,))
    head = torch.nn.Linear(8, 1000, bias=False)
    for tokens in (64, 512):
        with Largest() as largest:
            chunked_cross_entropy(rows, head, labels, 512, tokens).backward()
        found[tokens] = largest.elements
    assert found == {64: 64 * 1000, 512: 512 * 1000}


@pytest.fixture(scope="module")
def runs(new_run: Callable[..., Run]) -> dict[str, Run]:
    """The same training with either loss."""
    made = {}
    for loss in ("chunked", "full"):
        made[loss] = new_run(precision="bf16", loss=loss, training={"eval_strategy": "steps", "eval_steps": 4})
        assert made[loss].train() == 0, made[loss].log()
    return made


def test_a_training_goes_the_same_way_with_either_loss_and_the_audit_names_it(runs: dict[str, Run]) -> None:
    assert {name: run.audit()["loss"] for name, run in runs.items()} == {"chunked": "chunked", "full": "full"}
    assert runs["chunked"].audit()["chunked loss"] == "the model's own"
    losses = {name: [step["loss"] for step in run.steps.values()] for name, run in runs.items()}
    # bf16 rounds the gradients of the logits in another order of sums; eight steps of AdamW carry it on.
    assert losses["chunked"] == pytest.approx(losses["full"], rel=5e-3)
    assert losses["chunked"][-1] < losses["chunked"][0] - 0.2


def test_an_evaluation_has_the_same_loss(runs: dict[str, Run]) -> None:
    evaluated = {name: run.texts("evaluated", "eval_loss") for name, run in runs.items()}
    assert len(evaluated["chunked"]) == 2
    assert evaluated["chunked"] == pytest.approx(evaluated["full"], rel=5e-3)


def test_the_head_is_still_seen_by_the_audit(runs: dict[str, Run]) -> None:
    """Its module runs, chunk by chunk: so what it multiplies in is watched as with the model's own loss."""
    counts = {name: run.audit()["matrix multiplications"] for name, run in runs.items()}
    assert counts["chunked"] == counts["full"] == {"bf16": 2 * 7 + 1}


def test_a_model_whose_loss_is_another_one_is_not_trained_in_chunks(new_run: Callable[..., Run]) -> None:
    """The rule goes by the model's type; here the head's output is changed behind its back."""
    run = new_run(loss="chunked")
    run.fault = {"logits_times": 2.0}
    assert run.train() == 3
    assert "chunked loss: planned the model's own, found" in run.last_word()["problem"]
