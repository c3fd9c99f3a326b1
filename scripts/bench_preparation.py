"""Tokenise and pack a text by mpt, and by `datasets.map` as transformers' run_clm does it, with the same tokenizer and
number of processes, each in a process of its own with an empty cache, in turn. Prints one JSON object.

Tokens a CPU second count every process of a side, reading and packing included. Memory is the highest sum of what the
processes of a side had for themselves (RssAnon: pages of mapped files, which the kernel may drop, don't count).
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 1024
SIDES = ("map", "mpt")


def write_text(path: Path, megabytes: float) -> None:
    """Write JSON lines: functions, classes and documents of the standard library, over and over in other orders."""
    texts = []
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts += [part for part in source.read_text(encoding="utf-8").split("\n\n\n") if part.strip()]
    order = random.Random(1)
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            order.shuffle(texts)
            for text in texts:
                size += file.write(json.dumps({"text": text}) + "\n")
                if size >= megabytes * 1e6:
                    break


def by_mpt(source: Path, tokenizer: Any, workers: int) -> int:
    from mpt.recipe.schema import DataSection
    from mpt.training.data import prepare_samples, read_documents

    documents = read_documents(DataSection(source=str(source), eval_fraction=0), seed=1)
    samples = prepare_samples(
        documents, tokenizer, sequence_length=LENGTH, packing="blocks", source="", workers=workers
    )
    return len(samples.train) * LENGTH


def by_map(source: Path, tokenizer: Any, workers: int) -> int:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.load_dataset("json", data_files=str(source), split="train")
    end = [tokenizer.eos_token_id]

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [row + end for row in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = [token for row in batch["input_ids"] for token in row]
        whole = len(joined) // LENGTH * LENGTH
        return {"input_ids": [joined[start : start + LENGTH] for start in range(0, whole, LENGTH)]}

    tokens = table.map(encode, batched=True, num_proc=workers, remove_columns=["text"])
    return len(tokens.map(group, batched=True, num_proc=workers)) * LENGTH


def prepare(side: str, source: Path, tokenizer_folder: str, workers: int) -> None:
    """Be the process of a side."""
    from mpt.training.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(Path(tokenizer_folder))
    start = time.perf_counter()
    before = cpu_seconds()
    tokens = (by_mpt if side == "mpt" else by_map)(source, tokenizer, workers)
    print(json.dumps({"tokens": tokens, "cpu_s": cpu_seconds() - before, "wall_s": time.perf_counter() - start}))


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(side: str, source: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Run a side with an empty cache and watch its memory."""
    with tempfile.TemporaryDirectory(dir=source.parent) as cache:
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "MPT_CACHE": f"{cache}/mpt", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--side", side, "--workers", str(workers), "--source", str(source)]
        process = subprocess.Popen(
            [*command, "--tokenizer", str(tokenizer)], env=environment, stdout=subprocess.PIPE, text=True
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_kib(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        if process.returncode:
            sys.exit(f"{side} ended with {process.returncode}")
        return json.loads(process.stdout.read().splitlines()[-1]) | {"peak_mib": peak / 1024}


def anonymous_kib(pid: int) -> int:
    """Sum up what a process and its descendants have for themselves."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return 0
    own = sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return own + sum(anonymous_kib(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=64, help="of text for the comparison")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--flat", type=float, default=0, help="megabytes of text for mpt alone: its memory must not grow"
    )
    for name in ("--side", "--source", "--tokenizer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if options.side:
        prepare(options.side, Path(options.source), options.tokenizer, options.workers)
        return
    from mpt.training.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer = Path(folder) / "text.jsonl", Path(folder) / "tokenizer"
        write_text(source, options.megabytes)
        with source.open(encoding="utf-8") as lines:
            train_tokenizer(
                (json.loads(line)["text"] for _, line in zip(range(5000), lines, strict=False)), 8192
            ).save_pretrained(str(tokenizer))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(measure(side, source, tokenizer, options.workers))
        told: dict[str, Any] = {"megabytes": options.megabytes, "workers": options.workers, "rounds": options.rounds}
        for side, rows in found.items():
            told[side] = {
                "tokens_a_cpu_second": round(statistics.median(row["tokens"] / row["cpu_s"] for row in rows)),
                "tokens_a_second": round(statistics.median(row["tokens"] / row["wall_s"] for row in rows)),
                "peak_mib": round(max(row["peak_mib"] for row in rows)),
                "tokens": rows[0]["tokens"],
            }
        ratios = [
            ours["tokens"] / ours["cpu_s"] / (theirs["tokens"] / theirs["cpu_s"])
            for theirs, ours in zip(found["map"], found["mpt"], strict=True)
        ]
        told["mpt_over_map"] = [round(ratio, 2) for ratio in (min(ratios), statistics.median(ratios), max(ratios))]
        if options.flat:
            write_text(source, options.flat)
            told["flat"] = {"megabytes": options.flat} | measure("mpt", source, tokenizer, options.workers)
        print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
