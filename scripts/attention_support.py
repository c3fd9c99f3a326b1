"""Measure what mpt/planning/attention_support.json holds, with the installed transformers, and write it.

Which attention implementations a model type has is asked of its class. Whether it keeps documents apart is measured on
a tiny random model of each type of causal language model (`tests/training/apart.py`), each in its own process: some
take a library down with them. With TYPES as arguments those alone are measured, and compared with the file: exit code 1
where they differ.
"""

import json
import multiprocessing
import queue
import sys
from pathlib import Path
from textwrap import indent, wrap
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FILE = ROOT / "mpt" / "planning" / "attention_support.json"
PATIENCE_S = 60  # a tiny model that takes longer is not tiny: its configuration has sizes of other names
MOST_PARAMETERS = 60e6
ROUNDING = 1e-4  # of fp32 logits; what is seen changes them by a tenth and more

# Layers that carry what was before into what comes, by a recurrence, a convolution or an index of chosen tokens. Tiny
# models may have none of them, so that measuring would not show it.
CARRYING = {
    *("bailing_hybrid", "bamba", "beam", "deepseek_v32", "deepseek_v4", "doge", "falcon_h1", "falcon_mamba"),
    *("glm_moe_dsa", "granitemoehybrid", "hrm_text", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2"),
    *("minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"),
    *("qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
}


def is_apart(model_type: str, attention: str) -> bool | None:
    """Whether documents stay apart; None where the type has no such attention, or no tiny model."""
    from tests.training.apart import difference, register_varlen

    register_varlen()
    try:
        return difference(model_type, attention) < ROUNDING
    except Exception as error:  # noqa: BLE001 - whatever a model that nobody has tried says
        print(f"{model_type}, {attention}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        return None


def measured(model_type: str) -> dict[str, bool | None]:
    """Measure one type in a process of its own."""
    answers: Any = multiprocessing.Queue()
    child = multiprocessing.Process(target=_measure, args=(model_type, answers))
    child.start()
    try:
        return answers.get(timeout=PATIENCE_S)
    except queue.Empty:
        return {}
    finally:
        child.kill()
        child.join()


def _measure(model_type: str, answers: Any) -> None:
    import torch

    torch.set_num_threads(1)
    if _is_small(model_type):
        answers.put(
            {attention: is_apart(model_type, attention) for attention in ("sdpa", "eager", "varlen_written_out")}
        )
    else:
        answers.put({})


def _is_small(model_type: str) -> bool:
    import torch

    from tests.training.apart import tiny

    try:
        with torch.device("meta"):
            return sum(weight.numel() for weight in tiny(model_type, "eager").parameters()) < MOST_PARAMETERS
    except Exception:  # noqa: BLE001 - it will say so when it is measured
        return True


def apart(types: list[str]) -> dict[str, list[str]]:
    """Name the types that keep documents apart, by positions and by lengths."""
    by_positions, by_lengths = [], []
    for model_type in types:
        found = {} if model_type in CARRYING else measured(model_type)
        rectangles = [found.get(attention) for attention in ("sdpa", "eager") if found.get(attention) is not None]
        if rectangles and all(rectangles):
            by_positions.append(model_type)
        if found.get("varlen_written_out"):
            by_lengths.append(model_type)
    return {"apart_by_positions": by_positions, "apart_by_lengths": by_lengths}


def without() -> dict[str, list[str]]:
    """Name the types whose classes say that they have no such implementation."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    classes: dict[str, str] = {}
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    ):
        for model_type, name in mapping.items():
            classes.setdefault(model_type, name if isinstance(name, str) else name[0])
    found: dict[str, list[str]] = {"without_sdpa": [], "without_flash": [], "without_flex": []}
    for model_type, name in sorted(classes.items()):
        model = getattr(transformers, name)
        for kind, attribute in (
            ("sdpa", "_supports_sdpa"),
            ("flash", "_supports_flash_attn"),
            ("flex", "_supports_flex_attn"),
        ):
            if not getattr(model, attribute):
                found[f"without_{kind}"].append(model_type)
    return found


def to_text(lists: dict[str, list[str]]) -> str:
    """Write the lists, some names a line."""
    written = []
    for name, types in lists.items():
        lines = wrap(", ".join(map(json.dumps, types)), 110, break_on_hyphens=False, break_long_words=False)
        written.append(f'  "{name}": [\n{indent(chr(10).join(lines), "    ")}\n  ]')
    return "{\n" + ",\n".join(written) + "\n}\n"


def main(types: list[str]) -> int:
    """Measure and write all; or, given types, measure those and compare."""
    if not types:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        lists = apart(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)) | without()
        missing = set(lists["without_flash"])
        lists["apart_by_lengths"] = [name for name in lists["apart_by_lengths"] if name not in missing]
        FILE.write_text(to_text(lists), encoding="utf-8")
        return 0
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    code = 0
    for name, found in apart(types).items():
        expected = [model_type for model_type in types if model_type in kept[name]]
        if name == "apart_by_lengths":
            found = [model_type for model_type in found if model_type not in kept["without_flash"]]
        if found != expected:
            print(f"{name}: measured {', '.join(found)}; the file has {', '.join(expected)}")
            code = 1
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
