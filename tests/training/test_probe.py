"""What is predicted of a layer in a lower format: the probe's numbers against plain ones, and against the truth."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mpt.hardware.specs import parse_machine
from mpt.measuring.precision_policy import CHANNEL_FLOOR_DB, CHANNEL_QUANTILE, change_size
from mpt.planning.model_facts import learn_model_facts
from mpt.planning.modules import learn_modules
from mpt.planning.plan import resolve
from mpt.training.precision.probe import Probe, float8_twin
from mpt.training.sensitivity import Calibration
from tests.training.tiny_runs import tiny_recipe

FORMATS = ("bf16", "fp8")


class Two(nn.Module):
    """A linear layer with a bias, and GPT-2's transposed one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 48)
        self.second = Conv1D(16, 48)
        nn.init.normal_(self.second.bias)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(source)))


def batches_of(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 32, generator=generator) for _ in range(count)]


def probed(model: nn.Module, batches: list[torch.Tensor], wanted: dict[str, Any], **options: Any) -> dict[str, Any]:
    probe = Probe(model, wanted, fp8_recipe="tensorwise", emulate_fp8=True, **options)
    with probe:
        for batch in batches:
            probe.begin_batch()
            model(batch).square().mean().backward()
    return probe.to_json(CHANNEL_QUANTILE)


@pytest.mark.parametrize(("name", "kind"), [("first", "bf16"), ("first", "fp8"), ("second", "bf16")])
def test_the_numbers_are_those_of_the_products_done_by_hand(name: str, kind: str) -> None:
    model, batches = Two(), batches_of(3)
    seen = probed(model, batches, {"first": FORMATS, "second": ("bf16",)})[name]["formats"][kind]
    layer = model.get_submodule(name)
    weight = layer.weight if name == "first" else layer.weight.t()
    signal = {"output": 0.0, "input_gradient": 0.0, "weight_gradient": 0.0}
    error: dict[str, Any] = dict(signal)
    changes = []
    for batch in batches:
        source = batch if name == "first" else torch.tanh(model.first(batch))
        source = source.detach().flatten(0, 1).requires_grad_()
        exact = functional.linear(source, weight, layer.bias)
        after = exact if name == "second" else model.second(torch.tanh(exact))
        (gradient,) = torch.autograd.grad(after.square().mean(), exact, retain_graph=True)
        ours = [exact, *torch.autograd.grad(exact, (source, layer.weight), gradient)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lower: Any = float8_twin(layer, "tensorwise", emulate=True) if kind == "fp8" else layer
            theirs = lower(source)
        rough = [theirs, *torch.autograd.grad(theirs, (source, layer.weight), gradient.to(theirs.dtype))]
        if name == "second":  # columns are the layer's inputs
            ours[2], rough[2] = ours[2].t(), rough[2].t()
        for product, one, other in zip(signal, ours, rough, strict=True):
            signal[product] = signal[product] + one.detach().double().square().sum(0)
            error[product] = error[product] + (other.double() - one.double()).detach().square().sum(0)
        changes.append(float((gradient * (theirs.float() - exact)).detach().sum()))
    # bf16's products are summed in another order by autograd; the loss change is a sum of terms that cancel.
    assert seen["loss_changes"] == pytest.approx(changes, rel=0.02, abs=1e-7)
    for product, energies in signal.items():
        channels = (10 * torch.log10(energies / error[product])).sort().values
        assert seen["energy_db"][product] == pytest.approx(
            float(10 * torch.log10(energies.sum() / error[product].sum())), abs=0.1
        )
        assert seen["channel_db"][product] == pytest.approx(float(channels[len(channels) // 10]), abs=0.5)


def test_one_huge_channel_of_the_input_shows_in_the_channels_and_in_what_becomes_zero() -> None:
    model, batches = Two(), [batch / 10 for batch in batches_of(2)]
    healthy = probed(model, batches, {"first": ("fp8",)})["first"]["formats"]["fp8"]
    with torch.no_grad():
        model.first.weight[:, 3] = 0.0
    for batch in batches:
        batch[..., 3] = 3e4
    fragile = probed(model, batches, {"first": ("fp8",)})["first"]["formats"]["fp8"]
    assert healthy["channel_db"]["weight_gradient"] > CHANNEL_FLOOR_DB > 10 > fragile["channel_db"]["weight_gradient"]
    assert fragile["energy_db"]["weight_gradient"] > 20  # which the huge channel alone makes
    assert fragile["underflow"]["input"] > 0.3 > 0.01 > healthy["underflow"]["input"]


def test_frozen_weights_have_no_gradient_to_judge() -> None:
    model, batches = Two(), batches_of(2)
    whole = probed(model, batches, {"first": FORMATS, "second": ("bf16",)})
    model.requires_grad_(False)
    for batch in batches:
        batch.requires_grad_()
    frozen = probed(model, batches, {"first": FORMATS, "second": ("bf16",)}, is_frozen=True)
    for name, kind in (("first", "bf16"), ("first", "fp8"), ("second", "bf16")):
        there, here = (seen[name]["formats"][kind] for seen in (whole, frozen))
        assert set(here["energy_db"]) == set(here["channel_db"]) == {"output", "input_gradient"}
        assert here["loss_changes"] == pytest.approx(there["loss_changes"], rel=1e-4, abs=1e-9)
        assert here["energy_db"].items() <= there["energy_db"].items()


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """A small Llama, trained for a moment on the batches that it is measured on."""
    return make_calibration(tmp_path_factory.mktemp("calibration"))


def make_calibration(folder: Path, **options: Any) -> Calibration:
    recipe = tiny_recipe(micro_batch_size=4)
    plan = resolve(recipe, parse_machine("cpu"), learn_model_facts(recipe), name="tiny", modules=learn_modules(recipe))
    made = Calibration(plan, folder, 4, **options)
    trained = [weight for weight in made.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(20):
        made.model(**made.batches[step % 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


def measure(calibration: Calibration, batches: list[Any]) -> dict[str, Any]:
    before, calibration.batches = calibration.batches, batches
    try:
        return calibration.measure(
            {
                "layers": dict.fromkeys(layers_of(calibration), FORMATS),
                "sizes": dict.fromkeys(layers_of(calibration), (64, 64)),
                "fp8": {"recipe": "tensorwise", "emulated": True},
                "timed": [],
                "channel_quantile": CHANNEL_QUANTILE,
            }
        )["layers"]
    finally:
        calibration.batches = before


def layers_of(calibration: Calibration) -> list[str]:
    names = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj")
    return [name for name, _ in calibration.model.named_modules() if name in names]


def predicted(layers: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (name, kind): change_size(layers[name]["formats"][kind]["loss_changes"]) for name in layers for kind in FORMATS
    }


def test_the_prediction_is_a_batch_s_own_however_many_are_measured(calibration: Calibration) -> None:
    batch = calibration.batches[0]
    once, four = (predicted(measure(calibration, [batch] * count)) for count in (1, 4))
    assert len(once) == 6
    for key, change in once.items():
        assert four[key] == pytest.approx(change, rel=1e-4)


def test_the_prediction_is_near_what_the_layer_alone_does_to_the_loss(calibration: Calibration) -> None:
    for (name, kind), change in predicted(measure(calibration, calibration.batches)).items():
        truth = change_size([after - before for before, after in losses_with(calibration, name, kind)])
        # To first order: terms that cancel leave the second order to see. Single precision resolves a loss to 5e-7.
        assert change == pytest.approx(truth, rel=0.25, abs=2e-6), (name, kind)
        assert change > 1e-6


def losses_with(calibration: Calibration, name: str, kind: str) -> Iterator[tuple[float, float]]:
    """Give the loss of each batch in fp32, and with this one layer in another format."""
    layer = calibration.model.get_submodule(name)
    lower: Any = float8_twin(layer, "tensorwise", emulate=True) if kind == "fp8" else layer
    plain = type(layer).forward

    def lowered(source: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (lower(source) if kind == "fp8" else plain(layer, source)).float()

    with torch.no_grad():
        for batch in calibration.batches:
            before = float(calibration.model(**batch).loss)
            layer.forward = lowered
            try:
                yield before, float(calibration.model(**batch).loss)
            finally:
                del layer.forward


def test_with_adapters_the_layers_weights_get_no_gradient_and_the_comparison_still_has_one(tmp_path: Path) -> None:
    frozen = make_calibration(tmp_path, is_frozen=True)
    layers = measure(frozen, frozen.batches)
    assert set(frozen.gradients) == {"model.embed_tokens.weight"}
    for seen in layers.values():
        assert set(seen["formats"]["fp8"]["energy_db"]) == {"output", "input_gradient"}
    answer = frozen.verify({"plan": frozen.plan.to_json()})
    assert answer["gradient_cosine"] == pytest.approx(1.0)
    assert math.isclose(change_size(answer["loss_changes"]), 0.0, abs_tol=1e-6)
