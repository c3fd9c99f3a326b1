"""Choose how the cross entropy over the vocabulary is computed: whole, in chunks of tokens, or by Liger's kernel. Pure.

Whole, a token's logits stand in fp32 three times at the turn (`mpt.planning.activations`): 1.5 MB a token with a
vocabulary of 128,000. In chunks they never stand whole, and the gradients of hidden states and head are what is kept.
"""

from collections.abc import Mapping
from typing import Any, Literal

from mpt.errors import MptError, UnsupportedError
from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin, Rejected
from mpt.planning.model_facts import ModelFacts
from mpt.recipe.schema import Recipe
from mpt.terms import FP8_MODES, DeviceKind, Metric, Precision, Strategy, Task

Loss = Literal["chunked", "full", "liger"]

# Their forward pass is base model -> head -> ForCausalLMLoss, and nothing between (transformers 5.23, read and held by
# tests/training/test_chunked_loss.py): no softcap (gemma2), no scale (cohere, granite), no auxiliary loss (mixtral).
PLAIN_HEADS = frozenset(
    ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3",
     "stablelm", "starcoder2")
)  # fmt: skip
# MODEL_TYPE_TO_APPLY_LIGER_FN of liger_kernel/transformers/monkey_patch.py, the causal language models among them.
LIGER_MODELS = frozenset(
    ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3")
)
HEADS = ("lm_head", "embed_out")
PACKAGE = "liger_kernel"
INSTALL = "pip install liger-kernel"
# Bytes of one chunk's logits in fp32. On a CPU about what a core's cache holds: measured on two cores (EPYC, 2,048
# tokens of vocabulary), 256 to 1,024 tokens at a time are 5 % of a step faster than all 4,096.
CHUNK_BYTES_CPU = 4 * 2**20
CHUNK_BYTES_GPU = 256 * 2**20
FEWEST_TOKENS = 128  # below that a matrix multiplication reads the head's weights for too few rows


def chunk_tokens(vocab_size: int, *, on_cpu: bool) -> int:
    """Say how many tokens' logits stand at a time, a power of two.

    >>> chunk_tokens(2048, on_cpu=True), chunk_tokens(128_256, on_cpu=True), chunk_tokens(128_256, on_cpu=False)
    (512, 128, 512)
    """
    room = (CHUNK_BYTES_CPU if on_cpu else CHUNK_BYTES_GPU) // (4 * vocab_size)
    return max(FEWEST_TOKENS, 1 << max(0, room.bit_length() - 1))


def choose_loss(
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    precision: Precision,
    strategy: Strategy,
    layers: Mapping[str, Any] | None,
    packages: frozenset[str] | None,
) -> Decision[Loss]:
    """Choose the loss; `layers` are the plan's, `packages` None where nobody knows what is installed.

    Raises MptError for a loss that the model or the precision can't have, UnsupportedError for a missing package.
    """
    asked = _asked(recipe)
    against_chunks = _against_chunks(recipe, facts, precision, strategy, layers)
    against_liger = _against_liger(recipe, machine, facts, precision, strategy, layers, packages)
    if asked == "full":
        return Decision("full", Origin.ASKED, "the recipe asks for it")
    if asked == "chunked":
        if against_chunks is not None:
            raise MptError(
                f"loss: chunked was asked for, and {against_chunks}", remedy="Ask for `loss: full`, or leave it out."
            )
        return Decision("chunked", Origin.ASKED, "the recipe asks for it")
    if asked == "liger":
        if against_liger is not None:
            kind = UnsupportedError if PACKAGE in against_liger or "GPU" in against_liger else MptError
            raise kind(f"loss: liger was asked for, and {against_liger}", remedy="Ask for `loss: auto`.")
        return Decision("liger", Origin.ASKED, "the recipe asks for it")
    rejected = []
    if against_liger is None:
        return Decision("liger", Origin.AUTO, "the package is installed, and knows this model's kernels")
    rejected.append(Rejected("liger", against_liger))
    if against_chunks is None:
        rejected.append(Rejected("full", "holds the logits of every token in fp32 at once"))
        tokens = chunk_tokens(facts.vocab_size, on_cpu=machine.is_cpu)
        return Decision("chunked", Origin.AUTO, f"the logits of {tokens} tokens stand at a time", tuple(rejected))
    rejected.append(Rejected("chunked", against_chunks))
    return Decision("full", Origin.AUTO, "the model's own", tuple(rejected))


def _asked(recipe: Recipe) -> str:
    """The recipe's `loss`; `training.use_liger_kernel` says liger too."""
    if recipe.loss == "auto" and recipe.training_keys.get("use_liger_kernel"):
        return "liger"
    return recipe.loss


def _against_chunks(
    recipe: Recipe,
    facts: ModelFacts,
    precision: Precision,
    strategy: Strategy,
    layers: Mapping[str, Any] | None,
) -> str | None:
    if recipe.task not in (Task.CAUSAL_LM, Task.SFT):
        return f"the loss of {recipe.task} is none over a vocabulary"
    if Metric.TOKEN_ACCURACY in (recipe.metrics or ()):
        return "metrics: token_accuracy needs every logit"
    if recipe.model.trust_remote_code:
        return "nobody knows what code from a checkpoint does between head and loss"
    if facts.model_type not in PLAIN_HEADS:
        return f"mpt does not know that a {facts.model_type} computes its loss from the head's output as it is"
    if recipe.training_keys.get("label_smoothing_factor"):
        return "training.label_smoothing_factor needs every logit"
    if strategy in (Strategy.ZERO3, Strategy.FSDP2):
        return f"{strategy} divides the head's weights, which the loss would need between its passes"
    if precision is Precision.FP16 and strategy.zero_stage is not None:
        return "DeepSpeed alone knows the loss scale, without which small fp16 gradients of logits vanish"
    if recipe.lora is not None and any(head in _targets(recipe) for head in HEADS):
        return "the head has an adapter"
    kind = next((entry["precision"] for entry in _listed(layers) if entry["name"].rpartition(".")[2] in HEADS), None)
    if kind in FP8_MODES:
        return "the head computes in fp8, whose kernels take gradients by themselves"
    if kind not in (None, "fp32") and precision in (Precision.FP32, Precision.TF32):
        return f"the head computes in {kind} and hands its logits on in fp32"
    return None


def _against_liger(
    recipe: Recipe,
    machine: Machine,
    facts: ModelFacts,
    precision: Precision,
    strategy: Strategy,
    layers: Mapping[str, Any] | None,
    packages: frozenset[str] | None,
) -> str | None:
    if machine.kind not in (DeviceKind.CUDA, DeviceKind.ROCM):
        return f"its kernels run on a GPU of NVIDIA or AMD, not on {machine.label}"
    if recipe.task not in (Task.CAUSAL_LM, Task.SFT):
        return f"the loss of {recipe.task} is none over a vocabulary"
    if facts.model_type not in LIGER_MODELS:
        return f"it has no kernels for a {facts.model_type}"
    if recipe.training_keys.get("label_smoothing_factor"):
        return "training.label_smoothing_factor needs every logit"
    if strategy in (Strategy.ZERO3, Strategy.FSDP2):
        return f"{strategy} divides the head's weights"
    if _listed(layers) or precision in FP8_MODES:
        return "layers with a precision of their own keep their own forward pass"
    if packages is None:
        return f"nobody knows here whether {PACKAGE} is installed there"
    if PACKAGE not in packages:
        return f"the package {PACKAGE} is not installed ({INSTALL})"
    return None


def _targets(recipe: Recipe) -> list[str]:
    targets = recipe.lora.target_modules if recipe.lora is not None else []
    return [targets] if isinstance(targets, str) else list(targets)


def _listed(layers: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return [] if layers is None else list(layers["modules"])
