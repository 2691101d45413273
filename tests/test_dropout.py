"""A stage's dropout is that of the training alone: in every family, whatever happens, and not in the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hfcompress.errors import ModelError
from hfcompress.job import Job, Source
from hfcompress.recipe import Distill, Finetune
from hfcompress.stages import run_stage
from hfcompress.structure.dropout import dropout_of
from hfcompress.training import train, training_options
from tests.conftest import VOCABULARY_SIZE, tiny_llama, token_batches
from tests.distilling import StopAt, equal, weights_of
from tests.families import DECODER, FAMILIES, HIDDEN, LAYERS, Family, inputs_of
from tests.runs import language_recipe

pytestmark = pytest.mark.usefixtures("quick_trainers")

# GPT-Neo's attention reads its config each time it runs.
_NEO: Callable[[], hf.PreTrainedConfig] = lambda: hf.GPTNeoConfig(  # noqa: E731
    vocab_size=VOCABULARY_SIZE, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=4, max_position_embeddings=64,
    attention_types=[[["global", "local"], 2]], bos_token_id=4, eos_token_id=5,
)  # fmt: skip
EVERY = {**FAMILIES, "gpt_neo": Family(DECODER, _NEO, {"transformer.h": LAYERS}, (6,))}


class Drops(TorchFunctionMode):
    """Notes the probability of every dropout that runs, and what is drawn of it."""

    def __init__(self) -> None:
        self.seen: set[float] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            p, training = kwargs.get("p", 0.5), kwargs.get("training", True)
            self.seen.add(p if training else 0.0)
        elif func is F.scaled_dot_product_attention:
            self.seen.add(kwargs.get("dropout_p", 0.0))
        return func(*args, **kwargs)


def dropping(family: Family, eager: bool) -> hf.PreTrainedModel:
    """A model in which every dropout that its configs name is 0.3, in training mode."""
    config = family.config()
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name, value in vars(part).items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, (int, float)):
                setattr(part, name, 0.3)
    torch.manual_seed(0)
    model: hf.PreTrainedModel = family.auto.from_config(config, attn_implementation="eager" if eager else None)
    return model.train()


def told_probabilities(model: nn.Module) -> dict[str, Any]:
    """Return every number that a module or a config holds, by its place."""
    found = {f"{name}.{key}": value for name, module in model.named_modules() for key, value in vars(module).items()
             if isinstance(value, (int, float))}  # fmt: skip
    return {**found, "config": json.dumps(model.config.to_dict(), default=str)}


def run(model: hf.PreTrainedModel, family: Family) -> tuple[Tensor, set[float]]:
    with Drops() as drops:
        out = model(**inputs_of(family))
    return next(value for value in out.values() if isinstance(value, Tensor)).detach(), drops.seen


@pytest.mark.parametrize("eager", [False, True], ids=["usual", "eager"])
@pytest.mark.parametrize("name", EVERY)
def test_every_dropout_of_a_family_is_the_one_that_was_asked_for(name: str, eager: bool) -> None:
    family = EVERY[name]
    model = dropping(family, eager)
    before = told_probabilities(model)
    first, seen = run(model, family)
    assert not torch.equal(first, run(model, family)[0])
    assert max(seen) == 0.3
    with dropout_of(model, 0.0):
        first, seen = run(model, family)
        assert torch.equal(first, run(model, family)[0])
        assert seen == {0.0}
    with dropout_of(model, 0.2):
        assert run(model, family)[1] == {0.2}
    assert told_probabilities(model) == before


def test_a_failure_brings_back_what_was() -> None:
    model = dropping(EVERY["bert"], eager=False)
    before = told_probabilities(model)

    def fail() -> None:
        assert told_probabilities(model) != before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), dropout_of(model, 0.0):
        fail()
    assert told_probabilities(model) == before


def test_a_model_without_dropout_has_none_to_raise() -> None:
    model = nn.Linear(2, 2)
    with dropout_of(model, 0.0), dropout_of(model, None):
        pass
    with pytest.raises(ModelError, match=r"Linear has no dropout that could be set to 0\.1"), dropout_of(model, 0.1):
        pass


def trainer_of(work: Path, dropout: float, **changes: Any) -> hf.Trainer:
    """A trainer of a stage's arguments, for a model whose config says this dropout."""
    stage = Finetune(steps=4, training={"save_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-2})
    arguments = hf.TrainingArguments(**{**training_options(stage, work, seed=0), "bf16": False})
    rows = [{name: values[0] for name, values in batch.items()} for batch in token_batches(count=4, length=8)]
    model = tiny_llama(layers=1, attention_dropout=dropout)
    return hf.Trainer(model=model, args=arguments, train_dataset=rows, **changes)


def test_a_resumed_training_has_the_dropout_that_was_asked_for(tmp_path: Path) -> None:
    plain, dropping = trainer_of(tmp_path / "plain", 0.0), trainer_of(tmp_path / "dropping", 0.3)
    train(plain, "training")
    train(dropping, "training")
    assert not equal(weights_of(plain.model), weights_of(dropping.model))
    stopped = trainer_of(tmp_path / "stopped", 0.3, callbacks=[StopAt(2)])
    train(stopped, "training", 0.0)
    resumed = trainer_of(tmp_path / "stopped", 0.3)
    train(resumed, "training", 0.0)
    assert [entry["step"] for entry in resumed.state.log_history if "train_runtime" in entry] == [4]
    assert equal(weights_of(resumed.model), weights_of(plain.model))
    assert resumed.model.config.attention_dropout == 0.3
    assert resumed.model.model.layers[0].self_attn.attention_dropout == 0.3


@pytest.mark.parametrize("kind", ["finetune", "distill"])
def test_a_stage_trains_with_it_and_keeps_the_config(kind: str, sources: Path, tmp_path: Path) -> None:
    results = []
    for name, said, stage in (("plain", 0.0, {}), ("off", 0.3, {"dropout": 0.0})):
        folder = tmp_path / name
        model = hf.AutoModelForCausalLM.from_pretrained(sources / "llama", attention_dropout=said)
        model.save_pretrained(folder)
        hf.AutoTokenizer.from_pretrained(sources / "llama").save_pretrained(folder)
        options = {"steps": 2, "training": {"save_strategy": "no", "learning_rate": 1e-2}, **stage}
        recipe = language_recipe(folder, sources / "text.jsonl", tmp_path / "out", stages=[{kind: options}])
        job = Job(Source(recipe), folder, tmp_path / f"work-{name}", {"original": sources / "llama"})
        results.append(run_stage(recipe.stages[0], job).model)
        assert results[-1].config.attention_dropout == said
    assert equal(weights_of(results[0]), weights_of(results[1]))


@pytest.mark.parametrize("options", [Finetune, Distill])
def test_its_default_is_the_models_own(options: type) -> None:
    field = {one.name: one for one in dataclasses.fields(options)}["dropout"]
    assert field.default is None
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="dropout"):
            options(steps=1, dropout=wrong)
