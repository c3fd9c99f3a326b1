"""A plan as an attempt keeps it, read back for whoever looks at the run later: the doctor, the report, a replay."""

import json
from pathlib import Path

from mpt.errors import StorageError
from mpt.planning.plan import Plan


def read_plan(path: Path) -> Plan:
    """Read a plan.json. Raises StorageError that names the file where it can't be read or is of another mpt."""
    try:
        return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise StorageError(
            f"{path} can't be read: {error.strerror or error}",
            remedy="Mend its permissions, or restore it from a copy.",
        ) from error
    except StorageError as error:
        raise StorageError(
            f"{path}: {error.problem}", remedy="Ask the mpt that made this run, or a later one."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).partition(" [type=")[0].split())
        raise StorageError(
            f"{path} is no plan of this mpt ({type(error).__name__}: {said})",
            remedy="Ask the mpt that made this run, or restore the file from a copy.",
        ) from error
