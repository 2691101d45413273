"""What a reader should know before using the model, as far as the facts say it."""

from __future__ import annotations

from typing import Any

from hfcompress.publish.facts import Facts
from hfcompress.publish.loading import COMPRESSED_TENSORS
from hfcompress.publish.numbers import percent

_WORTH_SAYING = 0.01


def limits(facts: Facts, config: dict[str, Any]) -> list[str]:
    """List what the format, the zeros, the data and the single run mean for a user.  config: of the checkpoint."""
    found = []
    if facts.loads_without_hfcompress is False:
        found.append("Its layers differ in size, which Transformers' configs cannot say: without `import hfcompress` "
                     "first, `from_pretrained` stops with an error about shapes.")  # fmt: skip
    if (config.get("quantization_config") or {}).get("quant_method") == COMPRESSED_TENSORS:
        found.append("Stock Transformers unpacks the weights to dense ones at the first forward pass: the file is "
                     "small, the memory in use is not.")  # fmt: skip
    if facts.after.sparsity > _WORTH_SAYING:
        found.append(f"{percent(facts.after.sparsity)} of the parameters are zero. They are stored and multiplied "
                     "like any other: zeros alone make neither the file smaller nor the model faster.")  # fmt: skip
    rows = facts.data.get("max_train_rows")
    if rows:
        found.append(f"Trained on {rows:,} rows of the data only.")
    seed = "" if facts.seed is None else f" ({facts.seed})"
    found.append(f"One run with one seed{seed}: how far other seeds lie apart was not measured.")
    return found
