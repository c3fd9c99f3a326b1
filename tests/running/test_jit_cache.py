"""A lock that a killed compilation left is removed, one that somebody works under never."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpt.running.jit_cache import builds, cache_root, remove_stale_locks
from tests.running.small_runs import SmallRun, wait_until

# As torch/utils/file_baton.py takes it, and as its owner holds it.
HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def extension(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "py311_cpu" / "shm_comm"
    folder.mkdir(parents=True)
    return folder


def test_the_cache_is_where_torch_has_it() -> None:
    assert cache_root({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    assert cache_root({"XDG_CACHE_HOME": "/y"}) == Path("/y/torch_extensions")
    assert cache_root({}) == Path.home() / ".cache" / "torch_extensions"


def test_a_lock_is_kept_while_its_owner_lives_and_removed_after_it_was_killed(extension: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(extension / "lock")], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    owner.stdout.readline()
    assert builds(extension.parents[1]) == [extension]
    assert remove_stale_locks(extension.parents[1]) == []
    owner.kill()
    owner.communicate()
    assert builds(extension.parents[1]) == [extension]
    assert remove_stale_locks(extension.parents[1]) == [extension]
    assert builds(extension.parents[1]) == []


def test_a_compiler_that_outlives_its_owner_keeps_the_lock(extension: Path) -> None:
    (extension / "lock").touch()
    (extension / "build").mkdir()
    with subprocess.Popen(["sleep", "60"], cwd=extension / "build") as compiler:
        assert remove_stale_locks(extension.parents[1]) == []
        compiler.kill()
    assert remove_stale_locks(extension.parents[1]) == [extension]


def test_extensions_are_found_with_and_without_torch_s_own_level(tmp_path: Path) -> None:
    for folder in ("direct", "py311_cu130/nested"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "lock").touch()
    assert len(builds(tmp_path)) == 2
    assert builds(tmp_path / "missing") == []


def test_a_deepspeed_run_clears_a_stale_lock_and_says_so(new_run: Callable[..., SmallRun], extension: Path) -> None:
    (extension / "lock").touch()
    run = new_run()
    run.environment = {"TORCH_EXTENSIONS_DIR": str(extension.parents[1])}
    ended = run.train("zero_stage=1")
    assert ended.code == 0, ended.err
    assert "removed the lock" in ended.err
    assert run.kinds("jit_lock_removed", "folder") == [str(extension)]
    assert not (extension / "lock").exists()
    assert run.directory.attempt(1).deepspeed.exists()


def test_a_compilation_is_shown_while_it_runs(new_run: Callable[..., SmallRun], extension: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(extension / "lock")], stdout=subprocess.PIPE) as owner:
        wait_until((extension / "lock").exists)
        run = new_run(setup_s=1.5)
        run.environment = {"TORCH_EXTENSIONS_DIR": str(extension.parents[1])}
        ended = run.train("zero_stage=1")
        owner.kill()
    assert ended.code == 0
    assert "compiling DeepSpeed's shm_comm (first run only, minutes)" in ended.err
    assert (extension / "lock").exists()
