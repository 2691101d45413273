"""What one-shot pruning did, one row per weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned weight, by its module's name.

    zeros, weights: counted after pruning.  relative_error: sqrt(tr(D H D^T) / tr(W H W^T)) for D = what was - what
    is, where H is what the method knows of the inputs: their Gram matrix (SparseGPT), its diagonal (Wanda), nothing
    (Magnitude).  damping: what the Hessian needed, as a share of its mean diagonal; None without a Hessian.
    tokens: calibration tokens that the layer saw.
    """

    name: str
    zeros: int
    weights: int
    relative_error: float
    damping: float | None
    tokens: int
    seconds: float

    @property
    def sparsity(self) -> float:
        """Return the share of the weights that is zero."""
        return self.zeros / self.weights


@dataclass(frozen=True)
class PruningReport:
    """method: its name in ``METHODS``.  rows: in the order of the model.  seconds: of the whole run.

    file_name: what it is called beside the checkpoint.
    """

    file_name: ClassVar[str] = "pruning_report.json"

    method: str
    rows: tuple[PrunedLayer, ...]
    seconds: float

    @property
    def sparsity(self) -> float:
        """Return the share of all targeted weights that is zero."""
        return sum(row.zeros for row in self.rows) / sum(row.weights for row in self.rows)

    @property
    def summary(self) -> str:
        """Say in a line what was done."""
        return f"{self.method}, {self.sparsity:.1%} of the targeted weights pruned"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON takes them."""
        rows = [{**asdict(row), "sparsity": row.sparsity} for row in self.rows]
        return {"method": self.method, "sparsity": self.sparsity, "seconds": self.seconds, "rows": rows}
