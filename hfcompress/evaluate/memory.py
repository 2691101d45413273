"""How much memory this process has needed at most."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hfcompress.devices import release_freed_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory_bytes() -> int | None:
    """Return the largest resident size of this process since its start or the last reset, in bytes.

    Read from the kernel's VmHWM, elsewhere from ``getrusage``; None where neither exists. Memory of accelerators is
    not in it; the interpreter and the libraries are.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, every other Unix counts KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> bool:
    """Let the peak start again from what is in use now; False where the system does not allow it (see proc(5)).

    What loading a model left behind is given back first, so that it is not counted as the model's.
    """
    release_freed_memory()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
