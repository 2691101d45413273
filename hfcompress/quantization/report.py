"""What quantization did, one row per linear layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized linear layer.

    group_size: input columns per scale; None is one scale per output row.  requested_group_size: what was asked for.
    relative_error: sqrt(tr(D H D^T) / tr(W H W^T)) on the calibration data (GPTQ, AWQ), or the Frobenius norms' ratio
    where no Hessian is taken: SmoothQuant's is that of the smoothed weight.
    damping: what the Hessian needed, as a share of its mean diagonal; None without a Hessian, and for AWQ.
    tokens: calibration tokens that the layer saw.  scaled: whether its inputs' scales moved into what is before it, as
    AWQ does where it finds something that can take them; None for methods that do not.  output_error_before,
    output_error_after: of the whole layer of the stack that it is in, before and after rounding was learnt there, see
    ``LearntRounding``; ``relative_error`` is that of before. None where nothing was to be learnt.
    """

    name: str
    bits: int
    group_size: int | None
    requested_group_size: int | None
    relative_error: float
    damping: float | None
    tokens: int
    seconds: float
    scaled: bool | None = None
    output_error_before: float | None = None
    output_error_after: float | None = None


@dataclass(frozen=True)
class ScaleTuning:
    """How far the quantized model is from the dense one before and after its scales were tuned.

    measure: ``KL divergence`` of the dense model's distribution over the vocabulary, in nats, or the ``squared error``
    of hidden states as a share of their squares; of the average token in rows that no step saw.
    kept: False where that had not become smaller, so that all scales are as GPTQ left them.
    """

    measure: str
    before: float
    after: float
    kept: bool
    steps: int
    seconds: float


@dataclass(frozen=True)
class QuantizationReport:
    """method: its name in ``METHODS``.  rows: in the order of the model.  seconds: of the whole run.

    tuning: what gradient steps on all scales did afterwards; the rows tell of the scales before them.
    file_name: what it is called beside the checkpoint.
    """

    file_name: ClassVar[str] = "quantization_report.json"

    method: str
    rows: tuple[QuantizedLinear, ...]
    seconds: float
    tuning: ScaleTuning | None = None

    @property
    def summary(self) -> str:
        """Say in a line what was done."""
        return f"{self.method}, {', '.join(str(bits) for bits in sorted({row.bits for row in self.rows}))} bits"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON takes them."""
        tuning = {} if self.tuning is None else {"tuning": asdict(self.tuning)}
        rows = [asdict(row) for row in self.rows]
        return {"method": self.method, "seconds": self.seconds, **tuning, "rows": rows}
