"""What a reader should know before using the model, as far as the facts say it."""

from __future__ import annotations

from typing import Any

from hfcompress.publish.facts import Facts
from hfcompress.publish.loading import COMPRESSED_TENSORS, quant_methods
from hfcompress.publish.numbers import percent

_WORTH_SAYING = 0.01


def limits(facts: Facts, config: dict[str, Any]) -> list[str]:
    """List what the format, the zeros, the data and the single run mean for a user.  config: of the checkpoint."""
    found = []
    if facts.loads_without_hfcompress is False:
        found.append("Its layers differ in size, which Transformers' configs cannot say: without `import hfcompress` "
                     "first, `from_pretrained` stops with an error about shapes.")  # fmt: skip
    if COMPRESSED_TENSORS in quant_methods(config):
        found.append("Packed weights are unpacked to dense ones when they are loaded or first run: the file is small, "
                     "the memory in use is not.")  # fmt: skip
    if facts.after.sparsity > _WORTH_SAYING:
        found.append(f"{percent(facts.after.sparsity)} of the parameters are zero. They are stored and multiplied "
                     "like any other: zeros alone make neither the file smaller nor the model faster.")  # fmt: skip
    kinds = {kind for stage in facts.recipe.get("stages", []) for kind in stage}
    if "prune_vocabulary" in kinds and "perplexity" in facts.after.metrics:
        found.append("Perplexities before and after `prune_vocabulary` are over vocabularies of different size: a "
                     "token is easier to guess among fewer.")  # fmt: skip
    rows = facts.data.get("max_train_rows")
    if rows:
        found.append(f"Trained on {rows:,} rows of the data only.")
    if "command" not in facts.training:
        seed = "" if facts.seed is None else f" ({facts.seed})"
        found.append(f"One run with one seed{seed}: how far other seeds lie apart was not measured.")
    elif any(row.get("tokens") for row in (*facts.pruning_report, *facts.quantization_report)):
        found.append("Calibrated on one choice of rows: how far others lie apart was not measured.")
    return found
