"""What a quantization method can be told; the fields are the recipe's options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from hfcompress.calibration.texts import Calibration
    from hfcompress.quantization.while_loading import QuantizeConfig

FORBID_UNKNOWN = ConfigDict(extra="forbid")
Bits = Literal[2, 3, 4, 8]
AUTO: Final = "auto"
TUNING_STEPS, TUNED_BELOW = 32, 4  # bits
CHOICES: tuple[Bits, ...] = (2, 3, 4, 8)
Order = Literal["stored", "groups", "columns"]
ScaleSearch = Literal["absmax", "mse", "hessian"]


class WhileLoading:
    """Lets a method be ``from_pretrained``'s ``quantization_config``."""

    def as_config(
        self, dataset: Calibration | None = None, processor: Any = None, *, rows: int = 128, length: int = 512
    ) -> QuantizeConfig:
        """Return what ``from_pretrained(id, quantization_config=...)`` takes: it loads the model and quantizes it.

        dataset: for methods that need data, batches, texts, a ``Dataset``, a file or a dataset's id.
        processor: the tokenizer for texts; None is the one in the model's folder.  rows, length: of texts at most so
        many rows, of so many tokens.  Raises DataError when data are needed and not given.
        """
        from hfcompress.quantization.while_loading import QuantizeConfig

        return QuantizeConfig(self, dataset, processor, rows, length)


def scales(group_size: int | None) -> str:
    """Say what shares a scale, for people."""
    return f"a scale per {'row' if group_size is None else f'{group_size} columns'}"


class ByteCodes(WhileLoading):
    """What the methods of eight bits with one scale per row have in common for the plan."""

    package: ClassVar[str] = "compressed_tensors"
    bits: ClassVar[Literal[8]] = 8
    group_size: ClassVar[None] = None
    symmetric: ClassVar[bool] = True
    embeddings: ClassVar[bool] = False
    head: ClassVar[bool] = False


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class RTN(WhileLoading):
    """Round every weight to the nearest point of its group's grid; needs no data.

    bits: of one code.  group_size: input columns that share a scale; None is one scale per output row.
    exclude: name patterns (``fnmatch``) of linear layers that stay as they are.
    symmetric: code 0 stands for 0; otherwise each group also has a zero point.
    scale: ``absmax`` takes it from the group's largest values, ``mse`` the one with the smallest squared error;
    that with the smallest error of the layer's output needs data, so it belongs to ``GPTQ``.
    embeddings, head: quantize the input embeddings or the output head too; tied ones go together.
    activations: round the inputs of linear layers to 8 bits too, each token by a scale of its own (W8A8).
    """

    needs_calibration: ClassVar[bool] = False
    package: ClassVar[str] = "compressed_tensors"  # that stock Transformers reads the checkpoint with

    bits: Bits = 8
    group_size: Annotated[int, Field(ge=8)] | None = None
    exclude: tuple[str, ...] = ()
    symmetric: bool = True
    scale: Literal["absmax", "mse"] = "absmax"
    embeddings: bool = False
    head: bool = False
    activations: Literal[8] | None = None

    def __post_init__(self) -> None:
        if self.activations and (
            self.bits != 8 or self.group_size or not self.symmetric or self.embeddings or self.head
        ):
            raise ValueError(
                "activations=8 goes with bits=8, group_size=None and symmetric=True, and without embeddings and head: "
                "no engine multiplies other codes by rounded inputs"
            )

    @property
    def summary(self) -> str:
        """What the method does, for people."""
        return f"RTN, {self.bits} bits, {scales(self.group_size)}" + ", inputs in 8 bits" * bool(self.activations)


@dataclass(frozen=True)
class Steps:
    """How GPTQ's loop over columns goes, and what comes after it; the options of ``GPTQ`` with these names."""

    order: Order = "stored"
    scale: ScaleSearch = "hessian"
    sweeps: int = 0


PLAIN = Steps()


def _check_auto(targets: Sequence[str], choices: Sequence[int], readable: bool) -> None:
    """Raise ValueError for options that do not go with bits that are chosen for each layer."""
    if len(targets) != 1:
        found = " and ".join(targets) or "neither"
        raise ValueError(f"bits='auto' needs one target, either average_bits or megabytes, not {found}")
    if len(set(choices)) != len(choices):
        raise ValueError(f"choices={tuple(choices)} names one number of bits twice")
    if not readable:
        raise ValueError(
            "bits='auto' goes with symmetric=True and embeddings=False: stock Transformers reads zero points and "
            "packed embeddings only where all layers have the same bits"
        )


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class GPTQ(WhileLoading):
    """Round column by column and let later columns absorb the error (Frantar et al., arXiv 2210.17323).

    bits: of one code; ``auto`` chooses for each layer, those that see the same input alike.
    average_bits: for ``auto``, what a weight may take on average as it is stored, with scales and what packing adds.
    megabytes: for ``auto`` and instead of ``average_bits``, what all packed layers may take, in 10^6 bytes.
    choices: for ``auto``, the numbers of bits to choose from, unless they are all; a head gets the most of them.
    group_size: input columns that share a scale; None is one scale per output row.
    damping: added to the Hessian's diagonal, as a share of its mean.
    quality: ``best`` has every linear layer make up for what the model before it lacks against the dense one. It runs
    the dense layers, too, and sums up more; ``benchmarks/quantize.py`` measures what that costs and gains.
    rounding_steps: with ``best``, gradient steps on codes and scales of each layer of the stacks as soon as its linear
    layers are rounded, towards what it gives in the dense model (as AutoRound, arXiv 2309.05516).
    tuning_steps: gradient steps on all scales, once all layers are done, towards the dense model's output on rows of
    the calibration data; None is 32 with ``best`` and fewer than 4 bits (or ``average_bits``), where they gain most,
    and else none. Not for models whose layers lie on disk.
    exclude: name patterns (``fnmatch``) of linear layers that stay as they are.
    symmetric: code 0 stands for 0; otherwise each group also has a zero point.
    embeddings, head: round the input embeddings or the output head to nearest too; tied ones go together.
    scale: ``absmax`` takes a group's scale from its largest values, ``mse`` the one with the smallest squared error,
    ``hessian`` the one with the smallest error of the layer's output, as far as the Hessian's factor tells.
    order: ``groups`` rounds groups, and columns inside them, in the order of the Hessian's diagonal, largest first;
    ``columns`` does so with all columns, whatever their group, by scales chosen on the weights as they are. Both store
    columns where they were, with no index.  sweeps: how often every code and scale is set to the best one given all
    others once the loop is done.  Order and sweeps do not concern Conv1D, whose groups lie across columns, and a
    warning says so.
    """

    needs_calibration: ClassVar[bool] = True
    package: ClassVar[str] = "compressed_tensors"

    bits: Literal[2, 3, 4, 8, "auto"] = 4
    average_bits: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    megabytes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    choices: Annotated[tuple[Bits, ...], Field(min_length=2)] | None = None
    group_size: Annotated[int, Field(ge=8)] | None = 128
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    quality: Literal["fast", "best"] = "fast"
    exclude: tuple[str, ...] = ()
    symmetric: bool = True
    embeddings: bool = False
    head: bool = False
    scale: ScaleSearch = "hessian"
    order: Order = "stored"
    sweeps: Annotated[int, Field(ge=0, le=20)] = 0
    rounding_steps: Annotated[int, Field(ge=0, le=10_000)] = 0
    tuning_steps: Annotated[int, Field(ge=0, le=10_000)] | None = None

    def __post_init__(self) -> None:
        if self.rounding_steps and self.quality != "best":
            raise ValueError(
                f"rounding_steps={self.rounding_steps} goes with quality='best', which runs the dense layers that "
                "rounding is learnt from"
            )
        targets = {"average_bits": self.average_bits, "megabytes": self.megabytes}
        given = [f"{name}={value:g}" for name, value in targets.items() if value is not None]
        if self.bits == AUTO:
            _check_auto(given, self.candidates, self.symmetric and not self.embeddings)
        elif given or self.choices is not None:
            what = given or [f"choices={self.choices}"]
            raise ValueError(f"{' and '.join(what)} goes with bits='auto', which chooses for it, not with {self.bits}")

    @property
    def summary(self) -> str:
        """What the method does, for people."""
        if self.bits != AUTO:
            return f"GPTQ, {self.bits} bits, {scales(self.group_size)}"
        target = f"{self.average_bits:g} bits on average" if self.average_bits else f"{self.megabytes:g} MB in all"
        return f"GPTQ, {'/'.join(map(str, self.candidates))} bits for at most {target}, {scales(self.group_size)}"

    @property
    def candidates(self) -> tuple[int, ...]:
        """Return the numbers of bits that ``auto`` chooses from, fewest first."""
        return tuple(sorted(self.choices or CHOICES))

    @property
    def gradient_steps(self) -> int:
        """Return how many gradient steps on all scales come after the layers."""
        if self.tuning_steps is not None:
            return self.tuning_steps
        bits = self.average_bits if self.bits == AUTO else self.bits
        return TUNING_STEPS if self.quality == "best" and bits is not None and bits < TUNED_BELOW else 0

    @property
    def steps(self) -> Steps:
        """Return how the loop goes."""
        return Steps(self.order, self.scale, self.sweeps)
