"""The process that has the model of `mpt chat`: `python -m mpt.training.chat`, started by `mpt.running.chat`.

It reads JSON lines from stdin: first {"plan", "adapter"}, then a conversation each. It answers on stdout in JSON lines:
{"chat_template", "device"} when the model is loaded, {"text"} as it is generated, {"done"} at the end of an answer, and
{"problem", "remedy", "exit_code"} as its last word. SIGINT ends the answer under way.
"""

import json
import os
import signal
import sys
from typing import Any, TextIO

from mpt.errors import MptError
from mpt.secrets import redact_streams
from mpt.training.imports import heavy_imports, leave
from mpt.training.worker import explain, quiet_libraries


class Interrupts:
    """Whether the answer under way is to end."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, *arguments: Any) -> None:
        self.asked = True


def main() -> int:
    """Load, then answer until stdin ends."""
    # Libraries print to stdout; the parent reads JSON there.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    redact_streams(os.environ)
    interrupts = Interrupts()
    try:
        _serve(channel, interrupts)
    except MptError as error:
        _tell(channel, problem=error.problem, remedy=error.remedy, exit_code=int(error.exit_code))
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - a main function: every end has its last word
        import traceback

        traceback.print_exc()
        problem, remedy, code = explain(error)
        _tell(channel, problem=problem, remedy=remedy, exit_code=int(code))
        return code
    return 0


def _serve(channel: TextIO, interrupts: Interrupts) -> None:
    request = json.loads(sys.stdin.readline())
    with heavy_imports():
        quiet_libraries()

        from mpt.planning.plan import Plan
        from mpt.training.answering import Answering

    loaded = Answering(Plan.from_json(request["plan"]), request["adapter"])
    _tell(channel, chat_template=loaded.has_template, device=str(loaded.device))
    for line in sys.stdin:
        interrupts.asked = False  # at once: what comes from here on is meant for this answer
        ended = loaded.answer(
            json.loads(line), tell=lambda text: _tell(channel, text=text), is_over=lambda: interrupts.asked
        )
        _tell(channel, done=ended)


def _tell(channel: TextIO, **what: Any) -> None:
    channel.write(f"{json.dumps(what)}\n")
    channel.flush()


if __name__ == "__main__":
    leave(main())
