"""Which layers are fp8, by which library, and what is refused: decisions without torch."""

import pytest

from mpt.errors import ExitCode, MptError, UnsupportedError
from mpt.planning.float8 import (
    RECIPES,
    check_backend,
    check_some_converted,
    choose_float8_layers,
    compiles,
    pays,
    recomputes,
    to_te_recipe,
)
from mpt.planning.modules import ModuleShape

LLAMA_BLOCK = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}


def linear(name: str, k: int = 64, n: int = 64, kind: str = "linear", is_head: bool = False) -> ModuleShape:
    return ModuleShape(name, kind, k, n, k * n, is_head)


def llama(blocks: int) -> list[ModuleShape]:
    """The modules of a small Llama in the model's order."""
    modules = [linear("model.embed_tokens", 512, 64, "embedding")]
    for block in range(blocks):
        modules += [linear(f"model.layers.{block}.{name}", *size) for name, size in LLAMA_BLOCK.items()]
        modules.append(linear(f"model.layers.{block}.input_layernorm", 0, 0, "other"))
    return [*modules, linear("lm_head", 64, 512, is_head=True)]


def in_fp8(modules: list[ModuleShape], recipe: str = "tensorwise", **keywords: object) -> list[str]:
    chosen = choose_float8_layers(modules, recipe=recipe, **keywords)  # type: ignore[arg-type]
    return [name for name, (is_fp8, _) in chosen.items() if is_fp8]


def why(module: ModuleShape, recipe: str = "tensorwise", **keywords: object) -> tuple[bool, str]:
    keywords = {"keep_first": 0, "keep_last": 0} | keywords
    return choose_float8_layers([module], recipe=recipe, **keywords)[module.name]  # type: ignore[arg-type]


def test_every_linear_layer_is_judged_and_nothing_else() -> None:
    chosen = choose_float8_layers(llama(2), recipe="tensorwise")
    blocks = [f"model.layers.{block}.{name}" for block in range(2) for name in LLAMA_BLOCK]
    assert list(chosen) == [*blocks, "lm_head"]
    assert all(reason for _, reason in chosen.values())


def test_by_default_the_first_and_the_last_linear_layer_and_the_head_are_kept() -> None:
    modules = llama(2)
    chosen = choose_float8_layers(modules, recipe="tensorwise")
    kept = {name: reason for name, (is_fp8, reason) in chosen.items() if not is_fp8}
    assert set(kept) == {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    assert "output head" in kept["lm_head"]
    assert "keep_first" in kept["model.layers.0.self_attn.q_proj"]
    assert "keep_last" in kept["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("first", "last", "left"),
    [(0, 0, 8), (0, 1, 7), (4, 0, 4), (3, 4, 1), (4, 4, 0), (5, 5, 0), (100, 0, 0), (0, 8, 0), (0, 10, 0)],
)
def test_first_and_last_count_linear_layers_of_the_blocks(first: int, last: int, left: int) -> None:
    names = [f"model.layers.{block}.{name}" for block in range(2) for name in LLAMA_BLOCK]
    expected = names[first : len(names) - last] if last <= len(names) else []
    assert in_fp8(llama(2), keep_first=first, keep_last=last) == expected
    assert len(expected) == left


def test_a_layer_outside_the_blocks_is_neither_first_nor_last() -> None:
    modules = [
        linear("embed.project"),
        linear("blocks.0.a"),
        linear("blocks.0.b"),
        linear("blocks.1.a"),
        linear("pool"),
    ]
    assert in_fp8(modules) == ["embed.project", "blocks.0.b", "pool"]


@pytest.mark.parametrize(
    ("k", "n", "recipe", "is_fp8", "says"),
    [
        (16, 16, "tensorwise", True, "K=16, N=16"),
        (100, 64, "tensorwise", False, "K=100 is no multiple of 16, which the fp8 kernels need"),
        (64, 15, "tensorwise", False, "N=15 is no multiple of 16, which the fp8 kernels need"),
        (64, 2, "rowwise", False, "N=2 is no multiple of 16, which the fp8 kernels need"),
        (48, 64, "mxfp8", False, "K=48 is no multiple of 32, which the mxfp8 blocks need"),
        (64, 96, "mxfp8", True, "K=64, N=96"),
    ],
)
def test_sizes_that_the_kernels_cannot_take_are_kept(k: int, n: int, recipe: str, is_fp8: bool, says: str) -> None:
    assert why(linear("a", k, n), recipe) == (is_fp8, says)


def test_a_conv1d_is_never_fp8() -> None:
    is_fp8, reason = why(linear("transformer.h.0.attn.c_attn", 64, 192, "conv1d"))
    assert not is_fp8
    assert "Conv1D" in reason


@pytest.mark.parametrize(("name", "is_fp8"), [("h.0.mlp.gate", False), ("h.0.router", False), ("h.0.gate_proj", True)])
def test_a_router_is_kept(name: str, is_fp8: bool) -> None:
    assert why(linear(name))[0] is is_fp8


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        ("model.layers.0", [f"model.layers.0.{name}" for name in LLAMA_BLOCK]),
        ("*.mlp", [f"model.layers.{block}.mlp.{name}" for block in range(2) for name in ("up_proj", "down_proj")]),
        ("*.k_proj", [f"model.layers.{block}.self_attn.k_proj" for block in range(2)]),
    ],
)
def test_a_pattern_keeps_a_layer_or_all_below_a_module(pattern: str, kept: list[str]) -> None:
    chosen = choose_float8_layers(llama(2), recipe="rowwise", keep_patterns=[pattern], keep_first=0, keep_last=0)
    assert [name for name, (is_fp8, _) in chosen.items() if not is_fp8] == [*kept, "lm_head"]
    assert all(pattern in chosen[name][1] for name in kept)


@pytest.mark.parametrize("pattern", ["mlp", "model.layers.2", "*.input_layernorm", "*.Mlp", ""])
def test_a_pattern_that_matches_no_linear_layer_is_an_error(pattern: str) -> None:
    with pytest.raises(MptError, match="matches no linear layer"):
        choose_float8_layers(llama(2), recipe="tensorwise", keep_patterns=[pattern])


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("*.k_porj", "*.k_proj"), ("*.MLP", "*.mlp"), ("up_proj", "*.up_proj"), ("lm_haed", "lm_head"), ("zzz", None)],
)
def test_a_pattern_that_keeps_nothing_lists_near_names(pattern: str, near: str | None) -> None:
    with pytest.raises(MptError, match="matches no linear layer") as raised:
        choose_float8_layers(llama(2), recipe="tensorwise", keep_patterns=[pattern])
    assert (f"did you mean {near}" in raised.value.problem) is (near is not None)


def test_the_shape_rule_applies_only_when_asked_for() -> None:
    small = linear("layers.0.a", 4096, 1024)
    assert why(small)[0]
    is_fp8, reason = why(small, auto_filter=True)
    assert not is_fp8
    assert reason == "K=4096, N=1024 is too small to gain from tensorwise (auto_filter)"


@pytest.mark.parametrize("recipe", ["rowwise_with_gw_hp", "delayed", "mxfp8"])
def test_a_recipe_without_a_published_shape_rule_is_not_filtered(recipe: str) -> None:
    with pytest.raises(MptError, match="no published rule"):
        choose_float8_layers(llama(1), recipe=recipe, auto_filter=True)


@pytest.mark.parametrize(
    ("recipe", "k", "n", "gains"),
    [
        ("tensorwise", 4096, 1024, False),
        ("tensorwise", 4112, 1024, True),
        ("tensorwise", 4096, 1040, True),
        ("rowwise", 8192, 2048, False),
        ("rowwise", 1024, 8192, False),
        ("rowwise", 2048, 4096, False),
        ("rowwise", 2064, 4096, True),
        ("rowwise", 2048, 4112, True),
    ],
)
def test_the_shape_rule_at_its_edges(recipe: str, k: int, n: int, gains: bool) -> None:
    assert pays(recipe, k, n) is gains


def test_a_model_of_which_nothing_would_be_fp8_is_refused_with_the_reasons() -> None:
    gpt2 = [linear(f"transformer.h.{block}.mlp.c_fc", 64, 256, "conv1d") for block in range(3)]
    with pytest.raises(MptError, match="3 layers: a Conv1D"):
        check_some_converted(choose_float8_layers([*gpt2, linear("lm_head", is_head=True)], recipe="tensorwise"))
    with pytest.raises(MptError, match="it has none"):
        check_some_converted({})
    check_some_converted(choose_float8_layers(llama(1), recipe="tensorwise"))


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_a_recipe_that_transformer_engine_lacks_names_those_that_it_has(recipe: str) -> None:
    with pytest.raises(MptError) as raised:
        to_te_recipe(recipe)
    assert raised.value.exit_code is ExitCode.USAGE
    assert all(name in raised.value.remedy for name in ("delayed", "tensorwise", "mxfp8", "backend torchao"))


def test_recipes_translate_into_transformer_engine_classes() -> None:
    assert {name: to_te_recipe(name) for name in RECIPES["transformer_engine"]} == {
        "delayed": "DelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "mxfp8": "MXFP8BlockScaling",
    }


H100 = {"is_cpu": False, "is_cuda": True, "emulated": False}
A100 = H100 | {"emulated": True}
CPU = {"is_cpu": True, "is_cuda": False, "emulated": True}
BOTH = frozenset({"torchao", "transformer_engine"})


@pytest.mark.parametrize(
    ("backend", "recipe", "machine", "packages"),
    [(backend, recipe, H100, BOTH) for backend, recipes in RECIPES.items() for recipe in recipes]
    + [("torchao", recipe, machine, frozenset({"torchao"})) for recipe in RECIPES["torchao"] for machine in (A100, CPU)]
    + [("transformer_engine", "delayed", H100, None), ("torchao", "rowwise", CPU, None)],
)
def test_what_a_backend_can_do_passes(
    backend: str, recipe: str, machine: dict[str, bool], packages: frozenset[str] | None
) -> None:
    check_backend(backend, recipe, packages=packages, **machine)


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_what_torchao_lacks_is_a_wrong_recipe_even_where_it_is_not_installed(recipe: str) -> None:
    with pytest.raises(MptError) as raised:
        check_backend("torchao", recipe, packages=frozenset(), **H100)
    assert raised.value.exit_code is ExitCode.USAGE
    assert "transformer_engine" in raised.value.remedy


@pytest.mark.parametrize(
    ("backend", "machine", "packages", "says"),
    [
        ("torchao", CPU, frozenset({"torch"}), "pip install 'mpt[fp8]'"),
        ("transformer_engine", H100, frozenset({"torchao"}), 'pip install --no-build-isolation "transformer_engine'),
        ("transformer_engine", CPU, BOTH, "torchao, which can be emulated"),
        ("transformer_engine", A100, BOTH, "torchao, which can be emulated"),
        ("transformer_engine", A100, None, "torchao, which can be emulated"),
        ("transformer_engine", {"is_cpu": False, "is_cuda": False, "emulated": False}, BOTH, "torchao"),
    ],
)
def test_what_is_missing_here_is_unsupported_with_its_remedy(
    backend: str, machine: dict[str, bool], packages: frozenset[str] | None, says: str
) -> None:
    with pytest.raises(UnsupportedError) as raised:
        check_backend(backend, "tensorwise", packages=packages, **machine)
    assert says in raised.value.remedy


def test_only_torchao_is_compiled() -> None:
    assert {
        (backend, recipe) for backend, recipes in RECIPES.items() for recipe in recipes if compiles(backend, recipe)[0]
    } == {("torchao", recipe) for recipe in RECIPES["torchao"]}
    assert "refuses torch.compile" in compiles("transformer_engine", "delayed")[1]


def test_only_delayed_scaling_cannot_be_recomputed() -> None:
    assert [
        (backend, recipe)
        for backend, recipes in RECIPES.items()
        for recipe in recipes
        if not recomputes(backend, recipe)[0]
    ] == [("transformer_engine", "delayed")]
