"""The command line: which commands there are, and how errors leave the process. No decision is made here.

Start-up is part of the product: a command's module imports what it needs inside the command.
"""

import errno
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from mpt import __version__
from mpt.errors import ExitCode, MptError
from mpt.secrets import redact_streams

app = typer.Typer(
    name="mpt",
    help="Train transformers in the right precision, know why, and keep the run alive.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mpt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train transformers in the right precision, know why, and keep the run alive."""


def _register() -> None:
    from mpt.cli import cache, checkpoints, recipes
    from mpt.cli.chat import chat
    from mpt.cli.check import check
    from mpt.cli.detect_precision import detect_precision
    from mpt.cli.doctor import doctor
    from mpt.cli.eval import evaluate
    from mpt.cli.formats import formats
    from mpt.cli.generate_ds_config import generate_ds_config
    from mpt.cli.plan import plan
    from mpt.cli.replay import replay
    from mpt.cli.report import report
    from mpt.cli.schema import schema
    from mpt.cli.search_precision import search_precision
    from mpt.cli.train import train
    from mpt.cli.validate import validate

    app.command("train")(train)
    app.command("plan")(plan)
    app.command("check")(check)
    app.command("validate")(validate)
    app.add_typer(recipes.app, name="recipes")
    app.add_typer(checkpoints.app, name="checkpoints")
    app.add_typer(cache.app, name="cache")
    app.command("eval")(evaluate)
    app.command("chat")(chat)
    app.command("doctor")(doctor)
    app.command("report")(report)
    app.command("replay")(replay)
    app.command("schema")(schema)
    app.command("detect-precision")(detect_precision)
    app.command("generate-ds-config")(generate_ds_config)
    app.command("search-precision")(search_precision)
    # Values such as -1.5 are arguments, not options.
    app.command("formats", context_settings={"ignore_unknown_options": True})(formats)


_register()


def main() -> NoReturn:
    """Run the command line and end the process with the documented exit code."""
    redact_streams(os.environ)
    if sys.argv[1:2] != ["train"]:
        # A reader that goes away (`mpt plan ... | head`) ends the command quietly. A run must outlive its readers.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
        sys.stdout.flush()
    except MptError as error:
        print(f"error: {error.problem}\n  {error.remedy}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        # Every file that a command reads or writes has its own message; what is left is stdout.
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(
            f"error: stdout can't be written: {error.strerror}\n  Free space there, or write elsewhere.",
            file=sys.stderr,
        )
        sys.exit(ExitCode.STORAGE)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    sys.exit(ExitCode.DONE)
