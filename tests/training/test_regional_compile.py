"""Blocks compiled where they stand: the same numbers, the same names, one compilation for all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpt.training.regional_compile import compile_blocks, repeated_blocks
from tests.training.tiny_runs import Run, continue_from, save_base

# The compiler's front half and its graphs, without generated code: seconds in place of a minute.
BACKEND = {"torch_compile_backend": "aot_eager"}


@pytest.fixture(scope="module")
def runs(new_run: Callable[..., Run]) -> dict[str, Run]:
    made = {}
    for name, compile_ in (("compiled", "regional"), ("plain", False)):
        backend = BACKEND if compile_ else {}
        made[name] = new_run(compile=compile_, gradient_checkpointing=True, training=backend)
        assert made[name].train() == 0, made[name].log()
    return made


def test_compiled_blocks_train_the_same_model(runs: dict[str, Run]) -> None:
    assert {name: run.audit()["compile"] for name, run in runs.items()} == {"compiled": "regional", "plain": False}
    losses = {name: [step["loss"] for step in run.steps.values()] for name, run in runs.items()}
    # aot_eager takes the operators apart; in fp32 what they come to differs in the last bits.
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5)


def test_a_checkpoint_of_compiled_blocks_has_the_model_s_own_names(runs: dict[str, Run]) -> None:
    assert runs["compiled"].weights().keys() == runs["plain"].weights().keys()


def test_a_resumed_run_with_compiled_blocks_is_the_uninterrupted_one(
    runs: dict[str, Run], new_run: Callable[..., Run]
) -> None:
    whole = runs["compiled"]
    resumed = continue_from(whole, "checkpoint-4", lambda: new_run(compile="regional", training=BACKEND))
    assert {step: resumed.trajectory[step] for step in range(5, 9)} == {
        step: whole.trajectory[step] for step in range(5, 9)
    }


def test_the_blocks_share_one_compilation_and_lengths_that_vary_need_no_other(tmp_path: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"), dtype=torch.float32).train()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    assert compile_blocks(model, varies=True, backend=counting) == len(model.model.layers) == 2
    for length in (8, 12, 17, 23):
        tokens = torch.randint(0, model.config.vocab_size, (2, length))
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(graphs) == 1


def test_adapters_lie_within_the_blocks(tmp_path: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"), dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tokens = torch.randint(0, model.config.vocab_size, (2, 16))
    plain = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert len(repeated_blocks(adapted)) == 2
    compile_blocks(adapted, varies=False, backend="eager")
    loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    assert all(weight.grad is not None for name, weight in adapted.named_parameters() if "lora_" in name)
