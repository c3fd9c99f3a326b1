"""A plan becomes one command, which needs no free port, obeys no other launcher and can be pasted into a shell."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mpt.planning.plan import Plan
from mpt.running.launcher import Command, Processes, build_command, failed_ranks
from mpt.running.run_directory import RunDirectory
from tests.running.small_runs import SmallRun, is_alive, small_plan, wait_until

RUN = RunDirectory(Path("runs/small"))


def with_cores(plan: Plan, cores: int | None) -> Plan:
    return replace(plan, machine=replace(plan.machine, cpu_cores=cores))


def test_one_process_is_the_worker_itself() -> None:
    command = build_command(small_plan(), RUN, 3, {})
    assert command.argv == (sys.executable, "-m", "mpt.training.worker", "runs/small", "3")


@pytest.mark.fault(11)
def test_several_processes_are_torchrun_without_restarts_on_a_port_of_its_own() -> None:
    first, second = (build_command(small_plan(processes=2), RUN, 1, {}).argv for _ in range(2))
    text = shlex.join(first)
    assert "-m torch.distributed.run --nnodes 1 --nproc-per-node 2 " in text
    assert "--max-restarts 0 " in text
    assert "--rdzv-endpoint 127.0.0.1:0 " in text
    assert first[-5:] == (sys.executable, "-m", "mpt.training.worker", "runs/small", "1")
    assert first != second  # no two attempts meet


@pytest.mark.parametrize(
    ("cores", "processes", "given", "threads"),
    [(8, 1, None, "8"), (8, 2, None, "4"), (1, 2, None, "1"), (8, 1, "3", None)],
)
def test_threads_divide_the_cores_unless_the_user_says_otherwise(
    cores: int, processes: int, given: str | None, threads: str | None
) -> None:
    environment = {} if given is None else {"OMP_NUM_THREADS": given}
    command = build_command(with_cores(small_plan(processes=processes), cores), RUN, 1, environment)
    assert command.environment.get("OMP_NUM_THREADS") == threads


def test_the_user_s_own_settings_stay() -> None:
    kept = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    assert not build_command(small_plan(), RUN, 1, kept).environment.keys() & kept.keys()


def test_what_another_launcher_left_in_the_shell_does_not_reach_the_worker(tmp_path: Path) -> None:
    left = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "PET_NPROC_PER_NODE": "4",
        "ACCELERATE_MIXED_PRECISION": "fp8",
    }
    environment = {**os.environ, **left}
    command = build_command(small_plan(), RUN, 1, environment)
    assert set(command.without) == set(left)
    files = RunDirectory(tmp_path).attempt(1)
    files.path.mkdir(parents=True)
    seen = tmp_path / "seen"
    ask = f"import json, os, pathlib; pathlib.Path({str(seen)!r}).write_text(json.dumps(dict(os.environ)))"
    processes = Processes(replace(command, argv=(sys.executable, "-c", ask)), files, environment)
    wait_until(lambda: not processes.is_running)
    assert processes.end() == 0
    assert not json.loads(seen.read_text()).keys() & left.keys()


def test_the_command_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    show = "import os, sys; print(os.environ['A B'] if 'A B' in os.environ else os.environ['A'], sys.argv[1:])"
    command = Command((sys.executable, "-c", show, "a path/with 'quotes'"), {"A": "two words; $HOME"}, ("RANK",))
    done = subprocess.run(["bash", "-c", str(command)], capture_output=True, text=True, check=True)
    assert done.stdout == "two words; $HOME [\"a path/with 'quotes'\"]\n"


def test_the_log_holds_what_the_child_says_and_the_status_is_given(tmp_path: Path) -> None:
    files = RunDirectory(tmp_path).attempt(1)
    say = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(17)"
    processes = Processes(Command((sys.executable, "-c", say), {}), files, os.environ)
    wait_until(lambda: not processes.is_running)
    assert processes.end() == 17
    assert sorted(files.log.read_text().split()) == ["err", "out"]
    assert files.command.read_text().startswith("env ")


def test_ending_leaves_no_process_whatever_session_it_is_in(tmp_path: Path) -> None:
    files = RunDirectory(tmp_path).attempt(1)
    spawn = (
        "import subprocess, sys, time, pathlib\n"
        "children = [subprocess.Popen(['sleep', '300'], start_new_session=new).pid for new in (False, True)]\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pids').write_text(' '.join(map(str, children)) + ' .')\n"
        "time.sleep(300)\n"
    )
    processes = Processes(Command((sys.executable, "-c", spawn), {}), files, os.environ)
    pids = tmp_path / "pids"
    wait_until(lambda: pids.exists() and pids.read_text().endswith("."))
    children = [int(pid) for pid in pids.read_text().split()[:-1]]
    assert all(map(is_alive, children))
    assert processes.end() == -9
    assert not any(map(is_alive, children))


REPORT = """
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 11)  (SIGTERM)
[2]:
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 13)
Root Cause (first observed failure):
[0]:
  rank      : 3 (local_rank: 3)
  exitcode  : {code} (pid: 12)
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (REPORT.format(code=-9), [(3, -9), (1, 1)]),
        (REPORT.format(code=-11), [(3, -11), (1, 1)]),
        (REPORT.format(code=17), [(3, 17), (1, 1)]),
        (REPORT.format(code=-15), [(1, 1)]),
        ("no report", []),
        ("", []),
    ],
)
def test_torchrun_s_report_names_the_ranks_that_failed_the_first_one_first(
    tmp_path: Path, text: str, found: list[tuple[int, int]]
) -> None:
    log = tmp_path / "worker.log"
    log.write_text("a line\n" * 5000 + text)
    assert failed_ranks(log) == found


@pytest.mark.slow
@pytest.mark.fault(11)
def test_two_processes_start_though_the_usual_ports_are_taken(new_run: Callable[..., SmallRun]) -> None:
    run = new_run(steps=5)
    run.environment = {"MASTER_PORT": "29500", "MASTER_ADDR": "127.0.0.1", "RANK": "7", "WORLD_SIZE": "9"}
    taken = []
    for port in (29400, 29500):
        probe = socket.socket()
        taken.append(probe)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        probe.listen()
    try:
        ended = run.train("processes=2", timeout=200)
    finally:
        for probe in taken:
            probe.close()
    assert (ended.code, ended.summary["attempts"]) == (0, 1), ended.err
