"""How many processes tokenise. Pure."""

from typing import Literal

from mpt.hardware.machine import Machine
from mpt.planning.decision import Decision, Origin

# Each takes 200 MB of the host's memory, and what they read comes from one disk.
MOST = 32


def choose_data_workers(asked: Literal["auto"] | int, machine: Machine) -> Decision[int]:
    """Decide: what was asked for, or one a core of a node, whose other ranks wait meanwhile."""
    if asked != "auto":
        return Decision(asked, Origin.ASKED, "the recipe asks for it")
    if machine.cpu_cores is None:
        return Decision(1, Origin.AUTO, "how many cores there are is not known")
    workers = max(1, min(machine.cpu_cores, MOST))
    return Decision(workers, Origin.AUTO, "one for each core" if workers == machine.cpu_cores else "more gain little")
