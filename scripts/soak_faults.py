"""The faults that a soak throws at a run: each comes from outside, by a signal, a limit, or a hand on the run's files.

A fault is a function of the run and a seeded chance. It acts, sees the run through until a new attempt is on its way
(or none is needed), and says in a few words what it did.
"""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from soak_run import Broken, SoakRun

from mpt.running import checkpoints
from mpt.running.manifest import MANIFEST, digest, hash_file, read_manifest

# So much more than journal, metrics and log hold by now may be written, and an optimizer.pt has 2 MiB.
ROOM = 256 * 1024
Fault = Callable[[SoakRun, random.Random], str]


# --- processes


def kill_a_worker(run: SoakRun, chance: random.Random) -> str:
    return _kill_a_rank(run, chance)


def kill_the_supervisor(run: SoakRun, chance: random.Random) -> str:
    _kill_supervisor(run)
    _start_again(run)
    return "kill -9 of the supervisor"


def kill_a_worker_in_a_save(run: SoakRun, chance: random.Random) -> str:
    _wait_for_save(run, chance)
    return f"{_kill_a_rank(run, chance)} in a save"


def kill_the_supervisor_in_a_save(run: SoakRun, chance: random.Random) -> str:
    _wait_for_save(run, chance)
    return f"{kill_the_supervisor(run, chance)} in a save"


def kill_while_loading(run: SoakRun, chance: random.Random) -> str:
    """At any moment from the first process of an attempt to its first step."""
    _kill_a_rank(run, chance)
    time.sleep(chance.uniform(0, 4))
    return f"{_kill_a_rank(run, chance)} twice, the second time while loading"


def stop_and_go_on(run: SoakRun, chance: random.Random) -> str:
    assert run.supervisor is not None
    number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    run.supervisor.send_signal(number)
    _end_with(run, (80, 0))
    _start_again(run)
    return number.name


def stop_twice(run: SoakRun, chance: random.Random) -> str:
    assert run.supervisor is not None
    for wait in (chance.uniform(0.55, 0.8), 0):
        run.supervisor.send_signal(signal.SIGTERM)
        time.sleep(wait)
        if run.code is not None:
            break
    _end_with(run, (80, 143, 0))
    _start_again(run)
    return "SIGTERM twice"


def freeze_a_rank(run: SoakRun, chance: random.Random) -> str:
    attempt = run.attempt
    os.kill(_pid_of_a_rank(run, chance), signal.SIGSTOP)
    _await_next_attempt(run, attempt)
    return "SIGSTOP of a rank"


def freeze_the_supervisor(run: SoakRun, chance: random.Random) -> str:
    assert run.supervisor is not None
    run.supervisor.send_signal(signal.SIGSTOP)
    time.sleep(chance.uniform(0.1, 2))
    run.supervisor.send_signal(signal.SIGCONT)
    return "SIGSTOP of the supervisor, for a while"


# --- files


def damage_the_newest(run: SoakRun, chance: random.Random) -> str:
    """Where another one is sound: what stands or falls with the one that is left is no fault to survive."""
    path = _newest_of_two(run)
    name, what = chance.choice([*((name, "flip") for name in ("model.safetensors", "optimizer.pt", "rng_state.pth")),
                                ("model.safetensors", "cut"), ("optimizer.pt", "delete"), ("scheduler.pt", "delete"),
                                ("trainer_state.json", "empty"), (MANIFEST, "cut"), (MANIFEST, "delete")])  # fmt: skip
    _damage(path / _of_a_rank(path, name), what, chance)
    said = kill_the_supervisor(run, chance) if chance.random() < 0.3 else _kill_a_rank(run, chance)
    return f"{what} {name} of the newest checkpoint, and {said}"


def poison_the_newest(run: SoakRun, chance: random.Random) -> str:
    """A weight that is no number, in a checkpoint whose manifest fits it: as if it had gone bad before it was saved."""
    _kill_supervisor(run)
    path = _newest_of_two(run)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
    manifest = read_manifest(path)
    manifest["files"][weights.name]["xxh3_128"] = hash_file(weights)
    manifest["digest"] = digest(manifest)
    path.joinpath(MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _start_again(run)
    _await_next_attempt(run, run.attempt)
    return "a weight of the newest checkpoint is no number"


def tear_the_journal(run: SoakRun, chance: random.Random) -> str:
    """As a kill amid a write leaves it."""
    _kill_supervisor(run)
    for path in (run.directory.journal, run.directory.metrics):
        with path.open("rb+") as file:
            last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
            file.write(last[: chance.randint(1, len(last) - 1)])
    _start_again(run)
    return "kill -9 of the supervisor, journal and metrics torn"


def fill_the_disk(run: SoakRun, chance: random.Random) -> str:
    """No file that a rank writes may grow beyond what the run's own records need, until a save has failed."""
    attempt, pids = run.attempt, _pids(run)
    written = (run.directory.journal, run.directory.metrics, run.directory.attempt(attempt).log)
    limit = max(path.stat().st_size for path in written) + ROOM
    before = _count(run, "save_failed")
    hard = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE)[1] for pid in pids}
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard[pid]))
    run.until(lambda: _count(run, "save_failed") > before or run.code is not None, "no save fails on a full disk")
    try:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard[pid], hard[pid]))
    except ProcessLookupError:
        pass  # it has given up by now
    if run.code is None and _count(run, "failed") == 0:
        return "the disk full, until a save failed"
    _end_with(run, (83, 0))
    _start_again(run)
    return "the disk full, for too long"


def scramble_the_times(run: SoakRun, chance: random.Random) -> str:
    for _, path in checkpoints.list_checkpoints(run.directory):
        moment = chance.uniform(0, 4e9)
        os.utime(path, (moment, moment))
    return f"the times of all checkpoints scrambled, and {_kill_a_rank(run, chance)}"


# How often each comes, in a hundred.
FAULTS: dict[Fault, int] = {
    kill_a_worker: 18,
    kill_the_supervisor: 10,
    kill_a_worker_in_a_save: 16,
    kill_the_supervisor_in_a_save: 8,
    kill_while_loading: 6,
    stop_and_go_on: 8,
    stop_twice: 3,
    freeze_a_rank: 6,
    freeze_the_supervisor: 3,
    damage_the_newest: 14,
    poison_the_newest: 2,
    tear_the_journal: 6,
    fill_the_disk: 6,
    scramble_the_times: 4,
}


def _kill_supervisor(run: SoakRun) -> None:
    assert run.supervisor is not None
    run.supervisor.kill()
    run.end()


def _start_again(run: SoakRun) -> None:
    """Start the same command again, and see its first attempt begin."""
    attempt = run.attempt
    run.start()
    _await_next_attempt(run, attempt)


def _kill_a_rank(run: SoakRun, chance: random.Random) -> str:
    attempt = run.attempt
    try:
        os.kill(_pid_of_a_rank(run, chance), signal.SIGKILL)
    except ProcessLookupError:
        return "kill -9 of a worker that had just ended"
    _await_next_attempt(run, attempt)
    return "kill -9 of a worker"


def _await_next_attempt(run: SoakRun, after: int) -> None:
    run.until(lambda: run.attempt > after or run.code is not None, "no other attempt is begun")


def _end_with(run: SoakRun, allowed: tuple[int, ...]) -> None:
    code = run.end()
    if code not in allowed:
        raise Broken(f"the exit code is {code}, and should be one of {', '.join(map(str, allowed))}")


def _pids(run: SoakRun) -> list[int]:
    run.until(lambda: all(beat is not None for beat in run.beats()) or run.code is not None, "a rank does not begin")
    return [beat.pid for beat in run.beats() if beat is not None]


def _pid_of_a_rank(run: SoakRun, chance: random.Random) -> int:
    pids = _pids(run)
    if not pids:
        raise ProcessLookupError
    return chance.choice(pids)


def _wait_for_save(run: SoakRun, chance: random.Random) -> None:
    def is_saving() -> bool:
        beat = run.beats()[0]
        return (beat is not None and beat.phase == "saving") or run.code is not None

    run.until(is_saving, "nothing is saved", every=0.001)
    time.sleep(chance.uniform(0, 0.15))


def _newest_of_two(run: SoakRun) -> Path:
    run.until(lambda: len(run.sound()) > 1, "there are no two sound checkpoints", every=0.05)
    return run.sound()[-1]


def _of_a_rank(path: Path, name: str) -> str:
    """With several ranks there is a random state for each."""
    return name if path.joinpath(name).exists() else f"{name.partition('.')[0]}_0.pth"


def _damage(path: Path, what: str, chance: random.Random) -> None:
    if what == "delete":
        path.unlink()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "cut":
        os.truncate(path, chance.randrange(1, path.stat().st_size))
    else:
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)


def _count(run: SoakRun, kind: str) -> int:
    attempt = run.attempt
    return sum(event["kind"] == kind and event["attempt"] == attempt for event in run.events())
