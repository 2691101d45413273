"""Write a teacher's answers to disk once, so that training needs no teacher."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, default_data_collator

from hfcompress.checkpoint.atomic import write_text
from hfcompress.checkpoint.locks import locked
from hfcompress.distillation.losses.targets import top_k_of
from hfcompress.distillation.teachers.keys import keys_of, refuse_left_padding
from hfcompress.distillation.teachers.live import LiveTeacher
from hfcompress.distillation.teachers.shards import LARGEST_K, Shard, Stored, write_shard
from hfcompress.errors import CheckpointError, ModelError, OutputError
from hfcompress.outputs import Outputs, Vectors, outputs_of, refuse_other_places
from hfcompress.progress import meter

INDEX = "teacher_cache.json"
FORMAT = 2
FEW_CLASSES = 256  # all their logits are kept
DEFAULT_K = 64
ROWS_PER_SHARD = 256
# Of a config. The tensors' dtypes and the classes' names are compared by themselves.
_NOT_OF_THE_LOGITS = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip
Collator = Callable[[list[Any]], dict[str, Any]]


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds.

    teacher: fingerprint of its weights and config.  name: what it was called.  columns: the inputs that it read.
    outputs: the kind of the teacher's outputs.
    pooling: how vectors were made of tokens, None for other outputs.
    classes: logits per answer, None where it depends on the example.  k: of which the most probable are kept, None for
    all.  temperature: at which their probabilities were taken.  labels: names of a classifier's classes.
    """

    teacher: str
    name: str
    outputs: str
    columns: tuple[str, ...]
    classes: int | None
    k: int | None
    temperature: float
    labels: tuple[str, ...] = ()
    pooling: str | None = None
    format: int = FORMAT


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds: examples, those of them that were there before, their answers, bytes of the whole folder."""

    folder: str
    examples: int
    answers: int
    found: int
    bytes: int


def cache_teacher(
    teacher: PreTrainedModel,
    dataset: Any,
    folder: str | Path,
    *,
    collator: Collator = default_data_collator,
    k: int | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
    name: str = "",
    outputs: Outputs | None = None,
) -> CacheReport:
    """Write the teacher's answers to every example of a dataset, from which ``DistillationTrainer`` then learns.

    dataset: a sequence of encoded examples, as the training will use them.  collator: makes a batch of them.
    k: keep the k most probable classes and the mass of all others; None keeps all logits of up to 256 classes, and 64
    of more.  temperature: at which probabilities are taken; losses of training must have the same.
    outputs: the kind of the teacher's outputs, where its class does not say it all: ``Vectors(pooling="cls")``.
    An answer takes 4 k + 2 bytes, up to 2 more where k is at most 10 of up to 262,144 classes, and an example 24 more.
    A cache that was cut short is continued.  Raises OutputError for a folder with another teacher's answers,
    ModelError for a ``k`` or a temperature that cannot be.
    """
    if not isinstance(teacher, PreTrainedModel):
        raise ModelError(f"The teacher must be a transformers PreTrainedModel, not a {type(teacher).__name__}.")
    if not 0 < temperature < math.inf:
        raise ModelError(f"temperature={temperature} must be above 0 and finite.")
    folder = Path(folder)
    refuse_other_files(folder)
    live = LiveTeacher(teacher)
    kind = outputs or outputs_of(teacher)
    index = _index(live, kind, k, temperature, name)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", str(folder)):
        _claim(folder, index)
        shards = [Shard(file) for file in shard_files(folder)]
        known = {key for shard in shards for key in shard.keys}
        found = len(known)
        batches = (
            collator([dataset[row] for row in range(first, min(first + batch_size, len(dataset)))])
            for first in range(0, len(dataset), batch_size)
        )
        with meter("teacher answers", len(dataset)) as shown:
            new = _answers(live, kind, index, batches, known, lambda rows: shown.advance_to(rows))
            for number in itertools.count(len(shards)):
                part = list(itertools.islice(new, ROWS_PER_SHARD))
                if not part:
                    break
                keys, answers = zip(*part)
                write_shard(folder / f"answers-{number:06}.safetensors", keys, answers, index.classes or 1)
    return _report(folder, found)


def _report(folder: Path, found: int) -> CacheReport:
    shards = [Shard(file) for file in shard_files(folder)]
    size = sum(file.stat().st_size for file in folder.iterdir())
    answers = sum(shard.ends[-1] for shard in shards)
    return CacheReport(str(folder), sum(len(shard.keys) for shard in shards), answers, found, size)


def is_cache(name: str | Path) -> bool:
    """Tell whether this is a folder that ``cache_teacher`` wrote or began to write."""
    return (Path(name).expanduser() / INDEX).is_file()


def refuse_other_files(folder: Path) -> None:
    """Raise OutputError for a folder that holds anything but a teacher's answers."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Name a folder for the teacher's answers.")
    if folder.is_dir() and not is_cache(folder) and any(one.name != ".lock" for one in folder.iterdir()):
        raise OutputError(f"{folder} holds other files. Name an empty folder for the teacher's answers.")


def refuse_k(k: int | None, classes: int | None) -> None:
    """Raise ModelError for a number of classes to keep that is more than there are, or than a cache can hold."""
    if k is not None and not 1 <= k <= min(classes or LARGEST_K, LARGEST_K):
        there = "as many as the example says" if classes is None else f"{classes:,}"
        raise ModelError(f"k={k} must be at least 1 and at most {LARGEST_K}, and there are {there} classes.")


def shard_files(folder: Path) -> list[Path]:
    """Return a cache's files of answers, in order."""
    return sorted(folder.glob("answers-*.safetensors"))


def read_index(folder: Path) -> CacheIndex:
    """Return what a cache holds.  Raises CheckpointError when the folder is none, or of another format."""
    file = folder / INDEX
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no teacher's answers (it has no {INDEX}). Write them by cache-teacher.")
    plain: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if plain.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {plain.get('format')}, but this version reads {FORMAT}. "
            "Write it again by cache-teacher."
        )
    lists: dict[str, Any] = {key: tuple(value) for key, value in plain.items() if isinstance(value, list)}
    return CacheIndex(**{**plain, **lists})


def _claim(folder: Path, index: CacheIndex) -> None:
    """Write the index, or compare it with the one that is there."""
    if not is_cache(folder):
        write_text(folder / INDEX, json.dumps(asdict(index), indent=2) + "\n")
        return
    there, asked = asdict(read_index(folder)), asdict(index)
    differing = [key for key in asked if key != "name" and there[key] != asked[key]]
    if differing:
        one = differing[0]
        what = (
            "another teacher's answers" if one == "teacher" else f"answers with {one}={there[one]}, not {asked[one]}"
        )
        raise OutputError(f"{folder} holds {what}. Name another folder, or remove this one.")


def _index(live: LiveTeacher, kind: Outputs, k: int | None, temperature: float, name: str) -> CacheIndex:
    model, classes = live.model, live.classes
    if k is not None and kind.values != "odds":
        raise ModelError(f"k={k} classes cannot be kept: {type(model).__name__} gives {kind.what}. Leave k out.")
    if k is None and kind.values == "odds" and classes is not None and classes > FEW_CLASSES:
        k = DEFAULT_K
    if k is not None and classes is None:
        raise ModelError(
            f"k={k} classes cannot be kept: how many {type(model).__name__} has depends on the row. Leave k out, "
            "which keeps them all."
        )
    refuse_k(k, classes)
    return CacheIndex(
        teacher=fingerprint(model),
        name=name or type(model).__name__,
        outputs=type(kind).__name__,
        columns=tuple(sorted(live.columns)),
        classes=classes,
        k=k,
        temperature=temperature if k is not None else 1.0,
        labels=tuple(kind.class_names(model) or ()),
        pooling=kind.pooling if isinstance(kind, Vectors) else None,
    )


def fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of a model's weights and config that does not depend on where they are."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    digest.update(json.dumps(_without_origin(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        exact = tensor.detach().double().flatten()
        # Two sums tell apart what one does not: the second depends on the order.
        steps = torch.arange(1, 1 + len(exact), device=exact.device, dtype=exact.dtype).remainder_(1009)
        sums = [f"{float(one):.12e}" for one in (exact.sum(), (exact * steps).sum())]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums}".encode())
    return digest.hexdigest()


def _without_origin(config: Any) -> Any:
    """Return a config's values without those that say where it comes from or that are compared by themselves."""
    if isinstance(config, dict):
        return {str(key): _without_origin(value) for key, value in config.items() if key not in _NOT_OF_THE_LOGITS}
    return config


def _answers(
    live: LiveTeacher,
    kind: Outputs,
    index: CacheIndex,
    batches: Iterator[dict[str, Any]],
    known: set[bytes],
    shown: Callable[[int], None],
) -> Iterator[tuple[bytes, Stored]]:
    """Yield key and answer of every example that is not known yet."""
    done = 0
    for batch in batches:
        keys = keys_of(batch, set(index.columns))
        if not known.issuperset(keys):
            for key, answer in zip(keys, _batch(live, index, kind, batch)):
                if key not in known:
                    known.add(key)
                    yield key, answer
        done += len(keys)
        shown(done)


def _batch(live: LiveTeacher, index: CacheIndex, kind: Outputs, batch: dict[str, Any]) -> Sequence[Stored]:
    """Return the answers of each row of a batch, at the places that count."""
    refuse_left_padding(kind, batch)
    counted = kind.compared(batch)
    rows = counted.reshape(-1).nonzero().squeeze(-1)
    answer = live.answer(batch, kind, rows, ())
    targets = answer.targets
    assert isinstance(targets, Tensor)
    refuse_other_places(counted, answer.shape or ())
    result: list[Stored] = []
    of_row = counted.reshape(len(counted), -1).sum(1).cumsum(0).tolist()
    for first, end in zip([0, *of_row], of_row):
        logits = targets[rows[first:end].to(targets.device)].float()
        kept: Stored = logits if index.k is None else top_k_of(logits, index.k, index.temperature)
        result.append(kept.cpu())
    return result
