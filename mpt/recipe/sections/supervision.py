"""What happens when processes or numbers fail: restarts, recovery, and the limits of health."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpt.recipe.scalars import Duration, Flag, Integer, Number
from mpt.recipe.sections.base import PositiveInt, Section


class RestartSection(Section):
    """What the supervisor does about crashes, hangs, too little memory, and time that runs out. Durations are seconds,
    or written as 90s, 30m, 12h, 2d; a limit of 0 is none."""

    max_restarts: Annotated[Integer, Field(ge=0)] = 20
    """Restarts from the last complete checkpoint, in all; after them the run ends with exit code 82."""
    max_attempts_without_progress: PositiveInt = 3
    """Attempts in a row without a newer checkpoint; after them the run ends with exit code 82, whatever restarts are
    left. An attempt that ended for a change of plan does not count."""
    backoff: Duration = 5.0
    """Pause before the second restart in a row without a newer checkpoint; it doubles each time, up to 5 minutes."""
    halve_micro_batch: Flag = True
    """Go on with half the micro batch, and twice the accumulation, after running out of memory. The global batch and
    the order of the data stay. False: exit code 86 at once."""
    step_timeout: Duration = 600.0
    """Silence within training after which a rank is taken to hang: this, or 5 times the longest silence so far. Each
    micro batch breaks it. The stacks of all ranks are written down, and the run restarts."""
    first_step_timeout: Duration = 1800.0
    """The same for the first step of an attempt, in which kernels are compiled."""
    loading_timeout: Duration = 7200.0
    """The same until training begins: loading libraries, preparing data, building the model."""
    phase_timeout: Duration = 1800.0
    """The same while saving, generating a sample, or evaluating, where each batch breaks the silence."""
    time_limit: Duration | None = None
    """How long this command may run, at most to the SLURM_JOB_END_TIME of a Slurm job. Left out: that, or for ever."""
    stop_before: Duration | None = None
    """Save and end with exit code 80 when only this much of the time is left: longer than a step and a save take. Left
    out: the scheduler's signal is waited for."""

    @model_validator(mode="after")
    def _there_is_time(self) -> Self:
        if self.time_limit is not None and self.stop_before is None:
            raise ValueError("time_limit says when to end, and stop_before how long before to save; add stop_before")
        if self.time_limit is not None and self.time_limit <= (self.stop_before or 0):
            raise ValueError("stop_before is no shorter than time_limit, so that nothing would run; write less")
        return self


class RecoverySection(Section):
    """What is done where the numbers go bad for good: the run goes back to a checkpoint that is known to be good, and
    on from there under the next of these changes. After the last it ends with exit code 81 and says what was tried."""

    rungs: list[Literal["retry", "exclude_data", "lower_learning_rate", "raise_precision"]] = Field(
        default=["retry", "exclude_data", "lower_learning_rate", "raise_precision"]
    )
    """In this order. retry: unchanged, once for an event at a position. exclude_data: without the samples around the
    event, for good; three times at most, and not for streamed data. lower_learning_rate: twice at most.
    raise_precision: fp8, mxfp8, fp16 and bf16_pure to bf16 where it is native, else to fp32; bf16 to fp32. A loss scale
    that can give no more room and an fp16 overflow in the forward pass come to raise_precision at once. An empty list:
    exit code 81 at once."""
    margin: Annotated[Integer, Field(ge=0)] = 100
    """Steps before the event's first one that a known-good checkpoint must lie, where there is such a one."""
    exclude_batches: PositiveInt = 200
    """Global batches that exclude_data leaves out, a quarter of them before the event; at most 2 % of an epoch (or 8,
    where that is more) and half of it."""
    learning_rate_factor: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """What the learning rate is multiplied by."""
    rewarm_steps: Annotated[Integer, Field(ge=0)] = 100
    """Steps in which a lowered learning rate is warmed up again."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.rungs)) != len(self.rungs):
            raise ValueError("rungs names one twice; each is climbed as often as it may be anyway")
        if "lower_learning_rate" not in self.rungs and {"learning_rate_factor", "rewarm_steps"} & self.model_fields_set:
            raise ValueError("learning_rate_factor and rewarm_steps are for lower_learning_rate; add it to rungs")
        if "exclude_data" not in self.rungs and "exclude_batches" in self.model_fields_set:
            raise ValueError("exclude_batches is for exclude_data; add it to rungs")
        return self


class HealthSection(Section):
    """What the run's numbers may do before something is done about them. Non-finite numbers never reach the weights,
    whatever stands here. To roll back is to end the attempt at the numbers, before they spoil a checkpoint."""

    spikes: Flag = True
    """Judge finite losses and gradient norms too, by their last values. False: only what is not finite, or dead."""
    window: PositiveInt = 128
    """Accepted values that a new one is compared with: their median, and their median absolute deviation x 1.4826 as
    sigma (at least 0.5 % of the median)."""
    min_seen: Annotated[Integer, Field(ge=2)] = 32
    """Values that must have been seen before any is judged."""
    spike_sigmas: Annotated[Number, Field(gt=0)] = 8.0
    """A logarithm of the gradient norm this many sigma above its median is clipped to the median. A loss that is, and
    10 % above its median too, is high; 3 high ones of 5 open an event."""
    max_clips: PositiveInt = 16
    """Steps in a row clipped that way; the next one is taken for the new level."""
    settle_steps: Annotated[Integer, Field(ge=16)] = 64
    """Steps that an event of the loss gets to pass by itself."""
    settle_sigmas: Annotated[Number, Field(gt=0)] = 4.0
    """Roll back where the median of the last 16 losses is still this many sigma up after that."""
    runaway_factor: Annotated[Number, Field(gt=1)] = 3.0
    """Roll back at once where the loss is over this many times its median for 8 steps in a row; and, however slowly it
    rose, where the median of the last 16 losses is over this many times the lowest that it was, and above where the run
    began. A causal_lm whose loss rises from its first step on is held against ln(vocabulary)."""
    max_bad_in_a_row: PositiveInt = 3
    """Roll back at this many steps in a row whose loss or gradient is not finite; fewer are left out. A loss that is
    not finite in fp16 rolls back at once: loss scaling comes after the forward pass."""
    max_bad_in_1000: Annotated[Integer, Field(ge=0, lt=1000)] = 10
    """Roll back where more of the last 1000 steps than these were not finite."""
    max_overflows_in_a_row: PositiveInt = 18
    """Roll back at this many steps in a row whose gradient overflows in fp16, as from a first scale of 65536; a higher
    one gets a step more for each halving. An overflow at a scale of 1 or less rolls back at once."""
    max_overflow_share: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Roll back where gradients overflowed in more than this share of the last 200 steps."""
    max_steps_without_update: PositiveInt = 50
    """Roll back where this many steps in a row changed no weight, for whatever reason."""
    dead_after: PositiveInt = 50
    """Roll back where for this many updates every gradient is exactly 0, or the loss rests within 0.1 % of
    ln(vocabulary) after it had been 1 % lower; if it never had, 5 times as many."""

    known_good_after: PositiveInt = 100
    """Healthy updates in a row after which an earlier checkpoint counts as known to be good."""

    @model_validator(mode="after")
    def _judges_what_it_has_seen(self) -> Self:
        judging = {
            "window", "min_seen", "spike_sigmas", "max_clips", "settle_steps", "settle_sigmas", "runaway_factor",
        }  # fmt: skip
        idle = sorted(judging & self.model_fields_set)
        if not self.spikes and idle:
            raise ValueError(f"spikes is false, and {', '.join(idle)} say how spikes are judged; remove them or spikes")
        if self.window < self.min_seen:
            raise ValueError(
                f"window is {self.window}, below min_seen {self.min_seen}: nothing would ever be judged; "
                "raise window, or lower min_seen"
            )
        if self.settle_sigmas > self.spike_sigmas:
            raise ValueError(
                f"settle_sigmas is {self.settle_sigmas:g}, above spike_sigmas {self.spike_sigmas:g}: "
                f"an event would be over as it opens; write at most {self.spike_sigmas:g}"
            )
        return self

    @model_validator(mode="after")
    def _rows_can_end(self) -> Self:
        for key in ("max_bad_in_a_row", "max_overflows_in_a_row"):
            row = getattr(self, key)
            if key in self.model_fields_set and row > self.max_steps_without_update:
                raise ValueError(
                    f"{key} is {row}, and a run ends after max_steps_without_update {self.max_steps_without_update} "
                    f"anyway; write at most {self.max_steps_without_update}, or raise that"
                )
        return self
