"""The vocabulary: the field's own words, spelt once."""

from enum import StrEnum


class Precision(StrEnum):
    """The format in which the matrix multiplications of a training step are computed."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    BF16_PURE = "bf16_pure"
    FP8 = "fp8"
    MXFP8 = "mxfp8"


FP8_MODES = (Precision.FP8, Precision.MXFP8)


class Feature(StrEnum):
    """What a device can have natively, emulated, or not at all."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"
    FP16_TENSOR_CORES = "fp16_tensor_cores"
    FLASH_ATTENTION_2 = "flash_attention_2"
    FLASH_ATTENTION_3 = "flash_attention_3"
    FLASH_ATTENTION_4 = "flash_attention_4"
    BITSANDBYTES = "bitsandbytes"


class DeviceKind(StrEnum):
    """The driver stack that reaches a device."""

    CUDA = "cuda"
    ROCM = "rocm"
    XPU = "xpu"
    MPS = "mps"
    CPU = "cpu"


class Attention(StrEnum):
    """Transformers' own names of the attention implementations; those with a slash come from the kernels hub."""

    FLASH_ATTENTION_4 = "flash_attention_4"
    FLASH_ATTENTION_3 = "flash_attention_3"
    FLASH_ATTENTION_2 = "flash_attention_2"
    SDPA = "sdpa"
    FLEX = "flex_attention"
    EAGER = "eager"
    HUB_FLASH_ATTENTION_2 = "kernels-community/flash-attn2"
    HUB_FLASH_ATTENTION_3 = "kernels-community/flash-attn3"
    HUB_VLLM_FLASH_ATTENTION_3 = "kernels-community/vllm-flash-attn3"
    HUB_FLASH_ATTENTION_4 = "kernels-community/flash-attn4"
    HUB_AITER_FLASH_ATTENTION = "kernels-community/aiter-flash-attn"


class Packing(StrEnum):
    """How documents become samples."""

    BLOCKS = "blocks"
    BEST_FIT = "best_fit"
    NONE = "none"


class Strategy(StrEnum):
    """How the processes of a run share the work and the model state."""

    SINGLE = "single"
    DDP = "ddp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    FSDP2 = "fsdp2"

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage; None where DeepSpeed is not the engine."""
        return int(self[-1]) if self.startswith("zero") else None


class OffloadDevice(StrEnum):
    """Where ZeRO keeps what does not stay on the accelerator."""

    NONE = "none"
    CPU = "cpu"
    NVME = "nvme"


class Method(StrEnum):
    """What is trained: every weight, adapters, or adapters on quantised weights."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class Task(StrEnum):
    """What is learnt from the data."""

    CAUSAL_LM = "causal_lm"
    SFT = "sft"
    SEQUENCE_CLASSIFICATION = "sequence_classification"
    MASKED_LM = "masked_lm"


class Metric(StrEnum):
    """What an evaluation computes beside the loss."""

    ACCURACY = "accuracy"
    F1 = "f1"
    F1_MACRO = "f1_macro"
    F1_WEIGHTED = "f1_weighted"
    PRECISION = "precision"
    RECALL = "recall"
    MATTHEWS = "matthews"
    PEARSON = "pearson"
    SPEARMAN = "spearman"
    MSE = "mse"
    MAE = "mae"
    PERPLEXITY = "perplexity"
    TOKEN_ACCURACY = "token_accuracy"


# Those whose loss is a cross entropy over the vocabulary.
LANGUAGE_TASKS = (Task.CAUSAL_LM, Task.SFT, Task.MASKED_LM)


class Check(StrEnum):
    """What a preflight can find: the codes of its findings (`mpt.planning.checks` says what each means)."""

    PLAN_REFUSED = "plan_refused"
    DOES_NOT_FIT = "does_not_fit"
    NO_ENGINE = "no_engine"
    DATA_REFUSED = "data_refused"
    LEARNING_RATE = "learning_rate"
    POSITIONS = "positions"
    DIMENSIONS = "dimensions"
    SMALL_PASS = "small_pass"
    VOCABULARY = "vocabulary"
    END_OF_TEXT = "end_of_text"
    PADDING_TOKEN = "padding_token"
    CHAT_TEMPLATE = "chat_template"
    ANSWERS_UNMARKED = "answers_unmarked"
    TRUNCATED = "truncated"
    NOTHING_LEARNT = "nothing_learnt"
    EMPTY_ROWS = "empty_rows"
    DUPLICATE_ROWS = "duplicate_rows"
    UNKNOWN_TOKENS = "unknown_tokens"
    EVALUATION_OVERLAP = "evaluation_overlap"
    PADDING = "padding"
