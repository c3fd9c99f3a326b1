"""Compare what really runs with what was planned, and refuse to train the difference.

Three looks: when the model is wrapped and the optimizer made; after the first backward pass, before the optimizer step;
and after that step, when the optimizer has its state. The findings go to the attempt's audit.json.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpt.errors import UnsupportedError
from mpt.planning.plan import Plan
from mpt.running.journal import Journal
from mpt.running.run_directory import write_atomically
from mpt.terms import DeviceKind, Method, Precision, Strategy

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer

NAMES: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "int8",
    torch.int8: "int8",
}
# What a Linear layer hands on: the format of the matrix multiplication itself.
COMPUTES: dict[Precision, str] = {
    Precision.FP32: "fp32",
    Precision.TF32: "fp32",
    Precision.FP16: "fp16",
    Precision.BF16: "bf16",
    Precision.BF16_PURE: "bf16",
    Precision.FP8: "bf16",
    Precision.MXFP8: "bf16",
}


class Audit:
    """One attempt's audit. Raises UnsupportedError at the first look that finds a difference."""

    def __init__(self, plan: Plan, journal: Journal, report: Path, *, is_writer: bool) -> None:
        self.plan = plan
        self.journal = journal
        self.report = report
        self.is_writer = is_writer
        self.checks: list[dict[str, Any]] = []
        self._seen_in_forward: dict[str, Any] = {}
        self._remove_hook: Callable[[], None] | None = None
        self._before_done = self._after_done = self._reported = False

    def after_set_up(self, trainer: "PlanTrainer") -> None:
        """Look at model, engine, optimizer and device; no step has been made."""
        plan = self.plan
        engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
        trainable = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        self._device(trainer)
        self._compare("world_size", plan.value("world_size"), trainer.args.world_size)
        self._compare("distributed.strategy", plan.value("distributed.strategy"), _strategy(trainer, engine))
        self._compare("weights_dtype", [plan.value("weights_dtype")], _dtypes(trainable))
        if plan.value("method") == Method.FULL:
            count = sum(getattr(weight, "ds_numel", weight.numel()) for weight in trainable)
            self._compare("trainable parameters", plan.facts.parameters, count)
        self._compare("attention", plan.value("attention"), trainer.model.config._attn_implementation)
        self._compare(
            "gradient_checkpointing",
            plan.value("gradient_checkpointing"),
            bool(getattr(trainer.model, "is_activation_checkpointing", False)),
        )
        batch = (
            trainer.args.per_device_train_batch_size
            * trainer.args.gradient_accumulation_steps
            * trainer.args.world_size
        )
        self._compare("global_batch_size", plan.value("global_batch_size"), batch)
        self._optimizer(trainer, engine)
        self._loss_scale(trainer, engine)
        if engine is not None:
            self._deepspeed(engine)
        self._watch_forward(trainer)
        self._judge()

    def before_first_step(self, trainer: "PlanTrainer") -> None:
        """Look at what the first forward and backward passes computed in."""
        if self._before_done:
            return
        self._before_done = True
        if self._remove_hook is not None:
            self._remove_hook()
        self._compare("autocast_dtype", self.plan.value("autocast_dtype"), self._seen_in_forward.get("autocast"))
        self._compare(
            "precision", COMPUTES[Precision(self.plan.value("precision"))], self._seen_in_forward.get("output")
        )
        gradients = [w.grad for w in trainer.model.parameters() if w.requires_grad and w.grad is not None]
        if gradients and not trainer.is_deepspeed_enabled:  # DeepSpeed has moved them into buffers of its own
            self._compare("gradient_dtype", [self.plan.value("gradient_dtype")], _dtypes(gradients))
        self._judge()

    def after_first_step(self, trainer: "PlanTrainer") -> None:
        """Look at the optimizer's state, which exists only now, and write the report.

        A first step that loss scaling skipped has none: then the state is looked at after the first that was not.
        """
        if self._after_done:
            return
        state = _optimizer_state(trainer)
        self._after_done = bool(state) or trainer.watch.step is None or not trainer.watch.step.skipped
        if state:
            self._compare("optimizer_state_dtype", [self.plan.value("optimizer_state_dtype")], _dtypes(state))
        self._judge()
        if self.is_writer and (self._after_done or not self._reported):
            self._write(passed=True)

    def _device(self, trainer: "PlanTrainer") -> None:
        machine = self.plan.machine
        kind = trainer.args.device.type
        planned = "cuda" if machine.kind is DeviceKind.ROCM else machine.kind.value
        self._compare("device", planned, kind)
        if kind != "cuda" or machine.kind is not DeviceKind.CUDA:
            return
        index = trainer.args.device.index or 0
        device = machine.devices[min(index, len(machine.devices) - 1)]
        capability = device.compute_capability
        if capability is not None:
            self._compare("compute_capability", list(capability), list(torch.cuda.get_device_capability(index)))
        if machine.source == "detected":
            self._compare("device name", device.name, torch.cuda.get_device_name(index))

    def _optimizer(self, trainer: "PlanTrainer", engine: Any) -> None:
        planned = str(self.plan.value("optimizer"))
        made = _innermost(engine.optimizer if engine is not None else trainer.optimizer)
        name = type(made).__name__
        # transformers' names are of algorithms and variants (adamw_torch_fused); the class must be of the family.
        families = {"adamw": "adam", "adafactor": "adafactor", "sgd": "sgd", "lion": "lion", "adagrad": "adagrad"}
        family = next((word for key, word in families.items() if key in planned), None)
        if family is not None:
            self._compare("optimizer", planned, planned if family in name.lower() else name)
        started_with = made.param_groups[0].get("initial_lr", made.param_groups[0]["lr"])
        self._compare("learning_rate", float(self.plan.value("learning_rate")), float(started_with))

    def _loss_scale(self, trainer: "PlanTrainer", engine: Any) -> None:
        planned = self.plan.value("loss_scale")
        found: float | None = None
        if engine is not None:
            found = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None
        elif trainer.scaler is not None:
            found = float(trainer.scaler.get_scale())
        if planned is None or self.plan.resume_from is not None:  # a resumed scale is wherever it had got to
            self._compare("loss scaler", planned is not None, found is not None)
        else:
            self._compare("loss_scale", float(planned.get("static") or planned["initial"]), found)

    def _deepspeed(self, engine: Any) -> None:
        self._compare("reduce_dtype", self.plan.value("reduce_dtype"), NAMES[engine.communication_data_type])
        self._compare("grad_accum_dtype", self.plan.value("grad_accum_dtype"), NAMES[engine.get_data_types()[1]])
        planned = self.plan.value("offload") or {}
        for part, config in (
            ("optimizer", engine.zero_offload_optimizer()),
            ("parameters", engine.zero_offload_param()),
        ):
            found = "none" if config is None else str(getattr(config.device, "value", config.device))
            self._compare(f"offload.{part}", planned.get(part) or "none", found)

    def _watch_forward(self, trainer: "PlanTrainer") -> None:
        """Note what the first linear layer of the first forward pass sees and gives."""
        layer = next((module for module in trainer.model.modules() if isinstance(module, nn.Linear)), None)
        if layer is None:
            layer = next(module for module in trainer.model.modules() if type(module).__name__ == "Conv1D")
        device = trainer.args.device.type

        def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if not self._seen_in_forward:
                active = torch.is_autocast_enabled(device)
                self._seen_in_forward["autocast"] = NAMES[torch.get_autocast_dtype(device)] if active else None
                self._seen_in_forward["output"] = NAMES.get(output.dtype, str(output.dtype))

        self._remove_hook = layer.register_forward_hook(note).remove

    def _compare(self, what: str, planned: Any, found: Any) -> None:
        self.checks.append({"what": what, "planned": planned, "found": found, "passed": planned == found})

    def _judge(self) -> None:
        wrong = [check for check in self.checks if not check["passed"]]
        if not wrong:
            return
        if self.is_writer:
            self._write(passed=False)
        listed = "; ".join(f"{check['what']}: planned {check['planned']}, found {check['found']}" for check in wrong)
        raise UnsupportedError(
            f"what runs is not what was planned: {listed}",
            remedy="Plan for the machine that trains (`mpt plan` there), and see audit.json in the attempt's folder.",
        )

    def _write(self, *, passed: bool) -> None:
        write_atomically(self.report, json.dumps({"passed": passed, "checks": self.checks}, indent=2) + "\n")
        if not self._reported or not passed:
            self.journal.append("audit", passed=passed)
        self._reported = True


def _strategy(trainer: "PlanTrainer", engine: Any) -> str:
    if engine is not None:
        return f"zero{engine.zero_optimization_stage()}"
    if getattr(trainer, "is_fsdp_enabled", False):
        return Strategy.FSDP2.value
    is_ddp = isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return Strategy.DDP.value if is_ddp else Strategy.SINGLE.value


def _dtypes(tensors: list[torch.Tensor]) -> list[str]:
    return sorted({NAMES.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors})


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _optimizer_state(trainer: "PlanTrainer") -> list[torch.Tensor]:
    """List the state's tensors, without step counters."""
    made = _innermost(trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else trainer.optimizer)
    return [
        value
        for entry in made.state.values()
        if isinstance(entry, dict)
        for value in entry.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 1
    ]
