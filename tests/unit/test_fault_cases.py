"""What a run must survive, case by case, and that each case has a test which shows it.

A test is marked with the number of its case, `@pytest.mark.fault(7)`; several tests may show a case together, and a
test may be part of several. "The same" means bit for bit as the run that nothing befell. `scripts/soak` throws many of
them at one training in a row.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
CASES = {
    1: "a worker is killed at any step: it starts again by itself, loses less than save_steps steps, ends the same",
    2: "a kill at any point of a save: the older checkpoint or the new one, no half of one, and it ends the same",
    3: "the supervisor is killed: its workers die with it, the lock is free, the same command goes on",
    4: "a kill while old checkpoints are deleted: none that is half there is offered",
    5: "SIGTERM in a step: saved at its end, exit code 80, and the run goes on the same",
    6: "SIGTERM in a save or an evaluation: that is finished, then saved and stopped with 80",
    7: "a second SIGTERM, or no time left for the save: over at once, with the last checkpoint intact",
    8: "Ctrl-C in a terminal, which reaches a whole process group: one clean stop and no restart",
    9: "a rank is stopped (SIGSTOP): noticed within its limit, said why there is no stack, started again",
    10: "the data loader hangs: noticed, with its stack; a slow evaluation or save is left alone",
    11: "one of two ranks is killed: the other is ended, none is left, they meet on a new port, it ends the same",
    12: "a rank ends or raises: it is named as the cause, and not its peer's lost connection",
    13: "the same crash in every attempt: over after three without a newer checkpoint, exit code 82",
    14: "a crash before the first checkpoint: from the beginning again, within the budget",
    15: "a full disk in a save: gone on without, the older one stays; the third time 83; with room it saves again",
    16: "a place that can't be written, or is a file: 83 before anything starts",
    17: "a weights file cut short: the checkpoint before it is taken, with a record, and the bad one put away",
    18: "a bit flipped in weights or optimizer: the manifest tells, where the libraries load it",
    19: "optimizer, scheduler or random state missing: refused, not begun afresh",
    20: "an empty trainer state, a torn manifest: the checkpoint before it is taken",
    21: "no checkpoint is sound: exit code 84, never from the beginning by itself",
    22: "one loss that is no number, in any precision: one update left out, finite weights, a record of it",
    23: "a sample that spoils the loss whenever it comes: confirmed, its window left out, for good",
    24: "one tensor's gradient is not finite: the update is left out, and the tensor named",
    25: "a weight that is no number: it gets into no checkpoint, and the run goes back to a good one",
    26: "ten overflows of fp16 in a row: no event; scheduler and optimizer agree on the updates made",
    27: "overflow without end: known by the loss scale, and gone on in a precision with more range",
    28: "a spike of the loss that passes is left alone; one that stays takes the run far enough back, and on otherwise",
    29: "no memory for the micro batch: half of it, the same global batch, the same curve",
    30: "clocks and file times that jump: nothing depends on them",
    31: "two runs in one directory: 85 for the second; a dead owner's lock is taken over, whoever has its number now",
    32: "another world size, recipe or data set: refused, or taken on purpose with a record; random collators repeat",
}


def marked() -> Iterator[tuple[int, str]]:
    """Find the marks in the source of the tests: the case, and the test that has it."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    yield ast.literal_eval(mark.args[0]), f"{path.relative_to(TESTS)}::{node.name}"


def test_every_case_has_a_test_and_every_mark_is_of_a_case() -> None:
    tests: dict[int, list[str]] = defaultdict(list)
    for case, name in marked():
        tests[case].append(name)
    assert sorted(tests) == sorted(CASES)
    assert all(name.rpartition("::")[2].startswith("test_") for names in tests.values() for name in names)
