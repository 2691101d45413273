"""What the machine is good at."""

from __future__ import annotations

import ctypes
import sys

import torch

# Names and values of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def fast_bfloat16(device: torch.device | str | None = None) -> bool:
    """Tell whether bfloat16 products are faster than float32 ones.

    GPUs that know the type are; of CPUs only those with matrix tiles (AMX): others convert back and forth, and on a
    CPU with AVX512_BF16 alone a product takes twice as long as in float32.  device: None is where training would run.
    """
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    if kind == "cpu":
        has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(has_tiles and has_tiles())
    return kind in ("xpu", "mps")


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next tensor instead of giving them back to the kernel.

    Logits of a large vocabulary come and go by the 100 MB, and clearing their pages anew each time takes a third of a
    training step on a CPU.  Only on Linux with glibc; elsewhere it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
