"""A finished run of the command line that several files look at."""

import subprocess

import pytest

from tests.cli.real_runs import Folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Folder, subprocess.CompletedProcess[str]]":
    """A run that finished, and what `mpt train --json` printed. Nobody changes it."""
    folder = Folder(tmp_path_factory.mktemp("trained"))
    folder.write()
    done = folder.train("tiny.yaml", "--json")
    assert done.returncode == 0, done.stderr
    return folder, done
