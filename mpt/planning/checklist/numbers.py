"""Points about number formats: the rate at which matrices multiply, and what must not be rounded away. Pure."""

from mpt.planning.checklist.point import Case, Verdict, not_applicable, ticked, to_gain
from mpt.planning.float8 import pays
from mpt.planning.plan import Plan
from mpt.planning.speed import head_flops, linear_flops, matmul_seconds, peak_tflops
from mpt.terms import Feature, Method, Precision

WIDE = (Precision.FP32, Precision.TF32)
EMULATED = "EMULATED"


def sixteen_bit(case: Case) -> Verdict:
    """Whether the matrices multiply in the 16 bits that the device has units for."""
    plan, decision = case.plan, case.plan.values["precision"]
    mode = Precision(decision.value)
    is_emulated = decision.reason.startswith(EMULATED)
    if mode not in WIDE and not is_emulated:
        if (
            mode is Precision.FP16
            and not plan.machine.is_cpu
            and not plan.machine.all_compute(Feature.FP16_TENSOR_CORES)
        ):
            return ticked("fp16, at half the bytes; these devices have no tensor cores, so it is hardly faster")
        return ticked(f"{mode}: {decision.reason}")
    best = case.anew({"precision": None})
    if best is None or (Precision(best.value("precision")) in WIDE and not is_emulated):
        return not_applicable(decision.reason if best is None else best.values["precision"].reason)
    instead = best.value("precision")
    keys = mode_keys(plan, Precision(instead))
    return to_gain(
        f"{mode}: {decision.reason}",
        keys,
        memory_gib=case.freed_gib(case.with_only(keys)),
        speed=None if is_emulated else _ratio(plan, Precision(instead)),
        gain="what is emulated here is slower than fp32" if is_emulated else _rates(plan, mode, Precision(instead)),
    )


def tf32(case: Case) -> Verdict:
    """Whether what is left in fp32 may use the tensor cores."""
    plan, decision = case.plan, case.plan.values["tf32"]
    if decision.value:
        return ticked(decision.reason)
    if plan.value("precision") == Precision.FP32 and plan.machine.all_compute(Feature.TF32):
        return to_gain(
            "fp32 was asked for, and means fp32",
            mode_keys(plan, Precision.TF32),
            memory_gib=0.0,
            speed=_ratio(plan, Precision.TF32),
            gain=f"factors keep 10 bits of mantissa; {_rates(plan, Precision.FP32, Precision.TF32)}",
        )
    return not_applicable(decision.reason)


def fp8(case: Case) -> Verdict:
    """Whether fp8 would pay: natively, in large enough matrices, whose share of the step is told."""
    plan = case.plan
    mode, machine, facts = Precision(plan.value("precision")), plan.machine, plan.facts
    if plan.value("fp8") is not None:
        fp8 = plan.values["fp8"]
        return not_applicable(fp8.reason) if fp8.value["emulated"] else ticked(fp8.reason)
    if not machine.all_compute(Feature.FP8):
        return not_applicable(f"{machine.label} has no fp8 units")
    if plan.value("method") != Method.FULL:
        return not_applicable("adapters: the frozen weights are stored for use in 16 bits or fewer")
    inner, hidden = facts.intermediate_size, facts.hidden_size
    odd = [f"{name} {size}" for name, size in (("hidden_size", hidden), ("intermediate_size", inner)) if size % 16]
    if odd:
        return not_applicable(f"{', '.join(odd)}: fp8 kernels need multiples of 16")
    if not (pays("rowwise", hidden, inner) or pays("tensorwise", inner, hidden)):
        return not_applicable(
            f"matrices of {hidden} x {inner} are too small to gain (torchao's rule, measured on an H100)"
        )
    share = linear_flops(plan) / (linear_flops(plan) + head_flops(plan))
    return to_gain(
        f"{mode} leaves the fp8 units idle; {share:.0%} of the weights' multiplications could use them",
        mode_keys(plan, Precision.FP8),
        speed=_ratio(plan, Precision.FP8),
        gain="with torch.compile, which it needs; held against bf16 first by `mpt train --compare-to bf16`",
    )


def loss_scale(case: Case) -> Verdict:
    """Whether fp16's loss scale can follow the gradients."""
    decision = case.plan.values["loss_scale"]
    if decision.value is None:
        return not_applicable(decision.reason)
    if decision.value.get("static") is not None:
        return to_gain(
            f"a fixed scale of {decision.value['static']:g}: gradients that grow overflow, and smaller ones vanish",
            {"precision": "fp16"},
            memory_gib=0.0,
            gain="no more steps lost than it takes to find the scale (Micikevicius et al. 2018, section 3.2)",
        )
    return ticked(decision.reason)


def master_weights(case: Case) -> Verdict:
    """Whether an update below half a unit in the last place of a weight survives."""
    plan = case.plan
    if plan.value("method") != Method.FULL:
        return ticked(f"the adapters are {plan.value('adapter_dtype')}; the frozen weights take no update")
    if plan.value("precision") != Precision.BF16_PURE:
        masters = plan.values["master_weights_dtype"]
        return ticked(f"{masters.value} weights take the updates: {masters.reason}")
    if plan.value("rounding") != "nearest":
        how = plan.value("rounding") or f"{plan.value('master_weights_dtype')} copies in the optimizer"
        return ticked(f"bf16 weights, {how}: {plan.values['rounding'].reason}")
    keys = {"precision.rounding": "stochastic"}
    return to_gain(
        plan.values["rounding"].reason,
        keys,
        memory_gib=case.freed_gib(case.with_only(keys)),
        gain="updates that count on average (Zamirai et al. 2020)",
    )


def mode_keys(plan: Plan, mode: Precision) -> dict[str, str]:
    """Say how the recipe asks for a mode, the rest of its precision block kept."""
    has_more = plan.recipe.precision.model_fields_set - {"mode"}
    return {"precision.mode" if has_more else "precision": mode.value}


def _ratio(plan: Plan, instead: Precision) -> float | None:
    """How many times as fast a step's multiplications are in another precision, at the peak rates."""
    now, then = matmul_seconds(plan), matmul_seconds(plan, instead)
    return None if now is None or not then else now / then


def _rates(plan: Plan, now: Precision, then: Precision) -> str:
    rates = (peak_tflops(plan.machine, now), peak_tflops(plan.machine, then))
    if rates[0] is None or rates[1] is None:
        return "the peak rates of these devices are not in the table"
    return f"{rates[1]:g} TFLOP/s at peak instead of {rates[0]:g}"
