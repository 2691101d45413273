"""Compiles GPTQ's kernel for GPUs, which needs none; prints the compute capability of each that took it.

Run by ``test_column_kernel`` in a process of its own.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hfcompress.quantization.column_kernel import DROPPED, ROWS, _round_run
from hfcompress.quantization.rounding import KERNEL_COLUMNS

ARGUMENTS = {
    **dict.fromkeys(("target", "unit", "values", "error"), "*fp32"),
    "codes": "*i8",
    **dict.fromkeys(("scale", "zero"), "*fp32"),
    "pruned": "*i1",
    **dict.fromkeys(("columns", "rows", "scale_stride", "zero_stride"), "i32"),
    **dict.fromkeys(("low", "high"), "fp32"),
}


def main() -> None:
    for capability in (80, 90):
        for affine, dropped in ((True, max(DROPPED.values())), (False, 0)):
            fixed = {"AFFINE": affine, "PRUNED": affine, "DROPPED": dropped, "COLUMNS": KERNEL_COLUMNS, "ROWS": ROWS}
            signature = {**ARGUMENTS, **dict.fromkeys(fixed, "constexpr")}
            names = list(signature)
            source = ASTSource(_round_run, signature, {(names.index(name),): value for name, value in fixed.items()})
            target = GPUTarget("cuda", capability, 32)
            code = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
            assert "div.rn.f32" in code
            assert "fma" not in code
            assert ".local" not in code, "the tile does not fit into registers"
        print(capability)


if __name__ == "__main__":
    main()
