"""What the machine is good at."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Eight bytes for each page of this process; the bit after that for swap is that for memory (the kernel's pagemap.rst).
PAGEMAP, ENTRY, IN_FILE, IN_SWAP = Path("/proc/self/pagemap"), 8, 61, 62
# Names and values of glibc's malloc.h and Linux' mman.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MADV_DONTNEED = 4
# What their values come to by themselves in a process that has freed large blocks, and what no tensor reaches.
LARGEST_OWN = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)
AS_USUAL, NEVER = (LARGEST_OWN, 2 * LARGEST_OWN), (1 << 30, (1 << 31) - 1)


def fast_bfloat16(device: torch.device | str | None = None) -> bool:
    """Tell whether bfloat16 products are faster than float32 ones.

    GPUs that know the type are; of CPUs those with matrix tiles (AMX) or with AVX512_BF16 (as AMD's Zen 4), which have
    instructions for such products.  Others convert back and forth.  device: None is where training would run.
    """
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    if kind == "cpu":
        return matrix_tiles() or vector_bfloat16()
    return kind in ("xpu", "mps")


def matrix_tiles() -> bool:
    """Tell whether the CPU has matrix tiles (AMX), as Intel's server CPUs since Sapphire Rapids do."""
    return _cpu_has("amx_tile")


def vector_bfloat16() -> bool:
    """Tell whether the CPU multiplies bfloat16 in 512-bit vectors (AVX512_BF16), and has no tiles to do it faster."""
    return _cpu_has("avx512_bf16") and not matrix_tiles()


def vector_integers() -> bool:
    """Tell whether the CPU multiplies 8-bit integers in 512-bit vectors (AVX512_VNNI)."""
    return _cpu_has("vnni")


def _cpu_has(feature: str) -> bool:
    known = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return known is not None and bool(known())


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next tensor instead of giving them back to the kernel.

    Logits of a large vocabulary come and go whole, and clearing their pages anew each time slows a training step on a
    CPU.  Kept blocks count as memory in use, so ``release_freed_memory`` comes before a peak is measured.  Only on
    Linux with glibc; elsewhere it does nothing.
    """
    _Kept.for_good = True
    _set_thresholds(*NEVER)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory as ``keep_freed_memory`` does, and give it back at the end unless that was called."""
    _Kept.depth += 1
    _set_thresholds(*NEVER)
    try:
        yield
    finally:
        _Kept.depth -= 1
        if not (_Kept.depth or _Kept.for_good):
            _set_thresholds(*AS_USUAL)
            release_freed_memory()


class _Kept:
    """Who has asked for freed memory to be kept, in the whole process.  heap: its bytes when holes were looked for."""

    depth = 0
    for_good = False
    heap = 0


class _HeapInfo(ctypes.Structure):
    """``mallinfo2`` of glibc's malloc.h.  arena: bytes of the heap.  keepcost: free ones at its end."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


def give_back_holes() -> None:
    """Give the pages of freed blocks back to the kernel if the heap has grown since this was called last.

    It grows where a block fits into no hole that others left, and then the holes count as memory in use beside it.
    While freed memory is kept, what fits into holes finds their pages there; what is free at the heap's end stays.
    Only on Linux with glibc 2.33 or newer.
    """
    mallinfo, trim = _glibc("mallinfo2"), _glibc("malloc_trim")
    if not _Kept.depth or mallinfo is None or trim is None:
        return
    mallinfo.restype = _HeapInfo
    found = mallinfo()
    if found.arena > _Kept.heap:
        trim(ctypes.c_size_t(found.keepcost))
    _Kept.heap = found.arena


def _set_thresholds(from_kernel: int, to_kernel: int) -> None:
    """Say from how many bytes a block comes from the kernel by itself, and how many free ones go back to it."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, from_kernel)
        mallopt(M_TRIM_THRESHOLD, to_kernel)


def release_freed_memory() -> None:
    """Collect garbage and give freed blocks back to the kernel; the latter only on Linux with glibc."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def unmap_unchanged(tensors: Iterable[Tensor]) -> None:
    """Have tensors that lie in a file as they are there unmapped, page by page; what reads them maps them again.

    ``from_pretrained`` maps a checkpoint, and whatever was read of it counts as memory of the process. A tensor with a
    page that was written to, or that lies in no file, is left alone. Only on Linux.
    """
    madvise = _glibc("madvise")
    if madvise is None or not os.access(PAGEMAP, os.R_OK):
        return
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        for tensor in tensors:
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                continue
            first = -(-tensor.data_ptr() // PAGESIZE)
            count = (tensor.data_ptr() + tensor.nbytes) // PAGESIZE - first
            pagemap.seek(first * ENTRY)
            entries = bytearray(pagemap.read(max(0, count) * ENTRY))
            if not entries or len(entries) != count * ENTRY:
                continue
            pages = torch.frombuffer(entries, dtype=torch.int64)
            if bool((pages >> IN_FILE & 1 | (pages >> IN_SWAP & 0b11 == 0)).all()):
                madvise(ctypes.c_void_p(first * PAGESIZE), ctypes.c_size_t(count * PAGESIZE), MADV_DONTNEED)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
