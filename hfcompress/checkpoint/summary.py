"""What an inspected checkpoint holds, as plain values."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A share of a checkpoint.  ``bytes`` holds scales and shapes too; ``dtypes``: most weights first."""

    name: str
    parameters: int
    nonzero: int
    bytes: int
    dtypes: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Share of the parameters that are zero."""
        return 1 - self.nonzero / self.parameters if self.parameters else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for one parameter, its share of scales and shapes included."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class QuantizationGroup:
    """One group of config.json's ``quantization_config``.  group_size: input columns per scale, None for a row."""

    bits: int
    kind: str
    symmetric: bool
    group_size: int | None
    targets: tuple[str, ...]

    def names(self, module: str) -> bool:
        """Whether a target matches the module's name: literally, or as a ``re:`` pattern."""
        return any(
            re.match(target[3:], module) if target.startswith("re:") else target == module for target in self.targets
        )


@dataclass(frozen=True)
class CheckpointSummary:
    """What ``inspect_checkpoint`` found.  ``bytes_on_disk``: of the weight files, their headers included.

    uneven: by module, the sizes and counts that differ from what the config says, for which loading needs hfcompress.
    """

    folder: str
    architectures: tuple[str, ...]
    model_type: str
    format: str
    groups: tuple[QuantizationGroup, ...]
    files: tuple[str, ...]
    total: Part
    parts: tuple[Part, ...]
    layers: tuple[Part, ...]
    bytes_on_disk: int
    has_recipe: bool
    has_measurements: bool
    uneven: dict[str, dict[str, Any]]

    @property
    def parameters(self) -> int:
        """Parameters of the whole checkpoint, a packed weight counted by its logical shape."""
        return self.total.parameters

    @property
    def nonzero(self) -> int:
        """Parameters that are not zero."""
        return self.total.nonzero

    @property
    def sparsity(self) -> float:
        """Share of all parameters that are zero."""
        return self.total.sparsity

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the sparsity and bits of every part."""
        found = asdict(self)
        for key, parts in (("total", [self.total]), ("parts", self.parts), ("layers", self.layers)):
            rows = [{**asdict(p), "sparsity": p.sparsity, "bits_per_weight": p.bits_per_weight} for p in parts]
            found[key] = rows[0] if key == "total" else rows
        return found
