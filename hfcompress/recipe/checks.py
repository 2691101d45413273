"""Checks that need more than one place of a recipe: the order of stages, teachers, and options of one task only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hfcompress.recipe.data import TASK_DATA, TASKS, tasks_with
from hfcompress.recipe.faults import Fault, near
from hfcompress.recipe.options import STAGES

WITHOUT_VOCABULARY = {
    "image-classification": "images have no tokens",
    "speech-seq2seq": "what is said later is not known",
    "speech-ctc": "what is said later is not known",
    "sentence-embeddings": "its vectors are compared with those of the original, which reads other tokens",
}
WITHOUT_CLASSES = {
    "question-answering": "an answer is two places in a text",
    "speech-ctc": "its loss is of all ways to say a text",
    "sentence-embeddings": "there are no labels",
}
PROBLEMS_WITHOUT_CLASSES = ("multi_label_classification", "regression")
_ONLY_FOR: dict[tuple[str, str], list[str]] = {
    **{("data", option): tasks_with(option) for options in TASK_DATA.values() for option in options},
    ("evaluate", "prompt"): ["causal-lm"],
    ("evaluate", "num_beams"): ["seq2seq-lm", "speech-seq2seq"],
}


def stage_kind(raw: Any) -> str | None:
    """Return the kind of a stage's mapping, or None where it has no known one."""
    if not isinstance(raw, Mapping) or len(raw) != 1:
        return None
    kind = next(iter(raw))
    return kind if kind in STAGES else None


def stage_names(kinds: Sequence[str | None]) -> list[str]:
    """Name each stage by its kind, numbered from the second of a kind on: ``distill``, ``distill-2``."""
    names = []
    for index, kind in enumerate(kinds):
        count = list(kinds[: index + 1]).count(kind)
        names.append("" if kind is None else kind if count == 1 else f"{kind}-{count}")
    return names


def cross_faults(raw: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield what does not fit together, even where single options have faults of their own."""
    task = raw.get("task")
    for (section, option), tasks in _ONLY_FOR.items():
        options = raw.get(section)
        given = isinstance(options, Mapping) and options.get(option) is not None
        if given and isinstance(task, str) and task in TASKS and task not in tasks:
            yield Fault((section, option), f"is for {', '.join(tasks)} only; this recipe's task is {task}")
    yield from _benchmark_faults(raw)
    stages = raw.get("stages")
    if isinstance(stages, list):
        kinds = [stage_kind(stage) for stage in stages]
        yield from _order_faults(stages, kinds)
        yield from _lost_zeros_faults(stages, kinds)
        yield from _reopened_faults(stages, kinds)
        yield from _teacher_faults(stages, kinds)
        yield from _vocabulary_faults(stages, kinds)
        yield from _task_faults(task, kinds)
        yield from _training_faults(raw, stages, kinds)


def _training_faults(raw: Mapping[str, Any], stages: Sequence[Any], kinds: Sequence[str | None]) -> Iterator[Fault]:
    """Some arguments of a Trainer mean nothing for a task, or leave nothing to distil from."""
    task, data = raw.get("task"), raw.get("data")
    problem = data.get("problem_type") if isinstance(data, Mapping) else None
    for index, (stage, kind) in enumerate(zip(stages, kinds)):
        options = stage[kind] if kind in ("finetune", "distill") else None
        training = options.get("training") if isinstance(options, Mapping) else None
        if not isinstance(training, Mapping):
            continue
        here = ("stages", index, kind, "training")
        why = WITHOUT_CLASSES.get(str(task)) or (problem in PROBLEMS_WITHOUT_CLASSES and f"the problem is {problem}")
        if training.get("label_smoothing_factor") and why:
            yield Fault(
                (*here, "label_smoothing_factor"), f"needs labels that are one class each, but {why}: remove it"
            )
        if kind == "distill" and training.get("use_liger_kernel"):
            yield Fault((*here, "use_liger_kernel"), "leaves no logits to distil from: remove it")


def _task_faults(task: Any, kinds: Sequence[str | None]) -> Iterator[Fault]:
    """Some tasks have nothing to train on, or no text whose tokens could be counted."""
    for index, kind in enumerate(kinds):
        if task == "sentence-embeddings" and kind == "finetune":
            text = "sentence-embeddings have no labels to train on; use distill, which learns from a teacher"
            yield Fault(("stages", index), text)
        if kind == "prune_vocabulary" and isinstance(task, str) and task in WITHOUT_VOCABULARY:
            yield Fault(("stages", index), f"is not for {task}: {WITHOUT_VOCABULARY[task]}")


def _benchmark_faults(raw: Mapping[str, Any]) -> Iterator[Fault]:
    """Figures of rows that this recipe cut off by itself are no result of a benchmark."""
    evaluation, data = raw.get("evaluate"), raw.get("data")
    benchmark = evaluation.get("benchmark") if isinstance(evaluation, Mapping) else None
    if not isinstance(evaluation, Mapping) or not isinstance(benchmark, Mapping) or not isinstance(data, Mapping):
        return
    here, splits = ("evaluate", "benchmark"), data.get("splits")
    if data.get("id") is None or not isinstance(splits, Mapping) or splits.get("held_out") is None:
        yield Fault(here, "needs data.id and data.splits.held_out: rows of one's own are no benchmark")
    if evaluation.get("max_rows") is not None:
        yield Fault(here, "needs the whole split: take out evaluate.max_rows")
    metrics, metric = evaluation.get("metrics"), benchmark.get("metric")
    if isinstance(metrics, (list, tuple)) and metric is not None and metric not in metrics:
        yield Fault((*here, "metric"), f"'{metric}' is not one of evaluate.metrics{near(metric, metrics)}")


def _order_faults(stages: Sequence[Any], kinds: Sequence[str | None]) -> Iterator[Fault]:
    """Nothing comes after packed weights: those of a quantize stage, and of training for few bits."""
    aware = [
        kind in ("finetune", "distill") and _asks(stage[kind], "quantize_aware") for stage, kind in zip(stages, kinds)
    ]
    packing = [index for index, kind in enumerate(kinds) if kind == "quantize" or aware[index]]
    for index in packing[1:]:
        what = "quantize stage is allowed" if kinds[index] == "quantize" else "stage may quantize"
        yield Fault(("stages", index), f"only one {what}, and stages[{packing[0]}] is one")
    if packing and any(index not in packing for index in range(packing[0] + 1, len(kinds))):
        who = "a stage with quantize_aware" if aware[packing[0]] else "quantize"
        yield Fault(("stages", packing[0]), f"{who} must be the last stage")


def _asks(options: Any, name: str) -> bool:
    return isinstance(options, Mapping) and options.get(name) is not None


def _lost_zeros_faults(stages: Sequence[Any], kinds: Sequence[str | None]) -> Iterator[Fault]:
    """Training moves every weight, so zeros that were pruned before it only last under a pruning callback."""
    pruned: int | None = None
    for index, (stage, kind) in enumerate(zip(stages, kinds)):
        options = stage[kind] if kind in ("prune", "finetune", "distill") else None
        prunes = kind == "prune" or _asks(options, "prune")
        if prunes and pruned is None:
            pruned = index
        elif kind in ("finetune", "distill") and pruned is not None and not prunes:
            text = f"training would undo stages[{pruned}]: prune here too, which keeps the zeros that are there"
            yield Fault(("stages", index, kind), text)


def _reopened_faults(stages: Sequence[Any], kinds: Sequence[str | None]) -> Iterator[Fault]:
    """Heads and neurons are closed by zeros, which only last through a training if something holds them there."""
    for option, what in (("prune_heads", "heads"), ("prune_neurons", "neurons")):
        closed: int | None = None
        for index, (stage, kind) in enumerate(zip(stages, kinds)):
            if kind == "shrink":
                closed = None
            options = stage[kind] if kind in ("finetune", "distill") else None
            if kind not in ("finetune", "distill") or not isinstance(options, Mapping):
                continue
            if options.get(option) is not None:
                closed = index if closed is None else closed
            elif closed is not None and not _holds_all_zeros(options.get("prune")):
                text = (
                    f"training would reopen the {what} that stages[{closed}] closed: put a shrink stage before this "
                    f"one, or give {option} here too, which keeps what is closed"
                )
                yield Fault(("stages", index, kind), text)


def _holds_all_zeros(prune: Any) -> bool:
    """Say whether gradual pruning of weights covers every linear layer, whose zeros it then keeps."""
    return isinstance(prune, Mapping) and prune.get("targets") is None and not prune.get("exclude")


def earlier_stage(teacher: str, names: Sequence[str], index: int) -> str | None:
    """Return the name of the stage before ``index`` that a teacher means by name or index, or None."""
    if teacher.isdecimal() and int(teacher) < index:
        return names[int(teacher)]
    return teacher if teacher in names[:index] else None


def _teacher_faults(stages: Sequence[Any], kinds: Sequence[str | None]) -> Iterator[Fault]:
    names = stage_names(kinds)
    for index, (stage, kind) in enumerate(zip(stages, kinds)):
        options = stage[kind] if kind == "distill" else None
        teacher = options.get("teacher") if isinstance(options, Mapping) else None
        for path, one in _teachers(teacher, index):
            problem = _teacher_problem(one, names, index)
            if problem is not None:
                yield Fault(path, problem)


def _teachers(teacher: Any, index: int) -> list[tuple[tuple[Any, ...], Any]]:
    """Return the teachers that the stage ``index`` names, one or several, with their places."""
    here = ("stages", index, "distill", "teacher")
    several = list(enumerate(teacher)) if isinstance(teacher, (list, tuple)) else []
    return [((*here, place), one) for place, one in several] or [(here, teacher)]


def _teacher_problem(teacher: Any, names: Sequence[str], index: int) -> str | None:
    """Say why the stage ``index`` has no such teacher, or return None."""
    if not isinstance(teacher, (str, int)) or isinstance(teacher, bool) or teacher == "":
        return None  # of another type, which is said elsewhere
    text = str(teacher)
    if text == "original" or earlier_stage(text, names, index) is not None:
        return None
    if not text.isdecimal() and ("/" in text or text.startswith("package:") or os.path.isdir(text)):
        return None
    known = ["original", *(name for name in names[:index] if name)]
    if text in names or (text.isdecimal() and int(text) < len(names)):
        problem = f"'{text}' does not come before this stage"
    else:
        problem = f"there is no teacher '{text}'{near(text, known)}"
    return f"{problem}; known: {', '.join(known)}, or a model id with a '/'"


def _vocabulary_faults(stages: Sequence[Any], kinds: Sequence[str | None]) -> Iterator[Fault]:
    """A teacher must read the student's tokens, which a pruned vocabulary numbers anew."""
    pruned = [index for index, kind in enumerate(kinds) if kind == "prune_vocabulary"]
    names = stage_names(kinds)
    for index, (stage, kind) in enumerate(zip(stages, kinds)):
        before = [one for one in pruned if one < index]
        if kind != "distill" or not before or not isinstance(stage[kind], Mapping):
            continue
        for path, teacher in _teachers(stage[kind].get("teacher", "original"), index):
            name = earlier_stage(str(teacher), names, index)
            if name is None or names.index(name) < before[-1]:
                text = (
                    f"teacher '{teacher}' does not read the tokens that stages[{before[-1]}] numbered anew: distil "
                    "before it, or learn from that stage or a later one"
                )
                yield Fault(path, text)
