"""What is wrong with a stage, its training options or the order of stages is said in exact words."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfcompress.pruning.oneshot import METHODS as PRUNERS
from hfcompress.quantization import METHODS
from hfcompress.recipe import load_recipe
from hfcompress.recipe.checks import PROBLEMS_WITHOUT_CLASSES, WITHOUT_CLASSES
from hfcompress.tasks import TASKS
from hfcompress.tasks.base import Head
from tests.test_recipe import PLAIN, with_stages, write
from tests.test_recipe_faults import faults

STAGE_FAULTS = [
    ("finetun: {steps: 1}", "stages[0]: unknown stage 'finetun' (finetune?)"),
    (
        "mystery: {}",
        "stages[0]: unknown stage 'mystery'; known: drop_layers, prune_vocabulary, prune, finetune, distill, shrink, "
        "quantize",
    ),
    ("finetune", "stages[0]: must be a mapping from the stage's kind to its options, not 'finetune'"),
    ("{}", "stages[0]: must have one key, the stage's kind, but has none (indent options below the kind)"),
    ("finetune:\n    steps: 1",
     "stages[0]: must have one key, the stage's kind, but has finetune, steps (indent options below the kind)"),
    ("finetune:", "stages[0].finetune: give either steps or epochs"),
    ("finetune: 5", "stages[0].finetune: must be a mapping of options, not 5"),
    ("finetune: {steps: 1, epochs: 2}",
     "stages[0].finetune: give either steps or epochs, not both (steps=1, epochs=2)"),
    ("finetune: {steps: 0}", "stages[0].finetune.steps: must be at least 1, not 0"),
    ("finetune: {epochs: .inf}", "stages[0].finetune.epochs: must be a finite number, not inf"),
    ("distill: {steps: 1, alpha: 1.5}", "stages[0].distill.alpha: must be at most 1, not 1.5"),
    ("distill: {steps: 1, temperature: 0}", "stages[0].distill.temperature: must be greater than 0, not 0"),
    ("distill: {steps: 1, teacher: orignal}",
     "stages[0].distill.teacher: there is no teacher 'orignal' (original?); known: original, "
     "or a model id with a '/'"),
    ("distill: {steps: 1, teacher: 0}",
     "stages[0].distill.teacher: '0' does not come before this stage; known: original, or a model id with a '/'"),
    ("distill: {steps: 1, teacher: 7}",
     "stages[0].distill.teacher: there is no teacher '7'; known: original, or a model id with a '/'"),
    ("drop_layers: {}", "stages[0].drop_layers: give either keep (how many layers) or layers (which ones)"),
    ("drop_layers: {layers: [0, -1]}", "stages[0].drop_layers.layers[1]: must be at least 0, not -1"),
    ("drop_layers: {keep: true}", "stages[0].drop_layers.keep: must be a whole number, not true"),
    ("quantize:", f"stages[0].quantize: 'method' is missing; known: {', '.join(METHODS)}"),
    ("quantize: {method: gptqq}", f"stages[0].quantize.method: 'gptqq' is not one of {', '.join(METHODS)} (gptq?)"),
    ("quantize: {method: [a]}", f"stages[0].quantize.method: a list is not one of {', '.join(METHODS)}"),
    ("quantize: {method: gptq, calibration_row: 1}",
     "stages[0].quantize: unknown option 'calibration_row' (calibration_rows?)"),
    ("quantize: {method: gptq, calibration_rows: 0}",
     "stages[0].quantize.calibration_rows: must be at least 1, not 0"),
    ("quantize: {method: gptq, bits: '4'}", "stages[0].quantize.bits: '4' is not one of 2, 3, 4, 8, auto"),
    ("quantize: {method: rtn, calibration_rows: 8}",
     "stages[0].quantize.calibration_rows: method rtn needs no calibration data: remove this"),
    ("quantize: {method: rtn, damping: 0.1}",
     "stages[0].quantize: unknown option 'damping'; known: activations, bits, embeddings, exclude, group_size, "
     "head, method, scale, symmetric"),
    ("quantize: {method: rtn, prune: {sparsity: 0.5}}",
     "stages[0].quantize.prune: method rtn cannot prune in the same pass: remove this"),
    ("quantize: {method: gptq, prune: {sparsity: 1}}",
     "stages[0].quantize.prune.sparsity: must be less than 1, not 1"),
    ("quantize: {method: gptq, damping: 0.1, prune: {sparsity: 0.5}}",
     "stages[0].quantize: one Hessian serves both, but damping is 0.1 here and 0.01 in prune; give both the same"),
    ("quantize: {method: gptq, order: groups, prune: {sparsity: 0.5}}",
     "stages[0].quantize: order: groups takes columns apart that prune chooses from together; remove it, or prune "
     "in a stage before this one"),
    ("quantize: {method: gptq, sweeps: 21}", "stages[0].quantize.sweeps: must be at most 20, not 21"),
    ("prune: {method: wnda}", f"stages[0].prune.method: 'wnda' is not one of {', '.join(PRUNERS)} (wanda?)"),
    ("prune: {method: magnitude, calibration_rows: 8}",
     "stages[0].prune.calibration_rows: method magnitude needs no calibration data: remove this"),
    ("prune: {method: wanda, damping: 0.1}",
     "stages[0].prune: unknown option 'damping'; known: calibration_length, calibration_rows, exclude, method, "
     "pattern, sparsity, targets"),
    ("prune: {method: wanda, pattern: 2:4}", "stages[0].prune.pattern: must be text, not 124: put it in quotes"),
    ("prune: {method: wanda, pattern: '1:4'}",
     "stages[0].prune: pattern '1:4' keeps 1 of every 4 weights, which is sparsity=0.75, not 0.5"),
    ("prune: {method: wanda, targets: [1]}", "stages[0].prune.targets[0]: must be text, not 1: put it in quotes"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "expected"), STAGE_FAULTS, ids=[stage for stage, _ in STAGE_FAULTS])
def test_a_fault_in_a_stage(tmp_path: Path, stage: str, expected: str) -> None:
    assert faults(tmp_path, with_stages(stage)) == [f"line 6, {expected}"]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("[]", "must not be empty"),
        ("{a: 1}", "must be a list, not a mapping"),
        ("", "must be a list, but is empty"),
    ],
)
def test_stages_are_a_list(tmp_path: Path, stages: str, expected: str) -> None:
    text = PLAIN[: PLAIN.index("stages:")] + f"stages: {stages}\n"
    assert faults(tmp_path, text) == [f"line 5, stages: {expected}"]


TRAINING_FAULTS = [
    ("output_dir: x", ".output_dir: is set by the recipe's output"),
    ("seed: 1", ".seed: is set by the recipe's seed"),
    ("max_steps: 5", ".max_steps: use steps of the stage"),
    ("num_train_epochs: 5", ".num_train_epochs: use epochs of the stage"),
    ("hub_token: x", ".hub_token: a token does not belong in a file; log in with 'hf auth login'"),
    ("evaluation_strategy: epoch", ": unknown option 'evaluation_strategy' (eval_strategy?)"),
    ("zzz: 1", ": unknown option 'zzz'; see transformers.TrainingArguments"),
    ("learning_rate: fast", ".learning_rate: must be a number, not 'fast'"),
    ("learning_rate: true", ".learning_rate: must be a number, not true"),
    ("learning_rate:", ".learning_rate: must be a number, but is empty"),
    ("bf16: 3", ".bf16: must be true or false, not 3"),
    ("logging_steps: [1]", ".logging_steps: must be a number, not a list"),
    ("report_to: 5", ".report_to: must be text or a list of text, not 5"),
    ("accelerator_config: 5", ".accelerator_config: must be a mapping or text, not 5"),
    ("save_strategy: epochs", ".save_strategy: 'epochs' is not one of no, steps, epoch, best (epoch?)"),
    ("label_names: [1]", ".label_names[0]: must be text, not 1: put it in quotes"),
]


@pytest.mark.parametrize(("option", "expected"), TRAINING_FAULTS, ids=[option for option, _ in TRAINING_FAULTS])
def test_a_fault_in_training(tmp_path: Path, option: str, expected: str) -> None:
    text = with_stages(f"finetune:\n      steps: 1\n      training:\n        {option}\n        fp16: true")
    assert faults(tmp_path, text) == [f"line 9, stages[0].finetune.training{expected}"]


@pytest.mark.parametrize(
    ("task", "stage", "option", "why"),
    [
        ("causal-lm", "distill", "use_liger_kernel: true", "leaves no logits to distil from"),
        ("question-answering", "finetune", "label_smoothing_factor: 0.1", "an answer is two places in a text"),
        ("speech-ctc", "distill", "label_smoothing_factor: 0.1", "its loss is of all ways to say a text"),
    ],
)
def test_training_fits_the_task(tmp_path: Path, task: str, stage: str, option: str, why: str) -> None:
    text = with_stages(f"{stage}: {{steps: 1, training: {{{option}}}}}")
    (found,) = faults(tmp_path, text.replace("task: causal-lm", f"task: {task}"))
    assert found.startswith(f"line 6, stages[0].{stage}.training.{option.partition(':')[0]}: ")
    assert found.endswith(f"{why}: remove it")
    load_recipe(write(tmp_path, with_stages(f"finetune: {{steps: 1, training: {{{option}}}}}")))


def test_recipes_without_classes_are_those_whose_tasks_have_none() -> None:
    problems = (None, *PROBLEMS_WITHOUT_CLASSES)
    without = {name for name, task in TASKS.items() if "classes" not in task.forms(None)}
    assert without == {*WITHOUT_CLASSES}
    for problem in problems:
        has = "classes" in TASKS["sequence-classification"].forms(Head(problem=problem))
        assert has == (problem not in PROBLEMS_WITHOUT_CLASSES)


def test_training_is_a_mapping(tmp_path: Path) -> None:
    found = faults(tmp_path, with_stages("finetune: {steps: 1, training: [a]}"))
    assert found == ["line 6, stages[0].finetune.training: must be a mapping, not a list"]


def test_quantize_comes_last_and_once(tmp_path: Path) -> None:
    text = with_stages("quantize: {method: rtn}", "finetune: {steps: 1}", "quantize: {method: rtn}")
    assert faults(tmp_path, text) == [
        "line 6, stages[0]: quantize must be the last stage",
        "line 8, stages[2]: only one quantize stage is allowed, and stages[0] is one",
    ]


def test_training_must_not_undo_pruning(tmp_path: Path) -> None:
    prune, kept = "prune: {method: magnitude}", "finetune: {steps: 1, prune: {sparsity: 0.5}}"
    assert faults(tmp_path, with_stages("finetune: {steps: 1}", prune, kept, "distill: {steps: 1}")) == [
        "line 9, stages[3].distill: training would undo stages[1]: prune here too, "
        "which keeps the zeros that are there"
    ]


def test_zeros_that_training_made_must_last_too(tmp_path: Path) -> None:
    pruning = "finetune: {steps: 1, prune: {sparsity: 0.5}}"
    assert faults(tmp_path, with_stages("finetune: {steps: 1}", pruning, "distill: {steps: 1}")) == [
        "line 8, stages[2].distill: training would undo stages[1]: prune here too, "
        "which keeps the zeros that are there"
    ]


@pytest.mark.parametrize("option", ["prune_heads", "prune_neurons"])
@pytest.mark.parametrize(
    ("later", "is_fault"),
    [
        (["finetune: {steps: 1}"], True),
        (["distill: {steps: 1, prune: {targets: ['*.query']}}"], True),
        (["distill: {steps: 1, prune: {exclude: ['*.query']}}"], True),
        (["shrink: {}", "finetune: {steps: 1}"], False),
        (["finetune: {steps: 1, prune: {sparsity: 0.5}}"], False),
        (["distill: {steps: 1, OPTION: {sparsity: 0.7}}", "shrink: {}"], False),
    ],
)
def test_closed_heads_and_neurons_must_last_until_they_are_removed(
    option: str, later: list[str], is_fault: bool, tmp_path: Path
) -> None:
    stages = [stage.replace("OPTION", option) for stage in later]
    text = with_stages(f"finetune: {{steps: 1, {option}: {{sparsity: 0.5}}}}", *stages)
    if not is_fault:
        assert len(load_recipe(write(tmp_path, text)).stages) == 1 + len(stages)
        return
    kind = stages[-1].split(":")[0]
    wanted = (
        f"line 7, stages[1].{kind}: training would reopen the {option.removeprefix('prune_')} that stages[0] closed: "
        f"put a shrink stage before this one, or give {option} here too, which keeps what is closed"
    )
    assert faults(tmp_path, text) == [wanted]


def test_teacher_reads_the_tokens_of_the_student(tmp_path: Path) -> None:
    stages = ["finetune: {steps: 1}", "prune_vocabulary: {}", "distill: {steps: 1}",
              "distill: {steps: 1, teacher: finetune}", "distill: {steps: 1, teacher: prune_vocabulary}",
              "distill: {steps: 1, teacher: a/b}"]  # fmt: skip
    assert faults(tmp_path, with_stages(*stages)) == [
        f"line {6 + index}, stages[{index}].distill.teacher: teacher '{name}' does not read the tokens that stages[1] "
        "numbered anew: distil before it, or learn from that stage or a later one"
        for index, name in ((2, "original"), (3, "finetune"), (5, "a/b"))
    ]


def test_cross_checks_are_made_although_options_have_faults(tmp_path: Path) -> None:
    text = with_stages("quantize: {method: rtn, bits: 5}", "distill: {steps: x, teacher: finetune}",
                       "finetune: {steps: 1}")  # fmt: skip
    assert faults(tmp_path, text) == [
        "line 6, stages[0].quantize.bits: 5 is not one of 2, 3, 4, 8",
        "line 6, stages[0]: quantize must be the last stage",
        "line 7, stages[1].distill.steps: must be a whole number, not 'x'",
        "line 7, stages[1].distill.teacher: 'finetune' does not come before this stage; "
        "known: original, quantize, or a model id with a '/'",
    ]
