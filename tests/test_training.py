"""A stage's Trainer goes on from a whole checkpoint whenever it was killed, however few checkpoints it keeps."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from hfcompress.recipe import Finetune
from hfcompress.training import WHOLE, _KeepWhole, last_whole_checkpoint, train, training_options
from tests.conftest import tiny_llama, token_batches

STEPS = 4


class Killed(BaseException):
    """What SIGKILL is to a process."""


def make_trainer(work: Path, limit: int) -> Trainer:
    options = Finetune(
        steps=STEPS,
        training={"save_steps": 1, "save_total_limit": limit, "per_device_train_batch_size": 1, "learning_rate": 1e-2},
    )
    arguments = TrainingArguments(**{**training_options(options, work, seed=0), "bf16": False})
    rows = [{name: values[0] for name, values in batch.items()} for batch in token_batches(count=STEPS, length=8)]
    return Trainer(model=tiny_llama(layers=1), args=arguments, train_dataset=rows)


def weights_after(trainer: Trainer) -> dict[str, torch.Tensor]:
    train(trainer, "training")
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("limit", [1, 2])
def test_killed_while_an_old_checkpoint_is_removed(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each removal is interrupted once, half done; every time the run goes on and ends with the same weights."""
    expected = weights_after(make_trainer(tmp_path / "uninterrupted", limit))
    plain = shutil.rmtree
    for fatal in range(1, STEPS - limit):  # the end replaces nothing, as one cannot resume from there
        work = tmp_path / str(fatal)
        removals = 0

        def rmtree(path: Path | str, *args: Any, last: int = fatal, **kwargs: Any) -> None:
            nonlocal removals
            removals += 1
            if removals == last:
                (Path(path) / "optimizer.pt").unlink()
                raise Killed
            plain(path, *args, **kwargs)

        monkeypatch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            weights_after(make_trainer(work, limit))
        monkeypatch.setattr(shutil, "rmtree", plain)
        whole = last_whole_checkpoint(work)
        assert whole is not None
        assert whole.name == f"checkpoint-{fatal + limit}", "the newest, as it was written to its end"
        actual = weights_after(make_trainer(work, limit))
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
        left = sorted(path.name for path in work.glob("checkpoint-*"))
        assert left == [f"checkpoint-{step}" for step in range(STEPS - limit, STEPS + 1)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_same_checkpoints_are_kept_as_by_the_trainer(count: int, tmp_path: Path) -> None:
    steps = [2, 9, 10, 11, 100][:count]  # sorted by step, not by name
    bests = [None, *(f"checkpoint-{step}" for step in steps), "checkpoint-7"]
    for number, (limit, best) in enumerate(itertools.product([None, 0, 1, 2, 3, 9], bests)):
        left = []
        for name in ("ours", "theirs"):
            work = tmp_path / f"{number}-{name}"
            for step in steps:
                (work / f"checkpoint-{step}").mkdir(parents=True)
            path = None if best is None else str(work / best)
            if name == "ours":
                state = TrainerState(global_step=steps[-1], max_steps=1000, best_model_checkpoint=path)
                arguments = TrainingArguments(output_dir=str(work), report_to="none")
                _KeepWhole(limit).on_save(arguments, state, TrainerControl())
                assert (work / f"checkpoint-{steps[-1]}" / WHOLE).is_file()
            else:
                rotate_checkpoints(str(work), limit, path)
            left.append(sorted(one.name for one in work.iterdir()))
        assert left[0] == left[1], (limit, best)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="concerns machines without an accelerator")
@pytest.mark.parametrize("training", [{}, {"bf16": True}])
def test_bfloat16_is_trained_on_a_cpu_that_is_fast_at_it(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer takes bf16 on a CPU only when it is told that there is nothing else."""
    monkeypatch.setattr("hfcompress.training.fast_bfloat16", lambda: True)
    arguments = TrainingArguments(**training_options(Finetune(steps=1, training=training), tmp_path, seed=0))
    assert arguments.bf16
    assert arguments.device.type == "cpu"


def test_after_mixed_precision_the_model_answers_in_its_own(tmp_path: Path) -> None:
    """Saving verifies a model against its reloaded twin, which knows nothing of autocast."""
    options = training_options(Finetune(steps=1, training={"save_strategy": "no"}), tmp_path, seed=0)
    arguments = TrainingArguments(**{**options, "use_cpu": True, "bf16": True})
    rows = [{name: values[0] for name, values in batch.items()} for batch in token_batches(count=2, length=8)]
    trainer = Trainer(model=tiny_llama(layers=1), args=arguments, train_dataset=rows)
    train(trainer, "training")
    twin = tiny_llama(layers=1)
    twin.load_state_dict(trainer.model.state_dict())
    batch = token_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**batch).logits, twin.eval()(**batch).logits)
