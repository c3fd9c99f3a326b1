"""The soak, shortened: random faults at one training in a row, and it ends as if there had been none."""

import os
import re
import subprocess
import sys

import pytest

from tests.cli.real_runs import ROOT


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.fault(15)
@pytest.mark.fault(17)
@pytest.mark.fault(25)
def test_six_random_faults_in_a_row_change_nothing_about_the_result() -> None:
    """With this seed: a full disk, a checkpoint cut short, both processes killed, in a save too, a spoilt weight."""
    done = subprocess.run(
        [sys.executable, "scripts/soak.py", "--faults", "6", "--seed", "1", "--lanes", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^lane 1 +\d+  step", done.stdout, re.MULTILINE)) == 6
    for said in (
        "the disk full",
        "cut model.safetensors",
        "kill -9 of the supervisor",
        "kill -9 of a worker in a save",
    ):
        assert said in done.stdout
    assert "nothing was lost" in done.stdout
