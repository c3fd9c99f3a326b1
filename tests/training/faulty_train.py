"""`mpt train` with a faulty worker: `python -m tests.training.faulty_train FAULT train RECIPE ...`, FAULT as in
`faulty_worker.py`. Only the command of the worker differs; all above it is mpt's own."""

import functools
import sys

from mpt.cli.main import main
from mpt.running.launcher import build_command
from mpt.running.supervisor import supervise

if __name__ == "__main__":
    worker = (sys.executable, "-m", "tests.training.faulty_worker", sys.argv.pop(1))
    supervise.__kwdefaults__["build"] = functools.partial(build_command, worker=worker)
    main()
