"""Compare what really runs with what was planned, and refuse to train the difference.

Three looks: when the model is wrapped and the optimizer made; after the first backward pass, before the optimizer step;
and after that step, when the optimizer has its state. The findings go to the attempt's audit.json. What is read where
stands in `mpt.training.findings`; this module knows the order, the comparison and the verdict.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpt.errors import UnsupportedError
from mpt.planning.plan import Plan
from mpt.running.journal import Journal
from mpt.running.run_directory import write_atomically
from mpt.terms import DeviceKind, Method, Packing, Task
from mpt.training import findings
from mpt.training.adapters import adapted_layers, trained_count
from mpt.training.dead_adapters import dead_adapters, dead_error
from mpt.training.documents_apart import check_documents_apart
from mpt.training.precision.apply import planned_float8, planned_islands
from mpt.training.precision.watching import AttentionWatch, GradientWatch, IslandWatch, MatmulWatch, SumWatch
from mpt.training.quantization import describe, quantized_modules

if TYPE_CHECKING:
    from mpt.training.trainer import PlanTrainer

# The kernels that an attention implementation may come to. sdpa chooses by shape, dtype and device.
KERNELS: dict[str, tuple[str, ...]] = {
    "sdpa": ("flash", "mem_efficient", "cudnn", "math", "overrideable"),
    "eager": ("eager",),
    "flex_attention": ("flex",),
    "flash_attention_2": ("flash_attn_2",),
    "flash_attention_3": ("flash_attn_3",),
    "flash_attention_4": ("flash_attn_4",),
    "kernels-community/flash-attn2": ("flash_attn_2",),
    "kernels-community/flash-attn3": ("flash_attn_3",),
    "kernels-community/vllm-flash-attn3": ("flash_attn_3",),
    "kernels-community/flash-attn4": ("flash_attn_4",),
    "kernels-community/aiter-flash-attn": ("flash_attn_2",),
}
LOSS_TOLERANCE = 1e-3  # relative; the two differ by the order of a sum in fp32, about 1e-7
SCALER_KEYS = ("growth_factor", "backoff_factor", "growth_interval")


def _timed(look: Callable[["Audit", "PlanTrainer"], None]) -> Callable[["Audit", "PlanTrainer"], None]:
    def timed(audit: "Audit", trainer: "PlanTrainer") -> None:
        began = time.perf_counter()
        try:
            look(audit, trainer)
        finally:
            audit.seconds += time.perf_counter() - began

    return timed


class Audit:
    """One attempt's audit. Raises UnsupportedError at the first look that finds a difference."""

    def __init__(self, plan: Plan, journal: Journal, report: Path, *, is_writer: bool) -> None:
        self.plan = plan
        self.journal = journal
        self.report = report
        self.is_writer = is_writer
        self.checks: list[dict[str, Any]] = []
        self.samples = 0
        self._matmuls = MatmulWatch({})
        self._islands = IslandWatch({})
        self._attention: AttentionWatch | None = None
        self._sums = SumWatch()
        self._gradients = GradientWatch()
        self._autocast: str | None = None
        self._before_done = self._after_done = self._reported = False
        self.seconds = 0.0  # what the looks themselves cost

    @_timed
    def after_set_up(self, trainer: "PlanTrainer") -> None:
        """Look at model, engine, optimizer and device; no step has been made."""
        plan = self.plan
        engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
        self._device(trainer)
        self._compare("world_size", plan.value("world_size"), trainer.args.world_size)
        self._compare("distributed.strategy", plan.value("distributed.strategy"), findings.strategy(trainer, engine))
        self._weights(trainer)
        self._compare("attention", plan.value("attention"), trainer.model.config._attn_implementation)
        self._compare(
            "gradient_checkpointing",
            plan.value("gradient_checkpointing"),
            bool(getattr(findings.plain_model(trainer), "is_activation_checkpointing", False)),
        )
        self._loss(trainer)
        self._compare("compile", plan.value("compile"), findings.compiled(trainer))
        self._compare("tf32", plan.value("tf32"), findings.allows_tf32())
        self._optimizer(trainer, engine)
        self._loss_scale(trainer, engine)
        if engine is not None:
            self._deepspeed(engine)
            self._gradients.watch(w for w in trainer.model.parameters() if w.requires_grad)
        self._alignment(trainer)
        self._documents(trainer)
        self._watch_forward(trainer)
        self._judge()

    def note_batch(self, samples: int) -> None:
        """Count the samples of a micro batch of the first step."""
        if not self._before_done:
            self.samples += samples

    @contextmanager
    def watching_backward(self) -> Iterator[None]:
        """Watch a backward pass of the first step: which sums go over the wire in which format."""
        if self._before_done or self.plan.value("compile"):
            yield
            return
        with self._sums:
            yield

    @_timed
    def before_first_step(self, trainer: "PlanTrainer") -> None:
        """Look at what the first forward and backward passes computed in."""
        if self._before_done:
            return
        self._before_done = True
        plan = self.plan
        if not plan.value("compile"):
            self._forward()
        if trainer.replay is None and not _may_be_short(trainer):  # an incident's step may have been an epoch's last
            self._compare("global_batch_size", plan.value("global_batch_size"), self.samples * trainer.args.world_size)
        gradients = [w.grad for w in trainer.model.parameters() if w.requires_grad and w.grad is not None]
        if gradients and not trainer.is_deepspeed_enabled:  # DeepSpeed has moved them into buffers of its own
            islands = findings.island_weights(trainer, planned_islands(plan))
            own = [w.grad for w in trainer.model.parameters() if w.grad is not None and id(w) not in islands]
            self._compare("grad_accum_dtype", [plan.value("grad_accum_dtype")], findings.dtypes(own))
            if plan.value("distributed.strategy") == "ddp":
                sent = trainer.reduction.sent if trainer.reduction is not None else findings.common_dtype(own)
                self._compare("reduce_dtype", plan.value("reduce_dtype"), findings.name(sent))
        if trainer.is_deepspeed_enabled:
            self._backward_of_deepspeed(trainer)
        if self._has_adapters():
            self._dead_adapters(trainer)
        self._judge()

    @_timed
    def after_first_step(self, trainer: "PlanTrainer") -> None:
        """Look at the optimizer's state, which exists only now, and write the report.

        A first step that loss scaling skipped has none: then the state is looked at after the first that was not.
        """
        if self._after_done:
            return
        state = findings.optimizer_state(trainer, islands=planned_islands(self.plan))
        self._after_done = bool(state) or trainer.watch.step is None or not trainer.watch.step.skipped
        if state:
            self._compare("optimizer_state_dtype", [self.plan.value("optimizer_state_dtype")], findings.dtypes(state))
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

    def _weights(self, trainer: "PlanTrainer") -> None:
        """Weights by what they are: the model's own, its islands', and adapters'."""
        plan, islands = self.plan, planned_islands(self.plan)
        in_islands = findings.island_weights(trainer, {n: d for n, d in islands.items() if d == "fp32"})
        adapters = [w for w in trainer.model.parameters() if w.requires_grad] if self._has_adapters() else []
        apart = {*in_islands, *map(id, adapters)}
        own = [w for w in trainer.model.parameters() if id(w) not in apart]
        if plan.value("quantization") is None:
            self._compare("weights_dtype", [plan.value("weights_dtype")], findings.dtypes(own))
        else:
            self._quantized(trainer, {id(weight) for weight in own})
        if in_islands:
            self._compare("weights of fp32 islands", ["fp32"], findings.dtypes(list(in_islands.values())))
        if self._has_adapters():
            self._compare("adapter_dtype", [plan.value("adapter_dtype")], findings.dtypes(adapters))
            self._adapters(trainer)
        else:
            count = trained_count(trainer.model)
            if plan.task_folder is None:
                self._compare(
                    "trainable parameters",
                    plan.facts.parameters,
                    self._as_planned(trainer, count, plan.facts.parameters),
                )
            else:  # a task of the user's own builds the model, which planning has only guessed at
                self.checks.append({"what": "trainable parameters", "planned": None, "found": count})
        converted = sorted(findings.plain_fp8(trainer))
        self._compare("fp8 modules", len(planned_float8(plan)), len(converted))
        if converted != sorted(planned_float8(plan)):
            self._compare("names of the fp8 modules", sorted(planned_float8(plan)), converted)
        self._compare("rotary frequencies", ["fp32"], findings.rotary_dtypes(trainer.model) or ["fp32"])

    def _adapters(self, trainer: "PlanTrainer") -> None:
        """How many layers have an adapter, and how much is trained; told, not compared, where no plan could know it."""
        planned, layers = self.plan.value("adapters"), len(adapted_layers(trainer.model))
        count = trained_count(trainer.model)
        self._compare("layers with an adapter", planned["layers"] if planned["layers"] is not None else layers, layers)
        wanted = planned["trainable_parameters"] if planned["is_exact"] and self.plan.task_folder is None else count
        self._compare("trainable parameters", wanted, self._as_planned(trainer, count, wanted))
        if self.is_writer and not planned["is_exact"]:
            share = count / (self.plan.facts.parameters + count)
            text = f"{layers} layers have an adapter: {count:,} parameters are trained, {share:.2%} of the model"
            self.journal.append("notice", text=text)

    def _dead_adapters(self, trainer: "PlanTrainer") -> None:
        """End before the first update where an adapter gets no gradient: it would never move, and no number show it."""
        dead, cause = dead_adapters(trainer)
        self.checks.append({"what": "adapters without a gradient", "planned": [], "found": dead, "passed": not dead})
        if not dead:
            return
        if self.is_writer:
            self._write(passed=False)
        raise dead_error(dead, len(adapted_layers(trainer.model)), cause)

    def _quantized(self, trainer: "PlanTrainer", own: set[int]) -> None:
        """Quantised layers: how many, and how; and that what is left of the frozen model is fp32."""
        planned = self.plan.value("quantization")
        modules = quantized_modules(trainer.model)
        if planned["layers"] is not None:
            self._compare("quantized layers", planned["layers"], len(modules))
        found = [describe(module) for module in modules.values()]
        wanted = {key: planned[key] for key in (found[0] if found else {"bits": 0})}
        differing = [one for one in found if one != wanted]
        self._compare("quantization", wanted, (differing or [wanted])[0] if found else None)
        packed = {id(module.weight) for module in modules.values()}
        rest = [w for w in trainer.model.parameters() if id(w) in own - packed]
        self._compare("weights that are not quantized", [self._rest_dtype()], findings.dtypes(rest))

    def _rest_dtype(self) -> str:
        """What DeepSpeed's 16-bit engines cast with the adapters; fp32 otherwise."""
        by_deepspeed = self.plan.deepspeed is not None
        return str(self.plan.value("adapter_dtype")) if by_deepspeed else "fp32"

    def _as_planned(self, trainer: "PlanTrainer", count: int, planned: int) -> int:
        """Leave the outputs out that a classifier has for the classes of its data: the plan did not know how many."""
        if self.plan.value("task") != Task.SEQUENCE_CLASSIFICATION:
            return count
        each, labels = findings.output_parameters(trainer.model), trainer.model.config.num_labels
        more = (count - planned) // each if each else 0
        return count - more * each if more < labels else count

    def _has_adapters(self) -> bool:
        return bool(self.plan.value("method") != Method.FULL)

    def _optimizer(self, trainer: "PlanTrainer", engine: Any) -> None:
        plan = self.plan
        planned = str(plan.value("optimizer"))
        made = findings.innermost(engine.optimizer if engine is not None else trainer.optimizer)
        name = type(made).__name__
        # transformers' names are of algorithms and variants (adamw_torch_fused); the class must be of the family.
        families = {"adamw": "adam", "adafactor": "adafactor", "sgd": "sgd", "lion": "lion", "adagrad": "adagrad"}
        family = next((word for key, word in families.items() if key in planned), None)
        if family is not None:
            self._compare("optimizer", planned, planned if family in name.lower() else name)
        started_with = made.param_groups[0].get("initial_lr", made.param_groups[0]["lr"])
        self._compare("learning_rate", float(plan.value("learning_rate")), float(started_with))
        # A fused optimizer of torch, or another library's, rounds as torch does.
        rounding = made.param_groups[0].get("rounding", getattr(made, "rounding", "nearest"))
        if plan.value("rounding") is not None:
            self._compare("rounding", plan.value("rounding"), rounding)
        islands = findings.island_weights(trainer, planned_islands(plan))
        self._compare(
            "master_weights_dtype", [plan.value("master_weights_dtype")], findings.master_dtypes(trainer, islands)
        )

    def _loss(self, trainer: "PlanTrainer") -> None:
        """By which code the loss is computed; and that a chunked one is the model's own, on a few tokens."""
        found = findings.loss(trainer)
        self._compare("loss", self.plan.value("loss"), found)
        if found == "chunked":
            own, chunked = findings.both_losses(trainer)
            are_finite = math.isfinite(own) and math.isfinite(chunked)  # a replay may have weights that are not
            same = abs(own - chunked) <= LOSS_TOLERANCE * abs(own) if are_finite else not math.isfinite(own + chunked)
            self._compare("chunked loss", "the model's own", "the model's own" if same else f"{chunked:g} for {own:g}")

    def _loss_scale(self, trainer: "PlanTrainer", engine: Any) -> None:
        planned = self.plan.value("loss_scale")
        found = findings.loss_scale(trainer, engine)
        if planned is None:
            self._compare("loss scaler", None, found)
            return
        is_static = planned.get("static") is not None
        if found is None or (self.plan.resume_from is not None and not is_static):  # resumed: wherever it had got to
            self._compare("loss scaler", True, found is not None)
        else:
            self._compare("loss_scale", float(planned.get("static") or planned["initial"]), found["scale"])
        if found is None:
            return
        self._compare("loss_scale.dynamic", not is_static, found["is_dynamic"])
        if is_static:
            return
        for key in SCALER_KEYS:
            self._compare(f"loss_scale.{key}", float(planned[key]), found[key])
        for key, otherwise in (("min", found["default_min"]), ("hysteresis", found["default_hysteresis"])):
            self._compare(f"loss_scale.{key}", planned[key] if planned[key] is not None else otherwise, found[key])

    def _deepspeed(self, engine: Any) -> None:
        self._compare("reduce_dtype", self.plan.value("reduce_dtype"), findings.name(engine.communication_data_type))
        self._compare(
            "grad_accum_dtype", self.plan.value("grad_accum_dtype"), findings.name(engine.get_data_types()[1])
        )
        planned = self.plan.value("offload") or {}
        for part, config in (
            ("optimizer", engine.zero_offload_optimizer()),
            ("parameters", engine.zero_offload_param()),
        ):
            found = "none" if config is None else str(getattr(config.device, "value", config.device))
            self._compare(f"offload.{part}", planned.get(part) or "none", found)

    def _backward_of_deepspeed(self, trainer: "PlanTrainer") -> None:
        """What DeepSpeed's settings came to: the gradients that arrived, and the sums that it sent."""
        self._compare("gradient_dtype", [self.plan.value("gradient_dtype")], findings.names(self._gradients.seen()))
        if trainer.args.world_size > 1 and not self.plan.value("compile"):
            self._compare("sums over ranks", [self.plan.value("reduce_dtype")], findings.names(self._sums.seen))

    def _alignment(self, trainer: "PlanTrainer") -> None:
        """Say which matrix sizes the matrix units can't take whole: it costs speed, and is no reason to stop."""
        odd = findings.misaligned(trainer.model, 16 if self.plan.value("fp8") else 8)
        if self.plan.value("task") == Task.SEQUENCE_CLASSIFICATION:  # an output a class: nobody can choose their number
            odd = [found for found in odd if found[1] != trainer.model.config.num_labels]
        if odd and self.is_writer:
            listed = ", ".join(f"{name} {rows} x {columns}" for name, rows, columns in odd[:3])
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            text = f"sizes that are no multiples of {16 if self.plan.value('fp8') else 8} cost speed: {listed}{more}"
            self.journal.append("notice", text=text)
        self.checks.append({"what": "tensor alignment", "planned": None, "found": [name for name, *_ in odd]})

    def _documents(self, trainer: "PlanTrainer") -> None:
        """Measure that documents which share a row don't see one another. Raises UnsupportedError where they do."""
        if self.plan.value("packing") == Packing.BEST_FIT or self.plan.value("padding_free"):
            self.checks.append(check_documents_apart(trainer))

    def _watch_forward(self, trainer: "PlanTrainer") -> None:
        """Watch one forward pass: the first one, or where operators are compiled away, an eager one for this alone."""
        islands = {name for name, dtype in planned_islands(self.plan).items() if dtype == "fp32"}
        modules = findings.planned_modules(trainer)
        self._islands = IslandWatch({name: module for name, module in modules.items() if name in islands})
        self._matmuls = MatmulWatch(findings.matmul_modules(modules, but=islands))
        self._attention = AttentionWatch(trainer.model)
        findings.watch_autocast(trainer, self._note_autocast)
        if self.plan.value("compile"):
            findings.run_eagerly(trainer)
            self._forward()

    def _note_autocast(self, dtype: str | None) -> None:
        self._autocast = dtype

    def _forward(self) -> None:
        plan = self.plan
        self._matmuls.remove()
        self._islands.remove()
        if self._attention is not None:
            self._attention.remove()
        self._compare("autocast_dtype", plan.value("autocast_dtype"), self._autocast)
        seen = self._matmuls.seen()
        wanted = findings.planned_operands(plan, seen)
        found = findings.multiplied_in(seen, wanted)
        wrong = {name: found[name] for name in found if found[name] != wanted[name]}
        planned = "every matrix multiplication as planned"
        differing = ", ".join(f"{name} in {dtype} for {wanted[name]}" for name, dtype in list(wrong.items())[:5])
        self._compare("precision", planned, f"{len(wrong)}: {differing}" if wrong or not found else planned)
        counts: dict[str, int] = {}
        for dtype in found.values():
            counts[str(dtype)] = counts.get(str(dtype), 0) + 1
        self.checks.append({"what": "matrix multiplications", "planned": None, "found": counts})
        for name, operands in self._islands.seen().items():
            dtypes = sorted({dtype for dtype in operands.values() if dtype is not None})
            self._compare(f"island {name}", ["fp32"], dtypes)
        expected = len([dtype for dtype in planned_islands(plan).values() if dtype == "fp32"])
        self._compare("fp32 islands that ran", expected, len(self._islands.seen()))
        kernels = [] if self._attention is None else self._attention.kernels()
        allowed = KERNELS.get(str(plan.value("attention")), ())
        passed = bool(kernels) and set(kernels) <= set(allowed)
        self.checks.append(
            {"what": "attention kernel", "planned": plan.value("attention"), "found": kernels, "passed": passed}
        )

    def _compare(self, what: str, planned: Any, found: Any) -> None:
        self.checks.append({"what": what, "planned": planned, "found": found, "passed": planned == found})

    def _judge(self) -> None:
        wrong = [check for check in self.checks if not check.get("passed", True)]
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
        write_atomically(
            self.report, json.dumps({"passed": passed, "seconds": self.seconds, "checks": self.checks}, indent=2) + "\n"
        )
        if not self._reported or not passed:
            self.journal.append("audit", passed=passed)
        self._reported = True


def _may_be_short(trainer: "PlanTrainer") -> bool:
    """Whether the step under way may have fewer samples than planned: an epoch's last one, at which a resumed attempt
    may begin. Where a stream ends nobody knows before."""
    if not hasattr(trainer.train_dataset, "__len__"):
        return trainer.plan.resume_from is not None
    batches = len(trainer.callback_handler.train_dataloader)
    steps = math.ceil(batches / trainer.args.gradient_accumulation_steps)
    return (trainer.state.global_step + 1) % steps == 0
