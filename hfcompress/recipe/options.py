"""What a recipe can say: its stages, and the whole, as frozen, checked classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic.dataclasses import dataclass

from hfcompress.distillation.losses import Loss, name_of
from hfcompress.pruning.oneshot import METHODS as PRUNERS
from hfcompress.pruning.oneshot import Magnitude, SparseGPT, Wanda
from hfcompress.quantization import GPTQ, Method
from hfcompress.quantization import METHODS as QUANTIZERS
from hfcompress.recipe.data import TASKS, DataSpec, known_task
from hfcompress.recipe.sections import EvaluateSpec, ModelSpec, folder_name
from hfcompress.recipe.training_stages import Distill, Finetune
from hfcompress.recipe.values import FROZEN, AtLeastOne, Text
from hfcompress.structure.layers import DropLayers


@dataclass(frozen=True, config=FROZEN)
class Prune:
    """Set weights to zero in one shot; the method's own options stand beside ``method`` in the YAML.

    targets, exclude: name patterns (``fnmatch``) over the modules whose weights are pruned; targets None means every
    linear and Conv1D weight inside the layer stack.
    calibration_rows: training rows shown to the method.  calibration_length: tokens of one such row.
    """

    method: Magnitude | Wanda | SparseGPT
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    calibration_rows: AtLeastOne = 128
    calibration_length: Annotated[int, Field(ge=2)] = 512

    def summary_of(self, sparsity: float) -> str:
        """Say in a line what it did.  sparsity: the share of the targeted weights that is zero now."""
        pattern = f" in the pattern {self.method.pattern}" if self.method.pattern else ""
        return f"{type(self.method).__name__}, {sparsity:.1%} of the targeted weights pruned{pattern}"


@dataclass(frozen=True, config=FROZEN)
class Quantize:
    """Store the linear layers in few bits; the method's own options stand beside ``method`` in the YAML.

    calibration_rows: training rows shown to the method.  calibration_length: tokens of one such row.
    prune: prune by SparseGPT in the same pass.
    """

    method: Method
    calibration_rows: AtLeastOne = 128
    calibration_length: Annotated[int, Field(ge=2)] = 512
    prune: SparseGPT | None = None

    def __post_init__(self) -> None:
        if self.prune is not None and isinstance(self.method, GPTQ) and self.method.order != "stored":
            raise ValueError(
                f"order: {self.method.order} takes columns apart that prune chooses from together; remove it, or "
                "prune in a stage before this one"
            )
        if self.prune is not None and isinstance(self.method, GPTQ) and self.prune.damping != self.method.damping:
            raise ValueError(
                f"one Hessian serves both, but damping is {self.method.damping:g} here and {self.prune.damping:g} in "
                "prune; give both the same"
            )

    @property
    def summary(self) -> str:
        """Say in a line what it does."""
        if self.prune is None:
            return self.method.summary
        share = self.prune.pattern or format(self.prune.sparsity, ".1%")
        return f"{self.method.summary}, {share} pruned in the same pass"


@dataclass(frozen=True, config=FROZEN)
class Shrink:
    """Remove the attention heads and feed-forward neurons that earlier stages closed."""


@dataclass(frozen=True, config=FROZEN)
class PruneVocabulary:
    """Drop the tokens that the training texts do not need, from the model and its tokenizer.

    A causal-lm recipe counts the held-out texts in: a perplexity per token compares only texts that are split alike.
    keep: tokens to keep besides, as the vocabulary spells them.
    """

    keep: tuple[Text, ...] = ()


StageOptions = DropLayers | PruneVocabulary | Prune | Finetune | Distill | Shrink | Quantize
STAGES: dict[str, type[StageOptions]] = {
    "drop_layers": DropLayers,
    "prune_vocabulary": PruneVocabulary,
    "prune": Prune,
    "finetune": Finetune,
    "distill": Distill,
    "shrink": Shrink,
    "quantize": Quantize,
}


# Options that only methods with calibration data take, and what is wrong with them elsewhere.
NEED_DATA = {
    "calibration_rows": "needs no calibration data",
    "calibration_length": "needs no calibration data",
    "prune": "cannot prune in the same pass",
}
# The kinds of stages whose options are those of a method, by the method's name.
METHODS: dict[str, Mapping[str, type[Any]]] = {"prune": PRUNERS, "quantize": QUANTIZERS}


def options_beside_method(kind: str, method: type[Any]) -> list[str]:
    """Return the options that a stage has beside its method's own; those of ``NEED_DATA`` only where it does."""
    names = [field.name for field in dataclasses.fields(STAGES[kind]) if field.name != "method"]
    return [name for name in names if method.needs_calibration or name not in NEED_DATA]


@dataclass(frozen=True, config=FROZEN)
class Stage:
    """One step of a recipe; its name is its kind, numbered from the second of a kind on (``distill-2``)."""

    kind: str
    options: StageOptions
    name: str


@dataclass(frozen=True, config=FROZEN)
class Recipe:
    """A whole compression run.

    name: of the run and its model; letters, digits, '.', '_' and '-'.  task: what the model is for.
    seed: of everything random.  output: folder of checkpoints and results; ``runs/<name>`` when not given.
    """

    name: Annotated[str, AfterValidator(folder_name)]
    task: Annotated[str, AfterValidator(known_task), WithJsonSchema({"enum": list(TASKS)})]
    model: ModelSpec
    data: DataSpec
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output: str = ""
    evaluate: EvaluateSpec = dataclasses.field(default_factory=EvaluateSpec)

    def __post_init__(self) -> None:
        if not self.output:
            object.__setattr__(self, "output", f"runs/{self.name}")
        object.__setattr__(self, "data", self.data.of(self.task))

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values; parsing them gives an equal recipe."""
        order = ("name", "task", "model", "data", "seed", "output", "evaluate", "stages")
        return {name: _plain(getattr(self, name)) for name in order}

    def to_yaml(self) -> str:
        """Return the recipe as YAML; loading it gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    if isinstance(value, Stage):
        return {value.kind: _plain(value.options)}
    if isinstance(value, (Prune, Quantize)):
        kind = next(kind for kind, options in STAGES.items() if type(value) is options)
        name = next(name for name, method in METHODS[kind].items() if type(value.method) is method)
        beside = options_beside_method(kind, type(value.method))
        own = {option: _plain(getattr(value, option)) for option in beside if getattr(value, option) is not None}
        return {"method": name, **_plain(value.method), **own}
    if isinstance(value, Loss):
        return {name_of(value): _options(value)}
    if dataclasses.is_dataclass(value):
        return _options(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _options(value: Any) -> dict[str, Any]:
    pairs = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return {field.name: _plain(one) for field, one in pairs if not (one is None and field.default is None)}
