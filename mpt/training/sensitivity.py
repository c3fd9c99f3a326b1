"""What lower formats do to a model: `python -m mpt.training.sensitivity REQUEST_DIR`.

Started by `mpt.measuring.sensitivity_child`. It builds the model of REQUEST_DIR/plan.json in fp32, with calibration
batches of the plan's own data, and answers requests on stdin, one JSON object a line: `measure` (every layer in every
candidate format, from one pass a batch), then any number of `verify` (install a plan's precisions really, and compare
loss and gradients with the reference) and `try` (the losses alone, from forward passes). It answers on stdout with
lines that hold `say`, `answer` or `error`, and ends when stdin does. It decides nothing.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mpt.errors import ExitCode, MptError
from mpt.planning.plan import Plan
from mpt.recipe.training_keys import training_arguments
from mpt.running.tie import die_with_parent
from mpt.terms import DeviceKind
from mpt.training.imports import heavy_imports, leave

DEVICES = {DeviceKind.ROCM: "cuda"}  # torch's own name where it is another


class Calibration:
    """A model in fp32, the batches that it is measured on, and after `measure` its losses and gradients on them."""

    def __init__(self, plan: Plan, folder: Path, batches: int, *, is_frozen: bool = False) -> None:
        """Read the data and build the model as a run would. Raises MptError for what a run could not train either.

        `is_frozen`: only adapters will be trained. They begin as zero, so they are left out; but the layers' weights
        get no gradient, and the input embedding's stands for all that goes back through the layers.
        """
        import torch

        from mpt.training.tasks import model_of, task_module

        self.plan = plan
        self.device = torch.device(DEVICES.get(plan.machine.kind, plan.machine.kind.value))
        task = task_module(plan.value("task"), plan.task_folder)
        seed = _training_value(plan, "seed")
        data_seed = _training_value(plan, "data_seed")
        tokenizer, samples = _read_data(plan, task, folder, seed if data_seed is None else data_seed)
        self.notices = list(samples.notices)
        collate = task.build_collator(plan, tokenizer)
        self.batches = [
            {key: value.to(self.device) for key, value in collate(chunk).items()}
            for chunk in _chunks(samples.train, plan.value("micro_batch_size"), batches, seed)
        ]
        if len(self.batches) < batches:
            self.notices.append(f"the data yields {len(self.batches)} batches of {batches}")
        model = model_of(task, plan, tokenizer, samples, seed=seed)
        model.config.use_cache = False
        self.model = model.to(self.device).eval()  # dropout would differ between the passes that are compared
        self.is_frozen = is_frozen
        if is_frozen:
            self.model.requires_grad_(False)
            self.model.get_input_embeddings().requires_grad_(True)
        self.losses: list[float] = []
        self.gradients: dict[str, Any] = {}

    def measure(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run the reference, with every layer probed on the way; time what the device computes itself."""
        from mpt.training.precision.probe import Probe, time_layer

        fp8 = request["fp8"] or {}
        probe = Probe(
            self.model,
            request["layers"],
            fp8_recipe=fp8.get("recipe"),
            emulate_fp8=fp8.get("emulated", True),
            is_frozen=self.is_frozen,
        )
        with probe:
            self.losses = self._run(None, before=probe.begin_batch)
        self.gradients = {name: w.grad.cpu() for name, w in self.model.named_parameters() if w.grad is not None}
        self.model.zero_grad(set_to_none=True)
        layers = probe.to_json(request["channel_quantile"])
        timed: dict[tuple[int, int, int], dict[str, float]] = {}
        for name, seen in layers.items():
            inputs, outputs = request["sizes"][name]
            size = (seen["rows"], inputs, outputs)
            if size not in timed:
                timed[size] = time_layer(
                    *size, request["timed"], self.device, fp8_recipe=fp8.get("recipe"), is_frozen=self.is_frozen
                )
            seen["seconds"] = timed[size]
        tokens = sum(batch["input_ids"].numel() for batch in self.batches)
        return {
            "reference_loss": math.fsum(self.losses) / len(self.losses),
            "batches": len(self.batches),
            "tokens": tokens,
            "layers": layers,
            "notices": self.notices,
        }

    def verify(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Install a plan's precisions, run the same batches, take them out again, and compare with the reference."""
        plan = Plan.from_json(request["plan"])
        with installed(self.model, plan):
            losses = self._run(plan)
            dot = own = reference = error = 0.0
            for name, weight in self.model.named_parameters():
                if name not in self.gradients or weight.grad is None:
                    continue
                exact, rough = self.gradients[name].double(), weight.grad.cpu().double()
                dot += float((exact * rough).sum())
                own += float(rough.square().sum())
                reference += float(exact.square().sum())
                error += float((exact - rough).square().sum())
            self.model.zero_grad(set_to_none=True)
        from mpt.training.precision.probe import decibels

        return {
            "loss_changes": self._changes(losses),
            "gradient_cosine": dot / math.sqrt(own * reference) if own * reference > 0 else math.nan,
            "gradient_sqnr_db": decibels(reference, error),
        }

    def try_out(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Install a plan's precisions, run the same batches forward, and take them out again."""
        import torch

        plan = Plan.from_json(request["plan"])
        with installed(self.model, plan), torch.no_grad():
            return {"loss_changes": self._changes(self._run(plan, backward=False))}

    def _changes(self, losses: list[float]) -> list[float]:
        return [loss - before for loss, before in zip(losses, self.losses, strict=True)]

    def _run(self, plan: Plan | None, before: Any = lambda: None, *, backward: bool = True) -> list[float]:
        """Run every batch forward and backward; give their losses. `plan` None: in plain fp32.

        Gradients become those of the sum of the losses. Each batch's gradient is that of its whole loss, not of its
        share in a mean: a training step sees one batch, and a change is predicted from it for one batch.
        """
        import torch

        from mpt.training.precision.apply import DTYPES, fp8_context

        dtype = None if plan is None else plan.value("autocast_dtype")
        context = (lambda: torch.autocast(self.device.type, enabled=False)) if plan is None else fp8_context(plan)
        losses = []
        for batch in self.batches:
            before()
            with (
                context(),
                torch.autocast(self.device.type, dtype=DTYPES.get(dtype or ""), enabled=dtype is not None),
            ):
                loss = self.model(**batch).loss
            if backward:
                loss.backward()
            losses.append(float(loss.detach()))
        return losses


@contextmanager
def installed(model: Any, plan: Plan) -> Iterator[None]:
    """Give the model a plan's precisions as training would, and afterwards the modules that it had before."""
    from mpt.training.precision.apply import apply_precision

    modules = dict(model.named_modules())
    replaced = {name: module.__dict__["forward"] for name, module in modules.items() if "forward" in module.__dict__}
    apply_precision(model, plan)
    try:
        yield
    finally:
        for name, module in modules.items():
            if name and model.get_submodule(name) is not module:
                model.set_submodule(name, module)
            if name in replaced:
                module.forward = replaced[name]
            else:
                module.__dict__.pop("forward", None)


def _read_data(plan: Plan, task: Any, folder: Path, seed: int) -> tuple[Any, Any]:
    """Give tokenizer and samples, as `mpt.training.session` prepares them for a run."""
    import datasets

    from mpt.training.tasks import ready_tokenizer, special_tokens_of
    from mpt.training.tokenizer import is_trained, load_tokenizer, trained_tokenizer

    datasets.disable_progress_bars()
    documents = task.read_documents(plan, seed=seed)
    if is_trained(plan.recipe):
        section = plan.recipe.tokenizer
        tokenizer = trained_tokenizer(
            folder / "tokenizer",
            lambda: task.texts(documents),
            section.vocab_size if section is not None else plan.facts.vocab_size,
            is_writer=True,
            special_tokens=special_tokens_of(task, plan),
        )
    else:
        tokenizer = load_tokenizer(plan.recipe)
    ready_tokenizer(task, plan, documents, tokenizer)
    return tokenizer, task.prepare_data(plan, documents, tokenizer)


def _chunks(samples: Any, size: int, count: int, seed: int) -> Iterator[list[Any]]:
    """Cut the first batches of the shuffled samples; the last may be shorter. A stream is shuffled already."""
    import torch

    if hasattr(samples, "__len__"):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        rest = iter([samples[index] for index in order[: size * count]])
    else:
        rest = islice(samples, size * count)
    while chunk := list(islice(rest, size)):
        yield chunk


def _training_value(plan: Plan, key: str) -> Any:
    return plan.training_arguments.get(key, training_arguments()[key]["default"])


def main(arguments: list[str]) -> int:
    """Answer requests until there are no more; give the exit code."""
    die_with_parent()
    channel = _own_stdout()
    if len(arguments) != 1:
        print("usage: python -m mpt.training.sensitivity REQUEST_DIR", file=sys.stderr)
        return ExitCode.USAGE
    from mpt.training.worker import explain, quiet_libraries

    def tell(**line: Any) -> None:
        print(json.dumps(line), file=channel, flush=True)

    try:
        with heavy_imports():
            quiet_libraries()
        _answer_all(Path(arguments[0]), tell)
    except MptError as error:
        tell(error={"problem": error.problem, "remedy": error.remedy, "exit_code": int(error.exit_code)})
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - a main function: whoever waits for the answer hears of every end
        traceback.print_exc()
        problem, remedy, code = explain(error)
        tell(error={"problem": problem, "remedy": remedy, "exit_code": int(code)})
        return code
    return ExitCode.DONE


def _answer_all(folder: Path, tell: Any) -> None:
    plan = Plan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    calibration: Calibration | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["ask"] == "measure":
            tell(say="reading the data and building the model")
            calibration = Calibration(plan, folder, request["batches"], is_frozen=request["is_frozen"])
            tell(say=f"measuring {len(request['layers'])} layers on {len(calibration.batches)} batches")
            tell(answer=calibration.measure(request))
        else:
            assert calibration is not None, "measure comes first"
            tell(answer=calibration.verify(request) if request["ask"] == "verify" else calibration.try_out(request))


def _own_stdout() -> IO[str]:
    """Keep stdout for the answers: what libraries print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
