"""`mpt train`: plan, explain, carry out."""

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpt.errors import MptError

if TYPE_CHECKING:
    from mpt.planning.plan import Plan
    from mpt.running.recovery import Stop
    from mpt.running.run_directory import RunDirectory


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the recipe's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run; the recipe's otherwise.")] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    machine: Annotated[
        str | None,
        typer.Option(help="Plan for this machine: `cpu` keeps off the GPUs; one that is not here needs --dry-run."),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on with a run that exists; never: begin anew; or the name of a checkpoint.")
    ] = "auto",
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with a run though its recipe, machine or data changed.")
    ] = False,
    emit_script: Annotated[
        Path | None,
        typer.Option(help="Write a plain Trainer script of this run here, without mpt, and train nothing."),
    ] = None,
    compare_to: Annotated[
        str | None,
        typer.Option(help="Compare the first steps with fp32, tf32, bf16 or fp16 before the run; as compare.to."),
    ] = None,
    compare_steps: Annotated[
        int | None, typer.Option(help="Steps to compare, 20 unless told; as compare.steps.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="max_loss_gap=0.02 or min_gradient_cosine=0.99: start only within the bound; as compare.require."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout at the end.")] = False,
) -> None:
    """Train a recipe, or go on with a run that was interrupted."""
    overrides = [*(overrides or []), *_compare_overrides(compare_to, compare_steps, require or [])]
    try:
        if emit_script is not None:
            _refuse_beside_script({"--dry-run": dry_run, "--json": as_json})
            _emit_script(recipe, overrides, machine, name, emit_script)
            return
        _train(recipe, overrides, dry_run, name, runs_dir, machine, resume, accept_changes, as_json)
    except MptError as error:
        if as_json:
            counts: dict[str, Any] = {"steps": 0, "train_loss": None, "eval_loss": None, "metrics": {}}
            counts |= {"stopped_early": False, "attempts": 0, "incidents": 0, "loss_scale": None, "skipped_steps": 0}
            refused = {"outcome": "refused", "run_dir": None, **counts, "problem": error.problem}
            _print_result(json.dumps(refused))
        raise


def _compare_overrides(to: str | None, steps: int | None, require: list[str]) -> list[str]:
    """Write the options of the comparison as overrides of the recipe's `compare` block."""
    given = {"to": to, "steps": steps}
    said = [f"compare.{key}={value}" for key, value in given.items() if value is not None]
    return said + [f"compare.require.{bound}" for bound in require]


def _train(
    recipe: str,
    overrides: list[str],
    dry_run: bool,
    name: str | None,
    runs_dir: Path,
    machine: str | None,
    resume: str,
    accept_changes: bool,
    as_json: bool,
) -> None:
    from mpt.cli.plan import make_plan
    from mpt.hardware.packages import installed_packages
    from mpt.measuring.reference import plan_reference
    from mpt.planning.modules import learn_modules
    from mpt.running.opening import locate

    if name is not None:
        locate(runs_dir, name)
    plan = make_plan(recipe, overrides, machine, name)
    packages = installed_packages() if machine is None else None
    if dry_run:
        plan_reference(plan, packages, learn_modules(plan.recipe))  # what the run would refuse is refused here
        _print_dry_run(plan, as_json)
        return

    from mpt.planning.engines import check_trainable
    from mpt.recipe.chat_template import read_template
    from mpt.recipe.sources import check_sources

    run = locate(runs_dir, plan.name)
    _check_machine(plan, machine)
    _explain(plan)
    check_trainable(plan)
    check_sources(plan.recipe.data)
    if plan.recipe.data.chat_template is not None:
        read_template(plan.recipe.data.chat_template)
    check_packages(plan)
    reference = plan_reference(plan, packages, learn_modules(plan.recipe))
    verdict = _carry_out(plan, reference, run, resume, accept_changes)
    _report(run, verdict, as_json)
    if verdict is not None:
        raise typer.Exit(verdict.exit_code)


def _refuse_beside_script(given: dict[str, bool]) -> None:
    """Raise MptError for an option that has no meaning where a script is written and nothing is trained."""
    for option, is_given in given.items():
        if is_given:
            raise MptError(
                f"{option} with --emit-script: a script is written, and no plan or result is printed",
                remedy=f"Leave {option} out; `mpt plan` prints the plan, with --json as one object.",
            )


def _emit_script(recipe: str, overrides: list[str], machine: str | None, name: str | None, path: Path) -> None:
    from mpt.cli.plan import make_plan
    from mpt.planning.engines import check_trainable
    from mpt.planning.script import to_script
    from mpt.running.run_directory import write_atomically

    if path.exists():
        raise MptError(f"{path} exists, and is not overwritten", remedy="Remove it, or name another file.")
    if not path.parent.is_dir():
        raise MptError(f"there is no directory {path.parent}", remedy="Make it, or name a file elsewhere.")
    plan = make_plan(recipe, overrides, machine, name)
    check_trainable(plan)
    write_atomically(path, to_script(plan))
    _say(f"{path} trains the same run without mpt: python {path}")
    compare = plan.recipe.compare
    if compare is not None:
        _say(f"note: the script does not compare with {compare.to} before it trains, as compare.to asks")
    if plan.recipe.sample is not None and plan.recipe.sample.every_eval:
        _say("note: the script generates samples at its end alone, not at each evaluation, as sample.every_eval asks")


def _print_dry_run(plan: "Plan", as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
        return
    from mpt.reporting.plan_table import print_plan

    print_plan(plan)


def _explain(plan: "Plan") -> None:
    from mpt.planning.explain import explain_short

    for subject, sentence in explain_short(plan):
        _say(f"{subject:<13} {sentence}")
    for note in (*plan.machine.notes, *plan.deepspeed_notes):
        _say(f"note: {note}")


def _check_machine(plan: "Plan", asked: str | None) -> None:
    """Refuse to train on a machine that is only named: its plan is for --dry-run."""
    from mpt.errors import UnsupportedError
    from mpt.hardware.detect import detect_machine

    if asked is None or (plan.machine.is_cpu and plan.machine.nodes == 1):
        return
    here = detect_machine(os.environ)
    planned = sorted((device.name, device.compute_capability) for device in plan.machine.devices)
    if plan.machine.nodes == 1 and planned == sorted((d.name, d.compute_capability) for d in here.devices):
        return
    raise UnsupportedError(
        f"--machine {asked} is not this machine, which is {here.label}",
        remedy="Add --dry-run to see its plan, or leave --machine out to train here.",
    )


def check_packages(plan: "Plan") -> None:
    """Raise UnsupportedError where what trains the plan is not installed."""
    from mpt.errors import UnsupportedError
    from mpt.hardware.packages import installed_packages
    from mpt.planning.trackers import choose_trackers

    extras = {"torch": "train", "transformers": "train", "accelerate": "train", "datasets": "train"}
    if plan.deepspeed is not None:
        extras["deepspeed"] = "deepspeed"
    missing = sorted(set(extras) - installed_packages())
    if missing:
        raise UnsupportedError(
            f"training needs packages that are not installed: {', '.join(missing)}",
            remedy=f"pip install 'mpt[{','.join(sorted({extras[package] for package in missing}))}]'",
        )
    choose_trackers(plan.recipe, installed_packages())  # with --machine the plan did not know what is installed


def _carry_out(
    plan: "Plan", reference: "Plan | None", run: "RunDirectory", resume: str, accept_changes: bool
) -> "Stop | None":
    """Open the run, compare it with the reference where one is given, and supervise it; None where it had finished."""
    from mpt.measuring.compare import Gate, pass_gate
    from mpt.reporting.live import live_view
    from mpt.running.opening import opened
    from mpt.running.signals import listening
    from mpt.running.supervisor import supervise

    with listening() as wish, opened(plan, run, resume=resume, accept_changes=accept_changes) as found:
        for note in found.notes:
            _say(note)
        if found.finished:
            _say(f"{run.path} has finished before; --resume never trains it anew")
            return None
        if found.start_from is not None:
            _say(f"going on in {run.path} from {found.start_from.path.name}")
        wish.is_immediate = False
        with live_view() as view:
            if reference is not None:
                refusal = pass_gate(Gate(plan, reference, run, view, wish, os.environ))
                if refusal is not None:
                    return refusal
            return supervise(plan, run, view, wish, os.environ, start_from=found.start_from)


def _report(run: "RunDirectory", verdict: "Stop | None", as_json: bool) -> None:
    from mpt.measuring.compare import read_result
    from mpt.reporting.live import spell_metrics
    from mpt.reporting.samples import gather_samples, last_samples, printable
    from mpt.reporting.summary import summarise
    from mpt.running.journal import read_events
    from mpt.running.recovery import Outcome

    summary = summarise(run) | {"compare": read_result(run)}
    if as_json:
        _print_result(json.dumps(summary))
    if verdict is not None and verdict.outcome is not Outcome.FINISHED:
        _report_unfinished(run, verdict)
        _report_loss_scale(summary)
        return
    samples = gather_samples(read_events(run.journal))
    for sample in last_samples(samples) if samples else ():
        text = re.sub(r"\n{3,}", "\n\n", printable(sample.whole))
        _say(f"\n{text}\n")
    named = (("train", summary["train_loss"]), ("evaluation", summary["eval_loss"]))
    losses = [f"{what} loss {loss:.4f}" for what, loss in named if isinstance(loss, float)]
    losses += [spell_metrics({name: value}).strip() for name, value in summary["metrics"].items()]
    early = " (stopped early)" if summary["stopped_early"] else ""
    _say(f"{summary['steps']} steps{early}: {', '.join(losses) or 'no loss'}")
    _report_loss_scale(summary)
    _say(f"the model is in {run.final}")


def _report_loss_scale(summary: Mapping[str, Any]) -> None:
    from mpt.reporting.live import spell_loss_scale

    if summary["loss_scale"] is not None:
        skipped = f"{summary['skipped_steps']} of {summary['steps']} steps skipped by overflow"
        _say(f"loss scale {spell_loss_scale(summary['loss_scale'])} at the end; {skipped}")


def _report_unfinished(run: "RunDirectory", verdict: "Stop") -> None:
    from mpt.errors import ExitCode
    from mpt.reporting.summary import last_log_lines
    from mpt.running.recovery import Outcome

    if verdict.outcome is Outcome.STOPPED:
        _say(f"stopped: {verdict.reason}")
        _say(f"  {verdict.remedy}")
        return
    _say(f"error: {verdict.reason}")
    if verdict.remedy:
        _say(f"  {verdict.remedy}")
    numbers = run.attempt_numbers()
    if not numbers:
        return
    log = run.attempt(numbers[-1]).log
    if verdict.exit_code in (ExitCode.NO_PROGRESS, ExitCode.HUNG, ExitCode.BUG):
        for line in last_log_lines(log):
            _say(f"  | {line}")
    _say(f"  The full log is {log}")


def _print_result(text: str) -> None:
    """Print to stdout. A reader that went away changes nothing about the run, and so not the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    """Print to stderr, if somebody still listens: the run's outcome is worth more than its report."""
    from contextlib import suppress

    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
