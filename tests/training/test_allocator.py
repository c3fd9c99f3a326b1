"""A process that trains on a CPU keeps the memory that it frees."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from mpt.training.allocator import keep_freed_memory
if sys.argv[1] == "keeps" and not keep_freed_memory():
    print("not glibc"); raise SystemExit
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    np.ones(2**26, dtype=np.uint8)
before = faults()
for _ in range(5):
    np.ones(2**26, dtype=np.uint8)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults of glibc")
def test_memory_that_is_taken_again_is_not_faulted_in_again() -> None:
    said = {}
    for how in ("keeps", "as it is"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        said[how] = done.stdout.strip()
    if "not glibc" in said.values():
        pytest.skip("the C library is not glibc")
    # 64 MiB are 16,384 pages of 4 KiB, or 32 huge ones.
    assert int(said["keeps"]) < 20 < int(said["as it is"])
