"""Tokens per second of the same training by mpt, a plain Trainer script (= 1.00) and other tools.

A Llama of 6 layers, 256 wide, learns real documents of uneven lengths, joined and cut into blocks of 512 tokens, so
that no token is padding; 8 blocks a step, bf16. Each round runs every program at two lengths, in turn: their difference
leaves the steps alone, without imports, data, compiling. The plain script runs twice a round: the second time is the
null control. CPU seconds of one thread are counted, of all processes of a run, because the clock of a shared machine
tells of its neighbours. The first start of a compiling program is counted with an empty cache of the compiler, and
again with a full one. Prints a table, and one JSON object with --json.

Other tools run in environments of their own, DIR/trl and DIR/litgpt under --peers: `pip install trl==1.16.0`, and
`pip install litgpt==0.5.13 requests`, each with the project's torch.
"""

import argparse
import json
import os
import pydoc_data.topics
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).resolve().parent.parent
LENGTH, BATCH = 512, 8
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": LENGTH,
}
END = "<|endoftext|>"
NAMES = {"trl": "trl", "litgpt": "litgpt compiled"}  # LitGPT compiles without being asked


def prepare(folder: Path, vocabulary: int) -> int:
    """Write documents, tokenizer and configurations; give the number of tokens."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    texts += [path.read_text(encoding="utf-8", errors="replace") for path in sorted(stdlib.glob("[a-h]*.py"))]
    folder.joinpath("documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    folder.joinpath("tokenizer").mkdir()
    bpe.save(str(folder / "tokenizer" / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "bos_token": END}
    folder.joinpath("tokenizer", "tokenizer_config.json").write_text(json.dumps(names))
    folder.joinpath("model.json").write_text(json.dumps(MODEL | {"vocab_size": vocabulary}))
    return sum(len(encoding.ids) + 1 for encoding in bpe.encode_batch(texts))


def by_mpt(folder: Path, steps: int, **own: Any) -> list[str]:
    recipe = {
        "name": "bench",
        "model": {"config": {"model_type": "llama", **MODEL}},
        "tokenizer": {"name_or_path": str(folder / "tokenizer")},
        "data": {"source": str(folder / "documents.jsonl"), "sequence_length": LENGTH, "eval_fraction": 0},
        "precision": {"mode": "bf16", "allow_emulation": True},
        "micro_batch_size": BATCH,
        "global_batch_size": BATCH,
        "training": {"max_steps": steps, "learning_rate": 1e-3, "save_steps": 100000, "logging_steps": 10},
        **own,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "mpt", "train", str(file), "--resume", "never", "--runs-dir", str(folder / "runs")]


def by_program(folder: Path, steps: int, *, name: str, python: str = sys.executable) -> list[str]:
    return [python, str(ROOT / "scripts" / "throughput_programs.py"), name, str(folder), str(steps)]


def programs(options: argparse.Namespace) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name what is run, in the order of a round."""
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (by_program, {"name": "plain"}),
        "mpt": (by_mpt, {"compile": False}),
        "mpt compiled": (by_mpt, {"compile": "regional"}),
        "plain again": (by_program, {"name": "plain"}),
        "plain compiled": (by_program, {"name": "plain-compiled"}),
    }
    if options.attention:
        known |= {f"mpt {kernel}": (by_mpt, {"compile": False, "attention": kernel}) for kernel in options.attention}
    for tool in NAMES:
        python = None if options.peers is None else options.peers / tool / "bin" / "python"
        if python is None or not python.exists():
            print(f"{tool}: left out, there is no {python or 'environment: --peers was not given'}", file=sys.stderr)
        else:
            known[NAMES[tool]] = (by_program, {"name": tool, "python": str(python)})
    return {name: known[name] for name in known if options.only is None or name in options.only}


def run(make: Any, keywords: dict[str, Any], folder: Path, steps: int, cache: Path) -> tuple[float, float]:
    """Run a program; give its CPU seconds and its peak resident memory in MiB."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "log").open("w+") as log:
        watched = [sys.executable, "-c", PEAK, *make(folder, steps, **keywords)]
        done = subprocess.run(watched, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        log.seek(0)
        text = log.read()
    if done.returncode:
        raise RuntimeError(text[-1500:])
    peak = float(text.rsplit("peak MiB: ", 1)[1].split()[0])
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, peak


# A process between, whose largest child is that of this run alone.
PEAK = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print("peak MiB:", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(status)
"""


def main() -> None:
    options = read_arguments(build_parser())
    short, long = options.steps
    made = programs(options)
    rates: dict[str, list[float]] = {name: [] for name in made}
    starts: dict[str, list[float]] = {name: [] for name in made}
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, caches = Path(temporary) / "bench", Path(temporary) / "caches"
        folder.mkdir()
        tokens = prepare(folder, options.vocabulary)
        print(f"{tokens} tokens in documents of uneven lengths", file=sys.stderr)
        for number in range(options.rounds):
            for name, (make, keywords) in made.items():
                if name in failed:
                    continue
                cache = caches / name.replace(" ", "-")
                try:
                    first, _ = run(make, keywords, folder, short, cache)
                    if number == 0:  # the caches are full now: what the start costs from here on
                        starts[name].append(first)
                        first, _ = run(make, keywords, folder, short, cache)
                        starts[name].append(first)
                    second, peaks[name] = run(make, keywords, folder, long, cache)
                except RuntimeError as error:
                    failed[name] = str(error)
                    print(f"{name} failed, and is left out:\n{error}", file=sys.stderr)
                    continue
                rates[name].append((long - short) * BATCH * LENGTH / (second - first))
                print(f"round {number} {name}: {rates[name][-1]:.0f} tokens per CPU second", file=sys.stderr)
    report = summary({name: rates[name] for name in made if name not in failed}, starts, peaks)
    print(json.dumps(report, indent=2) if options.json else table(report))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs=2, default=(3, 23), metavar=("SHORT", "LONG"))
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--attention", nargs="*", help="run mpt with each of these implementations too")
    parser.add_argument("--peers", type=Path, help="folder with an environment for each other tool")
    parser.add_argument("--only", nargs="*", help="names of the table")
    parser.add_argument("--json", action="store_true")
    return parser


def read_arguments(parser: argparse.ArgumentParser, given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; refuse at once what can't be measured."""
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: it must be at least 1")
    if not 1 <= options.steps[0] < options.steps[1]:
        parser.error(f"--steps {options.steps[0]} {options.steps[1]}: the second must be above the first, from 1")
    if options.vocabulary < 512:
        parser.error(f"--vocabulary {options.vocabulary}: it must be at least 512")
    unknown = sorted(set(options.only or ()) - set(programs(options)))
    if unknown or "plain" not in (options.only or ["plain"]):
        there = ", ".join(programs(argparse.Namespace(**vars(options) | {"only": None})))
        parser.error(f"--only: {', '.join(unknown) or 'plain is what all are compared with'}; there are {there}")
    return options


def summary(
    rates: dict[str, list[float]], starts: dict[str, list[float]], peaks: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Compare each program with the plain one, round by round."""
    report = {}
    for name, found in rates.items():
        ratios = sorted(rate / base for rate, base in zip(found, rates["plain"], strict=True))
        report[name] = {
            "tokens_per_cpu_second": round(statistics.median(found)),
            "over_plain": round(statistics.median(ratios), 3),
            "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            "start_cpu_s": [round(seconds, 1) for seconds in starts[name]],
            "peak_mib": round(peaks[name]),
        }
    return report


def table(report: dict[str, dict[str, Any]]) -> str:
    """Write it for people."""
    lines = [f"{'':16} {'tokens/CPU s':>12} {'over plain':>10} {'spread':>15} {'start cold, warm':>17} {'peak MiB':>9}"]
    for name, row in report.items():
        spread = "{:.2f} to {:.2f}".format(*row["spread"])
        start = "{:.0f} s, {:.0f} s".format(*row["start_cpu_s"])
        lines.append(
            f"{name:16} {row['tokens_per_cpu_second']:12} {row['over_plain']:10.2f} {spread:>15} {start:>17} "
            f"{row['peak_mib']:9}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
