"""The peak memory of this process, as a peer's script reports it."""

from __future__ import annotations

from pathlib import Path


def peak_mib() -> float:
    """Return the most memory that this process has held, in MiB, from the kernel (Linux).

    ``resource.getrusage`` would begin with the peak of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024
