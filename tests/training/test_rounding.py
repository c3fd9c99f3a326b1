"""Rounding bf16 weights in the update: unbiased, repeatable, and worth it."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpt.planning.moments import moment_error, moments_fit_bf16
from mpt.training.precision.pure_bf16 import PureBf16AdamW
from mpt.training.precision.rounding import BF16_MAX, draw_bits, round_stochastically, stream_seed
from tests.training.tiny_runs import LLAMA

SAMPLES = 1_000_000
ULP_OF_1 = 2.0**-7  # above 1; below it is half of that
LARGEST_FP32 = torch.finfo(torch.float32).max
MASTER = {"master_weights": True}


def bits(count: int, seed: int = 0) -> torch.Tensor:
    return draw_bits(torch.Size((count,)), torch.Generator().manual_seed(seed))


def weight_of(values: torch.Tensor | list[float], dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(values).to(dtype, copy=True))


def gradient(step: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)


def take_steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Step with gradients that depend on the step's number and the weight alone."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for step in range(first, last + 1):
        for place, weight in enumerate(weights):
            weight.grad = gradient(1000 * place + step, tuple(weight.shape), weight.dtype)
        optimizer.step()


# --- the rounding


@pytest.mark.parametrize(
    "value",
    [
        1.0 + 0.3 * ULP_OF_1,
        -(1.0 + 0.3 * ULP_OF_1),
        1.0 - 2.0**-20,  # nearly at the upper neighbour
        3.14159274,
        -1e-3,
        1.1e-38,  # subnormal, its upper neighbour too
        -5e-41,  # below the smallest bf16, 2**-133
        -3.3e38,  # near the largest
    ],
)
def test_the_mean_of_many_roundings_is_the_value(value: float) -> None:
    exact = torch.full((SAMPLES,), value)
    rounded = round_stochastically(exact, bits(SAMPLES)).double()
    below, above = rounded.min().item(), rounded.max().item()
    true = exact[0].double().item()
    assert below < true < above
    spacing = above - below
    assert rounded.unique().numel() == 2
    # The standard error of the share of a coin of probability p; five of them are missed once in two million.
    up = (true - below) / spacing
    assert abs(rounded.mean().item() - true) / spacing < 5 * math.sqrt(up * (1 - up) / SAMPLES)


def test_the_two_neighbours_are_those_of_bf16() -> None:
    exact = torch.randn(SAMPLES)
    rounded = round_stochastically(exact, bits(SAMPLES)).float()
    towards_zero = (exact.view(torch.int32) & -65536).view(torch.float32)
    away_from_zero = (towards_zero.view(torch.int32) + 65536).view(torch.float32)
    assert ((rounded == towards_zero) | (rounded == away_from_zero)).all()


@pytest.mark.parametrize("random", [0, 1, 32768, 65535])
def test_what_bf16_can_hold_stays(random: int) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # every bf16 there is
    every = patterns.view(torch.bfloat16)
    rounded = round_stochastically(every.float(), torch.full((2**16,), random, dtype=torch.int32))
    is_nan = every.isnan()
    assert rounded[is_nan].isnan().all()
    assert torch.equal(rounded[~is_nan].view(torch.int16), patterns[~is_nan])  # -0.0 and the infinities too


@pytest.mark.parametrize("random", [0, 65535])
def test_infinities_and_nans_of_any_pattern_stay_and_no_finite_value_becomes_one(random: int) -> None:
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    large = torch.tensor([BF16_MAX, LARGEST_FP32, 3.395e38])
    values = torch.cat([nans, torch.tensor([torch.inf, -torch.inf]), large, -large])
    rounded = round_stochastically(values, torch.full_like(values, random, dtype=torch.int32))
    assert rounded[:4].isnan().all()
    assert rounded[4:6].tolist() == [math.inf, -math.inf]
    assert rounded[6:].tolist() == [BF16_MAX] * 3 + [-BF16_MAX] * 3


def test_the_bits_are_uniform_and_follow_from_seed_shard_step_and_index() -> None:
    drawn = bits(SAMPLES)
    assert (drawn.min().item(), drawn.max().item()) == (0, 65535)
    assert abs(drawn.double().mean().item() - 32767.5) < 5 * 65536 / math.sqrt(12 * SAMPLES)
    place = {"seed": 3, "shard": 0, "step": 1, "index": 0}
    first = bits(64, stream_seed(**place))
    assert torch.equal(first, bits(64, stream_seed(**place)))
    for key in place:
        assert not torch.equal(first, bits(64, stream_seed(**place | {key: place[key] + 1})))


# --- AdamW around it


def test_fp32_weights_are_updated_as_torchs_adamw_does() -> None:
    start = gradient(99, (40, 30), torch.float32)
    ours, torchs = weight_of(start, torch.float32), weight_of(start.clone(), torch.float32)
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    pure = PureBf16AdamW([ours], rounding="stochastic", state_dtype=torch.bfloat16, **options)
    reference = torch.optim.AdamW([torchs], **options)
    for step in range(30):
        ours.grad = gradient(step, (40, 30), torch.float32)
        torchs.grad = ours.grad.clone()
        pure.step()
        reference.step()
    assert {pure.state[ours][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    # torch's loop and its fused kernel, which ours is, order their operations differently.
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_master_weights_follow_torchs_fp32_run_and_the_weights_are_their_rounding(grad_dtype: torch.dtype) -> None:
    start = gradient(99, (40, 30))
    ours, torchs = weight_of(start), weight_of(start.float(), torch.float32)
    pure = PureBf16AdamW([ours], lr=1e-3, weight_decay=0.1, master_weights=True)
    reference = torch.optim.AdamW([torchs], lr=1e-3, weight_decay=0.1, fused=True)
    ours.grad_dtype = None  # any: torch would refuse another than the weight's
    for step in range(50):
        ours.grad = gradient(step, (40, 30), grad_dtype)
        torchs.grad = ours.grad.float()
        pure.step()
        reference.step()
    assert torch.equal(pure.state[ours]["master"], torchs)
    assert torch.equal(ours, torchs.bfloat16())
    assert not torch.equal(ours.float(), torchs)


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}, {"rounding": "kahan"}, MASTER], ids=str)
def test_a_large_or_an_oddly_laid_out_weight_is_updated_like_a_plain_one(options: dict[str, Any]) -> None:
    rows, columns = 1000, 401  # more than is updated at a time
    start = gradient(99, (rows, columns))
    plain, turned = weight_of(start), nn.Parameter(start.t().contiguous().t())
    assert not turned.is_contiguous()
    for weight in (plain, turned):
        take_steps(PureBf16AdamW([weight], lr=1e-2, **options), 1, 3)
    assert torch.equal(plain, turned)
    # Each element as if it were alone, but for its own random bits.
    if options.get("rounding") != "stochastic":
        ends = weight_of(torch.stack([start.view(-1)[0], start.view(-1)[-1]]))
        optimizer = PureBf16AdamW([ends], lr=1e-2, **options)
        for step in (1, 2, 3):
            ends.grad = gradient(step, (rows, columns)).view(-1)[[0, -1]]
            optimizer.step()
        assert torch.equal(ends, plain.view(-1)[[0, -1]])


def test_a_weight_without_a_gradient_and_an_empty_one_are_left_alone() -> None:
    silent, empty, moved = weight_of([1.0]), weight_of([]), weight_of([1.0])
    optimizer = PureBf16AdamW([silent, empty, moved], lr=0.1, rounding="stochastic")
    empty.grad, moved.grad = torch.zeros_like(empty), torch.ones_like(moved)
    optimizer.step()
    assert silent.item() == 1.0
    assert moved.item() != 1.0
    assert silent not in optimizer.state


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "up"},
        {"state_dtype": torch.float16},
        {"master_weights": True, "rounding": "kahan"},
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
    ],
    ids=str,
)
def test_an_option_that_means_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|master weights"):
        PureBf16AdamW([weight_of([1.0])], **options)


def test_a_weight_in_another_format_is_refused() -> None:
    with pytest.raises(TypeError, match="float16"):
        PureBf16AdamW([weight_of([1.0], torch.float16)])


# --- small updates


def small_updates(**options: Any) -> torch.Tensor:
    """2000 updates of 1e-4 on 4096 weights of 1: exactly 0.8. A constant gradient makes Adam's update its rate."""
    weight = weight_of(torch.ones(4096))
    optimizer = PureBf16AdamW([weight], lr=1e-4, weight_decay=0.0, **options)
    weight.grad = torch.ones_like(weight)
    for _ in range(2000):
        optimizer.step()
    return weight.detach().double()


def test_updates_below_half_a_unit_vanish_when_rounded_to_nearest() -> None:
    assert (small_updates() == 1.0).all()


def test_small_updates_arrive_on_average_when_rounded_stochastically() -> None:
    arrived = small_updates(rounding="stochastic")
    # Each of n updates d of a weight whose neighbours are u apart adds a variance of d * (u - d); u is 2**-8 below 1.
    spread = math.sqrt(2000 * 1e-4 * (2**-8 - 1e-4))
    assert arrived.std().item() == pytest.approx(spread, rel=0.1)
    assert abs(arrived.mean().item() - 0.8) < 5 * spread / math.sqrt(4096)


@pytest.mark.parametrize("options", [{"rounding": "kahan"}, MASTER], ids=str)
def test_small_updates_arrive_with_compensation_or_master_weights(options: dict[str, Any]) -> None:
    # Half a unit of a bf16 near 0.8.
    assert small_updates(**options) == pytest.approx(torch.full((4096,), 0.8), abs=2**-9)


@pytest.mark.parametrize(
    ("beta2", "state_dtype", "kept"),
    [
        (0.999, torch.bfloat16, 1.0),
        (0.995, torch.bfloat16, 0.0),
        (0.95, torch.bfloat16, 0.0),
        (0.999, torch.float32, 0.999**5000),
    ],
)
def test_a_bf16_second_moment_keeps_what_it_should_forget(beta2: float, state_dtype: torch.dtype, kept: float) -> None:
    weight = weight_of([1.0])
    optimizer = PureBf16AdamW([weight], lr=0.0, betas=(0.9, beta2), state_dtype=state_dtype)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.state[weight]["exp_avg_sq"].fill_(1.0)
    for _ in range(5000):
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].item() == pytest.approx(kept, rel=1e-3, abs=1e-9)


# Constants at both ends and in the middle of a binade: how large a unit is against them differs by two.
CONSTANTS = [2.0 ** (place / 32) for place in range(32)]


def settle(beta: float, start: float, *, first: bool = False) -> torch.Tensor:
    """Let bf16 moments of constants settle from `start` times their average; give them as shares of it."""
    weight = weight_of(torch.ones(len(CONSTANTS)))
    average = torch.tensor(CONSTANTS)
    gradients = average if first else average.sqrt()
    weight.grad_dtype = None  # any: bf16 would round the constants themselves
    weight.grad = gradients
    betas = (beta, 0.5) if first else (0.5, beta)
    optimizer = PureBf16AdamW([weight], lr=0.0, betas=betas, state_dtype=torch.bfloat16)
    optimizer.step()
    moment = optimizer.state[weight]["exp_avg" if first else "exp_avg_sq"]
    moment.copy_(start * average)
    for _ in range(1200):
        optimizer.step()
    settled = moment.clone()
    for _ in range(5):
        optimizer.step()
    assert torch.equal(moment, settled)  # and there it stays
    return moment.float() / average


@pytest.mark.parametrize("first", [False, True], ids=["second moment", "first moment"])
@pytest.mark.parametrize("beta", [0.9, 0.95, 0.98, 0.99])
def test_a_bf16_moment_stops_short_of_its_average_by_what_the_rule_says(beta: float, first: bool) -> None:
    from_above, from_below = settle(beta, 100.0, first=first), settle(beta, 0.01, first=first)
    bound = moment_error(beta)
    assert from_above.min() >= 1 and from_below.max() <= 1
    assert 0.85 * bound < from_above.max() - 1 <= bound  # the bound is of the worst place in a binade
    assert 0.85 * bound / (1 + 2 * bound) < 1 - from_below.min() <= bound
    assert moments_fit_bf16(0.9, beta) is (from_above.max() <= 1.1).item()


@pytest.mark.parametrize("start", [100.0, 0.01])
def test_an_fp32_moment_reaches_its_average(start: float) -> None:
    weight = weight_of([1.0])
    weight.grad = torch.full_like(weight, 0.5)
    optimizer = PureBf16AdamW([weight], lr=0.0, betas=(0.9, 0.99))
    optimizer.step()
    optimizer.state[weight]["exp_avg_sq"].fill_(0.25 * start)
    for _ in range(3000):
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].item() == pytest.approx(0.25, rel=1e-3)


# --- randomness


def train_alone(shard: int = 0, global_seed: int = 0, seed: int = 7) -> torch.Tensor:
    torch.manual_seed(global_seed)
    weight = weight_of(gradient(99, (64, 64)))
    take_steps(PureBf16AdamW([weight], lr=1e-4, rounding="stochastic", shard=shard, seed=seed), 1, 20)
    return weight.detach()


def test_replicas_round_alike_whatever_their_random_states_and_shards_do_not() -> None:
    first = train_alone(global_seed=0)
    assert torch.equal(first, train_alone(global_seed=1))
    assert not torch.equal(first, train_alone(shard=1))
    assert not torch.equal(first, train_alone(seed=8))


def test_an_update_leaves_torchs_random_state_as_it_was() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weight = weight_of(torch.ones(64))
    take_steps(PureBf16AdamW([weight], rounding="stochastic"), 1, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_replicas_drift_apart_under_torchaos_stochastic_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ours is for. torchao would compile its step for a minute; the arithmetic is the same without."""
    low_precision = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def replica(global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        weight = weight_of(gradient(99, (64, 64)))
        optimizer = low_precision._AdamW([weight], lr=1e-4, bf16_stochastic_round=True)
        take_steps(optimizer, 1, 5)
        assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.bfloat16
        return weight.detach()

    assert torch.equal(replica(0), replica(0))
    assert not torch.equal(replica(0), replica(1))


def test_two_weights_with_the_same_numbers_are_rounded_differently_even_when_stepped_one_at_a_time() -> None:
    """DeepSpeed lends the optimizer's groups one partition at a time, always in the same place."""
    first, second = weight_of(torch.ones(256)), weight_of(torch.ones(256))
    optimizer = PureBf16AdamW([first], lr=1e-3, rounding="stochastic")
    for weight in (first, second):
        optimizer.param_groups[0]["params"] = [weight]
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert not torch.equal(first, second)


# --- resuming


def mixed_weights() -> list[nn.Parameter]:
    """Two bf16 weights and an fp32 island."""
    return [weight_of(gradient(97, (33, 7))), weight_of(torch.ones(50), torch.float32), weight_of(torch.ones(50))]


EVERY_KIND: list[dict[str, Any]] = [
    {"rounding": "nearest"},
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    {"rounding": "kahan"},
    {"master_weights": True},
]


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_a_run_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole = mixed_weights()
    optimizer = PureBf16AdamW(whole, lr=1e-3, **options)
    take_steps(optimizer, 1, 5)
    torch.save({"weights": [w.detach() for w in whole], "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    take_steps(optimizer, 6, 10)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = [nn.Parameter(weight) for weight in saved["weights"]]
    continued = PureBf16AdamW(resumed, lr=9.9, **options)
    continued.load_state_dict(saved["optimizer"])
    torch.manual_seed(123)
    take_steps(continued, 6, 10)
    for first, second in zip(whole, resumed, strict=True):
        assert torch.equal(first, second)
        assert optimizer.state[first].keys() == continued.state[second].keys()
        for key, value in optimizer.state[first].items():
            after = continued.state[second][key]
            same = (
                torch.equal(value, after) and value.dtype == after.dtype if torch.is_tensor(value) else value == after
            )
            assert same, key


def test_a_state_of_other_options_is_refused() -> None:
    saved = PureBf16AdamW([weight := weight_of([1.0])], rounding="kahan")
    take_steps(saved, 1, 1)
    with pytest.raises(ValueError, match="compensation"):
        PureBf16AdamW([weight], rounding="nearest").load_state_dict(saved.state_dict())


# --- a model


class Sentences(torch.utils.data.Dataset):
    """Counting in steps of one to seven, modulo 512: learnable."""

    def __len__(self) -> int:
        return 160

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(32) * (1 + place % 7) + 13 * place) % 512
        return {"input_ids": tokens, "labels": tokens}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", vocab_size=512, **shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def train(llama: nn.Module, folder: Path, save_steps: int = 0, resume: str | None = None, **options: Any) -> Any:
    """Train a copy for twenty steps under transformers' Trainer at a rate of 1e-5; give the Trainer."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        seed=0,
    )
    choice = (PureBf16AdamW, {"lr": 1e-5, "weight_decay": 0.0, "betas": (0.9, 0.95), **options})
    trainer = Trainer(copy.deepcopy(llama), arguments, train_dataset=Sentences(), optimizer_cls_and_kwargs=choice)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_llama_in_pure_bf16_moves_as_with_master_weights_unless_rounded_to_nearest(
    llama: nn.Module, tmp_path: Path
) -> None:
    start = torch.cat([weight.detach().view(-1).double() for weight in llama.parameters()])

    def moved(**options: Any) -> torch.Tensor:
        trainer = train(llama, tmp_path, **options)
        state = trainer.optimizer.optimizer.state
        ends = [state[weight].get("master", weight).detach() for weight in trainer.model.parameters()]
        return torch.cat([end.view(-1).double() for end in ends]) - start

    truth = moved(master_weights=True)
    runs = {rounding: moved(rounding=rounding) for rounding in ("nearest", "stochastic", "kahan")}
    # How much of the true movement is there: the projection on it.
    arrived = {name: (run @ truth / (truth @ truth)).item() for name, run in runs.items()}
    assert arrived["nearest"] < 0.2
    assert arrived["stochastic"] == pytest.approx(1.0, abs=0.03)
    assert 0.85 < arrived["kahan"] < 1.03  # the rest waits in the compensation
    changed = {name: (run != 0).double().mean().item() for name, run in runs.items()}
    assert changed["stochastic"] > 3 * changed["nearest"]
    assert changed["kahan"] > 3 * changed["nearest"]


@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"rounding": "kahan"}, MASTER], ids=str)
def test_a_trainer_resumes_it_bit_for_bit(options: dict[str, Any], llama: nn.Module, tmp_path: Path) -> None:
    whole = train(llama, tmp_path, save_steps=10, **options)
    resumed = train(llama, tmp_path, resume=str(tmp_path / "checkpoint-10"), **options)
    for first, second in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second)
