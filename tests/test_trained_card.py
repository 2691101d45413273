"""A model that a Trainer made without a recipe has a card, and is pushed like any other."""

from __future__ import annotations

import ast
import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants, hf_hub_download
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

import hfcompress
from hfcompress.checkpoint.files import weights_digest
from hfcompress.errors import HFCompressError
from hfcompress.evaluated import digest_of_model
from hfcompress.publish import load_facts
from hfcompress.publish.card import render_folder
from hfcompress.publish.licence import licence_facts
from hfcompress.publish.trained import saved_for_push, task_of
from tests.conftest import tiny_llama, token_batches
from tests.distributed import run_in_two_processes
from tests.forks import Forks
from tests.kinds import encoder, family, wav2vec2

pytestmark = pytest.mark.usefixtures("quick_trainers", "forked")
ROWS = [{name: value[0] for name, value in batch.items()} for batch in token_batches(8, rows=1)]


class CardTrainer(hfcompress.ModelCardMixin, Trainer):
    """What the documentation tells users of callbacks to write."""


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 4,
            "eval_strategy": "steps", "eval_steps": 4, "seed": 3, **changes}  # fmt: skip


def pruning(folder: Path, tokenizer: Any, kind: type[Trainer] = CardTrainer, **changes: Any) -> Trainer:
    return kind(
        model=tiny_llama(), args=TrainingArguments(**options(folder, **changes)), train_dataset=ROWS,
        eval_dataset=ROWS[:4], processing_class=tokenizer, callbacks=[hfcompress.PruneCallback(sparsity=0.5)],
    )  # fmt: skip


def test_the_card_says_what_was_trained_and_measured(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = pruning(tmp_path / "pruned", tokenizer)
    trainer.train()
    trainer.create_model_card(tags="mine", license="mit", dataset="me/data", language="en")
    facts = load_facts(tmp_path / "pruned")
    logged = [logs for logs in trainer.state.log_history if "eval_loss" in logs][-1]
    assert facts.after.metrics == {"loss": pytest.approx(logged["eval_loss"])}
    assert facts.after.rows == 4
    assert facts.stages[0].summary == "4 steps, 50.0% of the targeted weights pruned"
    text = (tmp_path / "pruned" / "README.md").read_text()
    assert "sparsity=0.5" in text
    assert "Trainer's own, at step 4 of 4" in text
    assert "after reloading" not in text
    assert "was not recorded" not in text
    assert "**Loads without hfcompress: not measured**" in text
    assert "import hfcompress" not in text
    assert "Install hfcompress" not in text
    assert "Before is" not in text
    data = ModelCard.load(tmp_path / "pruned" / "README.md").data
    assert (data.license, data.tags, data.datasets) == ("mit", ["hfcompress", "pruned", "mine"], ["me/data"])
    assert (data.language, data.pipeline_tag) == ("en", "text-generation")


def test_the_card_has_what_stock_takes_and_keeps_tags_that_are_there(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = pruning(tmp_path / "told", tokenizer)
    trainer.train()
    trainer.create_model_card(tags=["first"])
    trainer.create_model_card(
        tags="second", tasks="summarization", dataset=["The News", "Others"], dataset_tags=["me/news", "me/others"],
        dataset_args=["2026"],
    )  # fmt: skip
    data = ModelCard.load(tmp_path / "told" / "README.md").data
    assert set(data.tags) == {"hfcompress", "pruned", "first", "second"}
    assert len(data.tags) == 4
    assert (data.pipeline_tag, data.datasets) == ("summarization", ["me/news", "me/others"])
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name, result.dataset_config) == (
        "summarization", "me/news", "The News", "2026")  # fmt: skip
    assert "`The News`" in (tmp_path / "told" / "README.md").read_text()
    trainer.create_model_card(dataset=["me/one", "me/two"])
    assert ModelCard.load(tmp_path / "told" / "README.md").data.datasets == ["me/one", "me/two"]


def test_the_base_models_licence_is_carried_over(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model")
    trainer = pruning(tmp_path / "licensed", tokenizer)
    trainer.model.config._name_or_path = str(tmp_path / "base")
    card = tmp_path / "licensed" / "README.md"
    trainer.create_model_card()
    assert ModelCard.load(card).data.license == "cc-by-4.0"
    assert "licence is not known" not in card.read_text()
    trainer.create_model_card(license="mit")
    assert ModelCard.load(card).data.license == "mit"


@pytest.fixture
def hub_that_hangs_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub that takes connections and breaks each of them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # closed
                    return
                connection.recv(1024)
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        there = partial(hf_hub_download, endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr("hfcompress.publish.licence.hf_hub_download", there)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.usefixtures("hub_that_hangs_up")
def test_a_broken_connection_while_a_licence_is_looked_up_loses_nothing() -> None:
    """Cards are written at the end of hours of work, when the base model's licence is the one thing to be fetched."""
    assert licence_facts("me/base") == {"base_model_license": None}


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: [mit]", {"license": "mit"}),
        ("license: [mit, apache-2.0]", {}),  # which of them holds is not for a card to choose
        (
            "license: other\nlicense_name: own\nlicense_link: https://example.org/terms",
            {"license": "other", "license_name": "own", "license_link": "https://example.org/terms"},
        ),
        (
            "license: other\nlicense_link: LICENSE.md",
            {"license": "other"},
        ),  # the base's own file
        ("license: other\nlicense_name: 3", {"license": "other"}),
    ],
)
def test_a_licence_of_its_own_keeps_its_name_and_its_link(
    head: str, said: dict[str, str], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(f"---\n{head}\n---\n")
    trainer = pruning(tmp_path / "out", tokenizer)

    def found() -> dict[str, str]:
        data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
        return {key: value for key, value in data.items() if key.startswith("license")}

    trainer.create_model_card(finetuned_from=str(tmp_path / "base"))
    assert found() == said
    trainer.create_model_card(finetuned_from=str(tmp_path / "base"), license="mit")
    assert found() == {"license": "mit"}


def test_a_file_with_a_licence_is_linked_where_the_hub_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE.md\n---\n")
    monkeypatch.setattr("hfcompress.publish.licence.hf_hub_download", lambda *args, **kwargs: tmp_path / "README.md")
    terms = licence_facts("me/base", "v2")["base_model_license_terms"]
    assert terms == {"license_link": "https://huggingface.co/me/base/blob/v2/LICENSE.md"}


def test_the_card_is_of_the_weights_as_they_are_now(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = pruning(tmp_path / "twice", tokenizer)
    trainer.train()
    trainer.save_model()
    hfcompress.prune(trainer.model, hfcompress.Magnitude(sparsity=0.9))
    trainer.create_model_card()
    facts = load_facts(tmp_path / "twice")
    assert facts.after.nonzero == sum(int(weight.count_nonzero()) for weight in trainer.model.parameters())
    assert facts.after.nonzero == hfcompress.inspect_checkpoint(tmp_path / "twice").nonzero


def test_the_class_of_a_model_that_came_from_nowhere_is_no_id(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = pruning(tmp_path / "new", tokenizer)
    trainer.create_model_card()
    assert "`LlamaForCausalLM`" in (tmp_path / "new" / "README.md").read_text()
    data = ModelCard.load(tmp_path / "new" / "README.md").data
    assert {"base_model", "base_model_relation"}.isdisjoint(data.to_dict())


def test_a_local_base_model_is_no_id_wherever_the_card_is_rendered(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("models/base")
    trainer = pruning(tmp_path / "out", tokenizer)
    trainer.create_model_card(finetuned_from="models/base", dataset="me/rows")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert render_folder(tmp_path / "out") == (tmp_path / "out" / "README.md").read_text()
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert {"base_model", "base_model_relation"}.isdisjoint(data.to_dict())
    assert data.datasets == ["me/rows"]
    trainer.create_model_card(finetuned_from="me/base")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("me/base", "finetune")


def test_a_models_own_tags_are_on_its_card(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As ``push_to_hub`` has them, also where a card is made or pushed in other ways."""
    trainer = pruning(tmp_path / "out", tokenizer)
    trainer.model.add_model_tags(["mine", "pruned"])
    with saved_for_push(trainer) as folder:
        pushed = ModelCard.load(folder / "README.md").data.tags
    assert [pushed.count(tag) for tag in ("hfcompress", "mine", "pruned")] == [1, 1, 1]
    trainer.create_model_card(tags="another")
    assert {"mine", "another"} <= {*ModelCard.load(tmp_path / "out" / "README.md").data.tags}


def test_a_folder_that_has_gone_is_no_id(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name may be a stranger's, whose model this was not made from, and whose licence is another."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    asked: list[str] = []
    monkeypatch.setattr(
        "hfcompress.publish.trained.licence_facts",
        lambda name: asked.append(name) or {"base_model_license": "mit"},
    )
    tiny_llama().save_pretrained(tmp_path / "models" / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = pruning(tmp_path / "out", tokenizer)
    trainer.model = AutoModelForCausalLM.from_pretrained("models/base")
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer.create_model_card()
    card = tmp_path / "out" / "README.md"
    assert {"base_model", "base_model_relation", "license"}.isdisjoint(ModelCard.load(card).data.to_dict())
    assert "`models/base`" in card.read_text()
    assert asked == []
    trainer.create_model_card(finetuned_from="models/base")  # whoever says so knows better
    assert ModelCard.load(card).data.base_model == "models/base"
    fetched = cache / "models--models--base" / "snapshots" / "0123"
    fetched.mkdir(parents=True)
    (fetched / "config.json").write_text("{}")
    trainer.create_model_card()
    data = ModelCard.load(card).data
    assert (data.base_model, data.license) == ("models/base", "mit")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "quantized": lambda model: hfcompress.quantize(model, hfcompress.RTN(bits=8, group_size=32)),
    "pruned": lambda model: hfcompress.prune(model, hfcompress.Magnitude(sparsity=0.9)),
    "a single norm": lambda model: model.model.norm.weight.data.mul_(2),
    "two rows exchanged": lambda model: model.lm_head.weight.data.copy_(model.lm_head.weight.data.roll(1, 0)),
    "layers dropped": lambda model: hfcompress.drop_layers(model, hfcompress.DropLayers(keep=1)),
}


@pytest.mark.parametrize("kind", [CardTrainer, Trainer], ids=["mixin", "plain"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_metrics_of_other_weights_are_not_on_the_card(
    change: Callable[[Any], Any], kind: type[Trainer], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = pruning(tmp_path / "late", tokenizer, kind)
    trainer.train()
    with saved_for_push(trainer) as folder:
        assert load_facts(folder).after.metrics
    change(trainer.model)
    with saved_for_push(trainer) as folder:
        facts, text = load_facts(folder), (folder / "README.md").read_text()
    assert (facts.after.metrics, facts.after.rows) == ({}, None)
    assert "No metrics are given: the weights have changed since the Trainer evaluated them, last at step 4." in text
    found = trainer.evaluate()
    with saved_for_push(trainer) as folder:
        facts = load_facts(folder)
    assert (facts.after.metrics, facts.after.rows) == ({"loss": pytest.approx(found["eval_loss"])}, 4)


def test_metrics_of_another_model_are_not_on_the_card(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = pruning(tmp_path / "other", tokenizer)
    trainer.train()
    trained, trainer.model = trainer.model, tiny_llama(seed=5)
    trainer.create_model_card()
    assert load_facts(tmp_path / "other").after.metrics == {}
    found = trainer.evaluate()
    trainer.create_model_card()
    assert load_facts(tmp_path / "other").after.metrics == {"loss": pytest.approx(found["eval_loss"])}
    trainer.model = trained
    trainer.create_model_card()
    first = next(logs for logs in trainer.state.log_history if "eval_loss" in logs)
    assert load_facts(tmp_path / "other").after.metrics == {"loss": pytest.approx(first["eval_loss"])}


def test_the_best_weights_have_their_own_metrics_after_a_resume_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    changes: dict[str, Any] = {"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "learning_rate": 1.0,
    }
    pruning(tmp_path / "best", tokenizer, **changes, **best).train()
    resumed = pruning(tmp_path / "best", tokenizer, **changes, **best)
    resumed.train(resume_from_checkpoint=str(tmp_path / "best" / "checkpoint-5"))
    step = resumed.state.best_global_step
    assert step in (4, 5)  # evaluated before the resume
    resumed.create_model_card()
    logged = {logs["step"]: logs["eval_loss"] for logs in resumed.state.log_history if "eval_loss" in logs}
    assert load_facts(tmp_path / "best").after.metrics == {"loss": pytest.approx(logged[step])}
    assert f"at step {step} of 6" in (tmp_path / "best" / "README.md").read_text()


def test_weights_on_disk_and_in_parts_are_told_apart_too(tmp_path: Path) -> None:
    """A model that Transformers left on disk, and weights of a class of tensors as torchao has them."""
    tiny_llama().save_pretrained(tmp_path / "base")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map={**places, "model.layers": "disk"}, offload_folder=tmp_path / "off"
    )
    trainer = CardTrainer(model=model, args=TrainingArguments(**options(tmp_path / "out")), eval_dataset=ROWS)
    trainer.evaluate()
    assert trainer.state.log_history[-2]["evaluated_weights"] == digest_of_model(tiny_llama())

    def in_parts(second: float) -> PreTrainedModel:
        one = tiny_llama()
        weight = one.model.norm.weight.detach()
        one.model.norm.weight = nn.Parameter(TwoTensor(weight, weight * second), requires_grad=False)
        return one

    assert digest_of_model(in_parts(2.0)) == digest_of_model(in_parts(2.0)) != digest_of_model(in_parts(3.0))


def tell_halves_apart() -> None:
    """Give each of two processes half of every weight, as FSDP does."""
    torch.distributed.init_process_group("gloo")
    model = tiny_llama()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    before = digest_of_model(model)
    model(**token_batches(1)[0])
    assert digest_of_model(model) == before != digest_of_model(tiny_llama())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert digest_of_model(model) != before


def test_weights_that_several_processes_hold_are_told_apart_too(forks: Forks) -> None:
    run_in_two_processes(forks, tell_halves_apart)


def test_of_which_weights_is_not_known_without_callback_and_mixin(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = Trainer(
        model=tiny_llama(), args=TrainingArguments(**options(tmp_path / "stock")), train_dataset=ROWS,
        eval_dataset=ROWS[:4], processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    with saved_for_push(trainer) as folder:
        assert load_facts(folder).after.metrics == {}
        assert (
            "was not recorded, as our callbacks and `hfcompress.ModelCardMixin` do"
            in (folder / "README.md").read_text()
        )


def test_the_trainers_own_card_has_no_results_but_metrics(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A plain Trainer with our callback writes it, from all that its log holds beside a loss."""
    trainer = pruning(tmp_path / "own", tokenizer, kind=Trainer, eval_steps=2)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "own" / "README.md").read_text()
    results = text[text.index("on the evaluation set") :]
    assert "- Loss: " in results
    assert "- Sparsity: 0.5" in results
    assert not any(word in text for word in ("Weights", "Rows"))


def test_rows_and_name_are_of_the_data_that_were_evaluated(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = pruning(tmp_path / "rows", tokenizer)
    trainer.train()
    found = trainer.evaluate(ROWS[:3])
    trainer.create_model_card(dataset="me/data")
    facts, text = load_facts(tmp_path / "rows"), (tmp_path / "rows" / "README.md").read_text()
    assert (facts.after.metrics, facts.after.rows) == ({"loss": pytest.approx(found["eval_loss"])}, 3)
    assert (
        "are of 3 held-out rows; they are the Trainer's own, at step 4 of 4, on data that it was given then." in text
    )
    data = ModelCard.load(tmp_path / "rows" / "README.md").data
    assert (data.datasets, data.eval_results[0].dataset_name) == (["me/data"], "held-out rows")
    trainer.evaluate(trainer.eval_dataset)
    trainer.create_model_card(dataset="me/data")
    assert "are of 4 held-out rows of `me/data`" in (tmp_path / "rows" / "README.md").read_text()


def test_every_evaluated_data_set_is_on_the_card(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = pruning(tmp_path / "sets", tokenizer)
    trainer.eval_dataset = {"one": ROWS[:4], "two": ROWS[4:]}
    trainer.compute_metrics = lambda found: {"pruned_accuracy": 0.5}
    trainer.train()
    trainer.create_model_card()
    logged = {name: value for logs in trainer.state.log_history for name, value in logs.items()}
    assert load_facts(tmp_path / "sets").after.metrics == {
        "one_loss": pytest.approx(logged["eval_one_loss"]), "one_pruned_accuracy": 0.5,
        "two_loss": pytest.approx(logged["eval_two_loss"]), "two_pruned_accuracy": 0.5,
    }  # fmt: skip
    assert load_facts(tmp_path / "sets").after.rows is None  # each has its own


def test_the_card_of_sharded_weights_is_of_those_that_were_saved(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under FSDP, which CPUs do not have here: the first process cannot save alone what several hold."""
    trainer = CardTrainer(
        model=tiny_llama(), args=TrainingArguments(**options(tmp_path / "sharded")), train_dataset=ROWS,
        eval_dataset=ROWS[:4], processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    plugin = SimpleNamespace(state_dict_type="FULL_STATE_DICT")
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    trainer.is_fsdp_enabled = True
    unsaved = r"not saved there as they are now\. Call trainer\.save_model\(\) in every process before"
    with pytest.raises(HFCompressError, match=unsaved):
        trainer.create_model_card()
    tiny_llama(seed=5).save_pretrained(tmp_path / "sharded")  # as an earlier training may have left it
    with pytest.raises(HFCompressError, match=unsaved):
        trainer.create_model_card()
    trainer.save_model(str(tmp_path / "elsewhere"))
    with pytest.raises(HFCompressError, match=unsaved):
        trainer.create_model_card()
    assert not (tmp_path / "sharded" / "README.md").exists()
    trainer.save_model()
    trainer.create_model_card()
    logged = [logs for logs in trainer.state.log_history if "eval_loss" in logs][-1]
    assert load_facts(tmp_path / "sharded").after.metrics == {"loss": pytest.approx(logged["eval_loss"])}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert digest_of_model(saved) == digest_of_model(trainer.model)
    trainer.model.lm_head.weight.data.mul_(2)
    with pytest.raises(HFCompressError, match=unsaved):
        trainer.create_model_card()
    plugin.state_dict_type = "SHARDED_STATE_DICT"  # with which save_model writes nothing that loads
    trainer.save_model()
    with pytest.raises(HFCompressError, match="state_dict_type FULL_STATE_DICT of FSDP"):
        trainer.create_model_card()


UNREADABLE = {
    "broken YAML": b"---\nlicense: [mit\n---\n",
    "a list": b"---\n- license\n---\n",
    "another encoding": "---\nlicense: \u00e9\n---\n".encode("latin-1"),
    "no name of the model": b"---\nlicense: mit\nmodel-index:\n- results: []\n---\n",
}


@pytest.mark.parametrize("head", UNREADABLE.values(), ids=UNREADABLE)
def test_a_card_that_cannot_be_read_stops_nothing(
    head: bytes, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The base model's is somebody else's, and the folder's own may be by hand; both are read after the training."""
    tiny_llama().save_pretrained(tmp_path / "base")
    trainer = pruning(tmp_path / "out", tokenizer)
    trainer.model.config._name_or_path = str(tmp_path / "base")
    for folder in ("base", "out"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "README.md").write_bytes(head)
    trainer.create_model_card(tags="mine")
    assert "mine" in ModelCard.load(tmp_path / "out" / "README.md").data.tags
    assert load_facts(tmp_path / "out").base_model_license in (None, "mit")


def test_a_name_with_quotes_is_shown_and_loaded_as_it_is(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = pruning(tmp_path / 'my "best" <run>*', tokenizer)
    trainer.create_model_card()
    text = (tmp_path / 'my "best" <run>*' / "README.md").read_text()
    assert '# my "best" \\<run>\\*' in text.splitlines()
    lines = text[text.index("```python") + 9 : text.index("```", text.index("```python") + 9)]
    strings = [node.value for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Constant)]
    assert strings == ['my "best" <run>*'] * 2


def test_a_model_of_no_transformers_class_has_the_trainers_own_card(tmp_path: Path) -> None:
    class Wrapper(nn.Module):  # as packages for adapters have one
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()
            self.config = self.inner.config

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    args = TrainingArguments(**options(tmp_path / "plain", remove_unused_columns=False))
    trainer = CardTrainer(Wrapper(), args, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    trainer.create_model_card(license="mit", tags="mine")
    data = ModelCard.load(tmp_path / "plain" / "README.md").data
    assert data.license == "mit"
    assert "mine" in data.tags
    assert not (tmp_path / "plain" / "measurements.json").exists()


def test_a_student_is_called_distilled(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    args = hfcompress.DistillationConfig(**options(tmp_path / "student"), temperature=3.0)
    trainer = hfcompress.DistillationTrainer(
        model=tiny_llama(1), teacher_model=tiny_llama(2), args=args, train_dataset=ROWS, eval_dataset=ROWS,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card(model_name="student")
    text = (tmp_path / "student" / "README.md").read_text()
    assert "distilled" in ModelCard.load(tmp_path / "student" / "README.md").data.tags
    assert "- `temperature`: `3.0`" in text
    assert "# student" in text


def test_a_plain_trainer_is_saved_verified_and_described(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = pruning(tmp_path / "plain", tokenizer, kind=Trainer)
    trainer.train()
    with saved_for_push(trainer) as folder:
        facts = load_facts(folder)
        assert facts.loads_without_hfcompress is True
        assert facts.verification["stock"].max_logit_difference < 1e-5
        assert facts.after.sparsity == hfcompress.inspect_checkpoint(folder).sparsity
        assert facts.weights == weights_digest(folder)
        assert json.loads((folder / "hfcompress.json").read_text())["verified"]
    assert not folder.exists()


def test_a_model_trained_for_its_grid_is_pushed_once_exported(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    callback = hfcompress.QuantizeAwareCallback(bits=4, group_size=32)
    trainer = CardTrainer(
        model=tiny_llama(), args=TrainingArguments(**options(tmp_path / "aware")), train_dataset=ROWS,
        eval_dataset=ROWS[:4], processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card()
    assert load_facts(tmp_path / "aware").after.metrics == {}  # they are of rounded weights, the files are not
    with pytest.raises(HFCompressError, match=r"export\(trainer\.model\) first"), saved_for_push(trainer):
        pass
    callback.export(trainer.model)
    with saved_for_push(trainer) as folder:
        facts = load_facts(folder)
        data = ModelCard.load(folder / "README.md").data
    assert facts.after.metrics == {"loss": pytest.approx(trainer.state.log_history[-2]["eval_loss"])}
    assert "quantized" in data.tags
    assert "bits=4" in facts.training["options"]["QuantizeAwareCallback"]


def push_from_both(folder: Path, shared: bool) -> None:
    """Train in two processes and push from each; the Hub cannot be reached, so the first one's saving is all."""
    constants.HF_HUB_OFFLINE = False
    args = TrainingArguments(**options(folder, report_to="none"))
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=ROWS, eval_dataset=ROWS[:4])
    trainer.train()
    trainer.is_fsdp_enabled = shared
    if not trainer.is_world_process_zero():
        assert hfcompress.push(trainer, "me/small") is None
    elif shared:
        with pytest.raises(HFCompressError, match=r"weights are sharded.* Call trainer\.push_to_hub\(\)"):
            hfcompress.push(trainer, "me/small")
    else:
        with saved_for_push(trainer) as saved:
            assert load_facts(saved).loads_without_hfcompress is True


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "sharded"])
def test_of_several_processes_the_first_pushes(shared: bool, tmp_path: Path, forks: Forks) -> None:
    """Transformers saves in the first alone, so that the others had nothing to push, and failed."""
    run_in_two_processes(forks, push_from_both, tmp_path / "out", shared)


KINDS = {"seq2seq-lm": family("t5"), "multiple-choice": encoder(transformers.BertForMultipleChoice),
         "speech-ctc": wav2vec2, "speech-seq2seq": family("whisper"),
         "feature-extraction": encoder(transformers.BertModel)}  # fmt: skip


@pytest.mark.parametrize("task", KINDS)
def test_the_card_of_any_model_names_its_task(task: str) -> None:
    assert task_of(type(KINDS[task]())) == task


def test_only_folders_and_trainers_are_pushed() -> None:
    refused = pytest.raises(HFCompressError, match="takes a checkpoint folder or a Trainer, not a int")
    with refused, saved_for_push(3):
        pass
