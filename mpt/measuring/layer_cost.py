"""What a linear layer costs in each format: measured where the device computes it, else reckoned. Pure."""

from collections.abc import Mapping, Sequence

from mpt.measuring.precision_policy import widest_first

BITS = {"fp32": 32, "bf16": 16, "fp8": 8}
MATMULS_A_STEP = 3  # the output, the input gradient, the weight gradient
MATMULS_FROZEN = 2  # the weight gradient of frozen weights is never computed
SOURCES = {
    "measured": "timed on this device, forward and backward, in turns, the median",
    "table": "by the ratio of the peaks in the hardware table",
    "assumed": "half the time for half the bits: neither measured nor in the hardware table",
}


def layer_flops(rows: int, inputs: int, outputs: int, *, is_frozen: bool = False) -> float:
    """Count the floating-point operations of a layer in a training step: 2 x rows x inputs x outputs for each matmul.

    `is_frozen`: its weights are not trained, as under adapters.

    >>> layer_flops(4096, 4096, 4096) / 1e9
    412.316860416
    """
    return 2.0 * (MATMULS_FROZEN if is_frozen else MATMULS_A_STEP) * rows * inputs * outputs


def reckon_costs(
    flops: float, seconds: Mapping[str, float], peaks: Mapping[str, float], candidates: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Give a layer's cost by format, and where each comes from (a key of `SOURCES`).

    `seconds` are the formats that were timed, `peaks` TFLOP/s by format. A format that was not timed costs what the
    next wider one costs, times the ratio of their peaks. Costs are seconds, save where nothing at all is known: then
    they are those of a device with 1 TFLOP/s in the widest format.

    >>> reckon_costs(1e12, {}, {"fp32": 20, "bf16": 80}, ["fp32", "bf16", "fp8"])[0]
    {'fp32': 0.05, 'bf16': 0.0125, 'fp8': 0.00625}
    """
    costs: dict[str, float] = {}
    sources: dict[str, str] = {}
    wider: str | None = None
    for precision in widest_first(candidates):
        if precision in seconds:
            costs[precision], sources[precision] = seconds[precision], "measured"
        elif wider is None:
            costs[precision] = flops / (peaks.get(precision, 1.0) * 1e12)
            sources[precision] = "table" if precision in peaks else "assumed"
        elif wider in peaks and precision in peaks:
            costs[precision], sources[precision] = costs[wider] * peaks[wider] / peaks[precision], "table"
        else:
            costs[precision], sources[precision] = costs[wider] * BITS[precision] / BITS[wider], "assumed"
        wider = precision
    return costs, sources
