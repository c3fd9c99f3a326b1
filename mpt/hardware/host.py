"""The computer around the devices: CPU features, memory, cores. Parsers are pure; `read_host` reads /proc and /sys."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

from mpt.hardware.readings import HostReading

BYTES_PER_KIB = 1024


def read_host() -> HostReading:
    """Ask this computer. Costs a few milliseconds: no process is started, except on macOS (`sysctl`)."""
    name, flags = parse_cpuinfo(_text(Path("/proc/cpuinfo")))
    memory_bytes = parse_meminfo(_text(Path("/proc/meminfo")))
    macos_major = None
    if platform.system() == "Darwin":
        name, memory_bytes, macos_major = _ask_macos()
    return HostReading(
        cpu_name=name,
        architecture=platform.machine(),
        cpu_flags=flags,
        memory_bytes=smallest(memory_bytes, *cgroup_limits(Path("/"))),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch_version=_torch_version(),
        macos_major=macos_major,
    )


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """The CPU's name and flags: those that every core has, as a process may run on any of them.

    >>> parse_cpuinfo("model name : X\\nflags : avx2 amx_bf16\\n\\nmodel name : X\\nflags : avx2\\n")
    ('X', frozenset({'avx2'}))
    """
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    cores = [frozenset(found.split()) for found in re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)]
    return (name[1].strip() if name else "", frozenset.intersection(*cores) if cores else frozenset())


def parse_meminfo(text: str) -> int | None:
    """The memory in bytes.

    >>> parse_meminfo("MemTotal:       2048 kB\\n")
    2097152
    """
    total = re.search(r"^MemTotal:\s*(\d+) kB", text, re.MULTILINE)
    return int(total[1]) * BYTES_PER_KIB if total else None


def cgroup_limits(root: Path) -> list[int]:
    """Every memory limit between this process's control group and the root, in bytes; a container's is among them."""
    limits = [_limit(root / "sys/fs/cgroup/memory/memory.limit_in_bytes")]
    own = re.search(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    top = root / "sys/fs/cgroup"
    group = top / own[1] if own else top
    while group.is_relative_to(top):
        limits.append(_limit(group / "memory.max"))
        group = group.parent
    return [limit for limit in limits if limit is not None]


def smallest(*sizes: int | None) -> int | None:
    """The smallest of the sizes that are known."""
    return min((size for size in sizes if size is not None), default=None)


def _limit(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max": no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _torch_version() -> str | None:
    """The version of the installed torch, read from its metadata: importing it takes seconds."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def _ask_macos() -> tuple[str, int | None, int | None]:
    import subprocess

    def ask(key: str) -> str:
        answer = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
        return answer.stdout.strip()

    memory, version = ask("hw.memsize"), platform.mac_ver()[0].partition(".")[0]
    return (
        ask("machdep.cpu.brand_string"),
        int(memory) if memory.isdigit() else None,
        int(version) if version.isdigit() else None,
    )
