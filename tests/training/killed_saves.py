"""The real worker, killed at every point of a save: `killed_saves.py STEP FOLDER RUN ATTEMPT`.

For each point a child is forked, makes the save, and kills itself there; what the run's directory holds then is copied
to FOLDER/01 and so on, and the directory is put back as it was. The worker itself goes on as if nothing had been.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpt.running.run_directory import RunDirectory


def install(step: int, folder: Path) -> None:
    """Put the kills before the save of `step`."""
    from mpt.training.checkpointing import Saver

    save = Saver.save

    def save_after_kills(self: Any, *arguments: Any, **keywords: Any) -> None:
        if self.trainer.state.global_step == step and not folder.exists():
            kill_at_each_point(self.run, step, folder, lambda: save(self, *arguments, **keywords))
        save(self, *arguments, **keywords)

    Saver.save = save_after_kills


def kill_at_each_point(run: RunDirectory, step: int, folder: Path, save: Callable[[], None]) -> None:
    written = run.checkpoints / f".staging-{step}" / f"checkpoint-{step}"
    final = run.checkpoints / written.name
    journal = run.journal.read_bytes()

    def dies(has_come: Callable[[], bool]) -> bool:
        """Whether a child that saves comes to the point; keeps what it leaves there, and puts the run back."""
        child = os.fork()
        if child == 0:
            sys.setprofile(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if has_come() else None)
            save()
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if died:
            shutil.copytree(run.path, folder / f"{len(list(folder.glob('*'))) + 1:02}")
        shutil.rmtree(written.parent, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        run.journal.write_bytes(journal)
        return died

    folder.mkdir()
    files = 1
    while dies(lambda count=files: len(names(written)) >= count):  # type: ignore[misc]
        files += 1
    assert dies(lambda: "manifest.json" in names(written))
    assert dies(final.exists)
    assert dies(lambda: b'"checkpoint_saved"' in run.journal.read_bytes()[len(journal) :])


def names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    from mpt.training.worker import main, quiet_libraries

    quiet_libraries()
    install(int(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
