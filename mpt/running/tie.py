"""Tie a process to its parent's life: when the parent dies, however it dies, the kernel kills the child.

`die_with_parent()` for a process of ours, `python -m mpt.running.tie PARENT -- COMMAND ...` for somebody else's, such
as torchrun. Linux only; elsewhere both do nothing but run.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Carries the pid of the process that is tied to the supervisor: a worker is that process, or torchrun's child.
TIED = "MPT_TIED_PROCESS"


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the thread that started this process ends (prctl(2), PR_SET_PDEATHSIG).

    The setting survives execve but not fork. A parent that died before the call is noticed where `main` tied it: then
    the process ends here.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # Reparented between the two looks, or adopted by init before the first: the signal would never come. In a container
    # the parent may rightly be process 1, so the number alone proves nothing; but the tied process is this one or its
    # parent.
    tied = os.environ.get(TIED)
    is_orphan = tied is not None and int(tied) not in (os.getpid(), os.getppid())
    if os.getppid() != parent or is_orphan:
        os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Become COMMAND, tied to the process PARENT, which started this one."""
    if len(arguments) < 3 or not arguments[0].isdecimal() or arguments[1] != "--":
        sys.exit("usage: python -m mpt.running.tie PARENT -- COMMAND [ARGUMENT ...]")
    os.environ[TIED] = str(os.getpid())
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        # A scheduler may signal every process of a job: a launcher that died of it would take the workers along, who
        # know how to stop.
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    if os.getppid() != int(arguments[0]):
        sys.exit("the parent died before this process was tied to it")
    os.execvp(arguments[2], arguments[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
