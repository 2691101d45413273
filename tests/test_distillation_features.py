"""Losses of features: the layers that are asked for, token by token, in every split, with projections of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.distillation.logged import LoggedTerms
from hfcompress.distillation.losses import LOSSES, FeatureLoss
from hfcompress.distillation.projections import FILE
from hfcompress.errors import CheckpointError, ModelError
from hfcompress.structure import find_attention, shrink, zero_heads_
from tests.checkpointing import checkpointing
from tests.conftest import VOCABULARY_SIZE
from tests.distilling import (
    ALPHA,
    StopAt,
    bert,
    class_rows,
    distiller,
    equal,
    llama,
    rows_for,
    spread,
    stack,
    text_rows,
    weights_of,
)
from tests.kinds import KINDS, family, pad, wav2vec2

pytestmark = pytest.mark.usefixtures("quick_trainers")
SAME_TOKENS = [name for name, kind in LOSSES.items() if not getattr(kind, "across_tokenizers", False)]
FEATURES = [name for name, kind in LOSSES.items() if issubclass(kind, FeatureLoss)]
NARROW = {"hidden_size": 16, "intermediate_size": 32}


def state_of(trainer: Any) -> dict[str, Tensor]:
    return {**weights_of(trainer.model), **{f"projection {k}": v for k, v in weights_of(trainer.projections).items()}}


@pytest.mark.parametrize("name", SAME_TOKENS)
@pytest.mark.parametrize("make", [llama, bert])
def test_every_loss_learns_the_same_from_every_split(
    make: Callable[..., PreTrainedModel], name: str, tmp_path: Path
) -> None:
    rows = rows_for(make())[:8]
    results, logs = [], []
    one = {name: {"k": 2} if name == "top_k_kl" else {}}
    for size, steps in ((8, 1), (2, 4)):
        trainer = distiller(
            make(layers=1, **NARROW), make(seed=1), tmp_path, rows, temperature=None, losses=[one, "forward_kl"],
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2, learning_rate=0.05,
        )  # fmt: skip
        trainer.train()
        results.append(state_of(trainer))
        logs.append(trainer.state.log_history[1])
    widths_differ = name in FEATURES and name != "relations"
    assert any("projection" in one for one in results[0]) == widths_differ
    for one, tensor in results[0].items():
        torch.testing.assert_close(
            results[1][one], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=one: f"{n}: {text}"
        )
    second = "forward_kl-2" if name == "forward_kl" else "forward_kl"
    assert logs[0][name] > 0
    assert logs[0]["kd_loss"] == pytest.approx(logs[0][name] + logs[0][second], rel=1e-4)
    for term in (name, "kd_loss", "loss"):
        assert logs[1][term] == pytest.approx(logs[0][term], rel=1e-4)


def relation(vectors: Tensor, heads: int) -> Tensor:
    pieces = vectors.reshape(len(vectors), heads, -1).transpose(0, 1)
    return torch.softmax(pieces @ pieces.transpose(1, 2) / pieces.shape[-1] ** 0.5, -1)


def by_hand(name: str, model: PreTrainedModel, row: dict[str, Tensor]) -> list[Tensor]:
    """Return, layer by layer, what a loss compares in a BERT, in float64 and without padding."""
    length = int(row["attention_mask"].sum())
    inputs = {"input_ids": row["input_ids"][None, :length]}
    states = [one[0] for one in model(**inputs, output_hidden_states=True).hidden_states]
    layers = model.bert.encoder.layer
    if name == "embeddings":
        return [model.bert.embeddings.word_embeddings(inputs["input_ids"])[0]]
    if name == "sentence_embedding":
        return [states[-1].mean(0)]
    if name == "hidden_states":
        return states[1:]
    if name == "feed_forward":
        caught: list[Tensor] = []
        handles = [one.output.dense.register_forward_hook(lambda m, a, o: caught.append(o[0])) for one in layers]
        model(**inputs)
        for handle in handles:
            handle.remove()
        return caught
    own = layers[-1].attention.self
    return [relation(part(states[-2]), 4) for part in (own.query, own.key, own.value)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, {"distance": distance})
            for name in FEATURES
            if name != "relations"
            for distance in ("mse", "cosine")
        ),
        ("relations", {"heads": 4}),
    ],
)
def test_losses_of_features_are_a_plain_loop_in_float64(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    rows = class_rows()[:8]
    student, teacher = bert(), bert(seed=1, layers=4)
    pairs = [(0, 1), (1, 3)] if name in ("hidden_states", "feed_forward") else [(0, 0)]
    if name == "relations":
        pairs = [(0, 0), (1, 1), (2, 2)]
    exact = [copy.deepcopy(one).double().eval() for one in (student, teacher)]
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        own, other = (by_hand(name, model, row) for model in exact)
        for first, second in pairs:
            mine, theirs = own[first], other[second].detach()
            if name == "relations":
                distance = (theirs * (theirs / mine).log()).sum(-1).mean()
            elif options["distance"] == "cosine":
                distance = (1 - F.cosine_similarity(mine, theirs, dim=-1)).mean()
            else:
                distance = (mine - theirs).square().mean()
            total = total + distance / (len(pairs) * len(rows))
    total.backward()
    before = weights_of(student)
    trainer = distiller(
        student, teacher, tmp_path, rows, temperature=None, alpha=1.0, losses=[{name: options}],
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), rel=1e-5)
    for one, weight in exact[0].named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        moved = (before[one] - student.get_parameter(one).detach()) / 0.1
        torch.testing.assert_close(
            moved.double(), gradient, rtol=1e-3, atol=2e-5, msg=lambda text, n=one: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("make", [llama, bert])
def test_padding_is_never_compared(make: Callable[..., PreTrainedModel], name: str, tmp_path: Path) -> None:
    results = []
    for filler in (0, 33):
        rows = rows_for(make())[:8]
        for row in rows:
            row["input_ids"][row["attention_mask"] == 0] = filler
        changes = {"pad_token_id": None} if make is llama else {}
        models = make(**changes), make(seed=1, **changes)
        trainer = distiller(*models, tmp_path, rows, temperature=None, losses=[name])
        trainer.train()
        results.append(trainer.state.log_history[0]["kd_loss"])
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[0] > 0


FED = ["t5", "bart", "whisper"]


@pytest.mark.parametrize("name", ["embeddings", "sentence_embedding"])
@pytest.mark.parametrize("kind", FED)
def test_padding_of_encoder_decoders_is_never_compared(kind: str, name: str, tmp_path: Path) -> None:
    """Longer rows in the batch, and so more padding of sources and targets, change no row's loss."""
    student, teacher = (spread(family(kind)(), seed) for seed in (0, 1))
    rows = [{**KINDS["token of a text"].row(index)} for index in (0, 3)]
    if kind == "whisper":
        rows = [{"input_features": torch.randn(8, 32), "labels": row["labels"]} for row in rows]
    found = []
    for part in ([rows[0]], [rows[1]], rows):
        trainer = distiller(
            copy.deepcopy(student), teacher, tmp_path, part, temperature=None, losses=[name],
            per_device_train_batch_size=len(part), gradient_accumulation_steps=1, data_collator=pad,
        )  # fmt: skip
        trainer.train()
        found.append(trainer.state.log_history[0]["kd_loss"])
    assert 0 < found[2] == pytest.approx((found[0] + found[1]) / 2, rel=1e-5)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_layers_that_shrinking_left_no_heads_have_no_relations(who: str, tmp_path: Path) -> None:
    uneven, whole = bert(layers=3), bert(seed=1, layers=3)
    site = find_attention(uneven)[1]
    zero_heads_(uneven, site, range(site.heads))
    shrink(uneven)
    models = (uneven, whole) if who == "student" else (whole, uneven)

    def run_with(layers: Any) -> Any:
        losses = [{"relations": {"layers": layers}}]
        trainer = distiller(*map(copy.deepcopy, models), tmp_path, temperature=None, losses=losses)  # type: ignore[arg-type]
        trainer.train()
        assert 0 < trainer.state.log_history[0]["kd_loss"] < 10
        pairs = trainer.matcher.matches  # type: ignore[union-attr]
        return [[int(taps[0].module.split(".")[3]) for taps in (one.student, one.teacher)] for one in pairs]

    assert run_with("last") == [[2, 2]]
    assert run_with([[0, 0], [2, 2]]) == [[0, 0], [2, 2]]
    with pytest.raises(ModelError, match=f"relations: layer 1 of the {who} has nothing to compare"):
        run_with([[1, 1]])
    if who == "student":
        assert run_with("auto") == [[0, 1], [2, 2]]


def test_choices_share_the_weight_of_their_row(tmp_path: Path) -> None:
    made = KINDS["choice"]
    student, teacher = made.make(), made.make(seed=1)
    rows = [{name: one[..., :4] if one.dim() else one for name, one in row.items()} for row in made.rows()]
    batch = pad(rows)
    texts = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own, other = (model.bert(**texts, output_hidden_states=True).hidden_states[1:] for model in (student, teacher))
    expected = sum((mine - theirs).square().mean() for mine, theirs in zip(own, other)) / len(own)
    trainer = distiller(
        student, teacher, tmp_path, rows, temperature=None, losses=["hidden_states"], data_collator=pad
    )
    trainer.train()
    assert trainer.state.log_history[0]["kd_loss"] == pytest.approx(expected.item(), rel=1e-5)


OF_BART = {
    hf.BartForSequenceClassification: {"labels": torch.tensor(1)},
    hf.BartForQuestionAnswering: {"start_positions": torch.tensor(1), "end_positions": torch.tensor(2)},
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("head", OF_BART)
def test_padding_of_decoders_that_read_the_source_is_never_compared(head: Any, name: str, tmp_path: Path) -> None:
    config = family("bart")().config
    end = torch.tensor([config.eos_token_id])
    rows = []
    for index in (0, 3):
        ids = torch.cat([KINDS["class"].row(index)["input_ids"], end])
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **OF_BART[head]})
    student, teacher = (spread(head(copy.deepcopy(config)), seed) for seed in (0, 1))
    found = []
    for part in ([rows[0]], [rows[1]], rows):
        trainer = distiller(
            copy.deepcopy(student), teacher, tmp_path, part, temperature=None, losses=[name],
            per_device_train_batch_size=len(part), data_collator=pad,
        )  # fmt: skip
        trainer.train()
        found.append(trainer.state.log_history[0]["kd_loss"])
    assert 0 < found[2] == pytest.approx((found[0] + found[1]) / 2, rel=1e-5)


def test_embeddings_of_an_encoder_decoder_are_those_that_its_encoder_reads() -> None:
    names = {kind: LOSSES["embeddings"]().find(family(kind)())[0][0][0] for kind in FED}
    assert [(kind, tap.module, tap.decoder) for kind, tap in names.items()] == [
        ("t5", "encoder.embed_tokens", False),
        ("bart", "model.encoder.embed_tokens", False),
        ("whisper", "model.decoder.embed_tokens", True),
    ]
    with pytest.raises(ModelError, match="Wav2Vec2ForCTC has no input embeddings to compare"):
        LOSSES["embeddings"]().find(wav2vec2())


def test_ignored_tokens_of_a_language_model_are_never_compared(tmp_path: Path) -> None:
    results = []
    for ignored in (False, True):
        rows = text_rows()[:8]
        for row in rows:
            row["labels"] = row["input_ids"].clone()
            if ignored:
                row["labels"][:] = -100
        trainer = distiller(llama(), llama(seed=1), tmp_path, rows, temperature=None, losses=["hidden_states"])
        trainer.train()
        results.append(trainer.state.log_history[0]["kd_loss"])
    assert results[0] > 0.01
    assert results[1] == 0


def test_attention_stays_what_it_was_and_hooks_go(tmp_path: Path) -> None:
    student, teacher = llama(), llama(seed=1)
    assert student.config._attn_implementation == "sdpa"
    distiller(student, teacher, tmp_path, temperature=None, losses=["relations", "hidden_states"]).train()
    assert {one.config._attn_implementation for one in (student, teacher)} == {"sdpa"}
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def projections(model: PreTrainedModel, row: dict[str, Tensor]) -> list[Tensor]:
    """Return queries, keys and values of the last layer, (tokens, width), of a GPT-2 or a Llama."""
    fused = isinstance(model, hf.GPT2LMHeadModel)
    own = model.transformer.h[-1].attn if fused else model.model.layers[-1].self_attn
    caught: dict[str, Tensor] = {}
    names = ("c_attn",) if fused else ("q_proj", "k_proj", "v_proj")
    handles = [getattr(own, n).register_forward_hook(lambda m, a, o, n=n: caught.update({n: o[0]})) for n in names]
    model(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None])
    for handle in handles:
        handle.remove()
    return list(caught["c_attn"].chunk(3, dim=-1)) if fused else [caught[name] for name in names]


def test_relations_of_fused_and_grouped_projections_are_a_plain_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    fused, grouped, rows = spread(hf.GPT2LMHeadModel(config), 0), llama(seed=1), text_rows()[:8]
    exact = [copy.deepcopy(one).double().eval() for one in (fused, grouped)]
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        counted = F.pad(row["labels"][1:] != -100, (0, 1))  # those that are to say what comes next
        if counted.any():
            for own, other in zip(*(projections(model, row) for model in exact)):
                p, q = (relation(one[counted], 4) for one in (other.detach(), own))
                total = total + (p * (p / q).log()).sum(-1).mean() / (3 * len(rows))
    total.backward()
    before = weights_of(fused)
    trainer = distiller(
        fused, grouped, tmp_path, rows, temperature=None, alpha=1.0, losses=[{"relations": {"heads": 4}}],
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert total.item() > 0.01
    assert trainer.state.log_history[0]["kd_loss"] == pytest.approx(total.item(), rel=1e-5)
    for name, weight in exact[0].named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        moved = (before[name] - fused.get_parameter(name).detach()) / 0.1
        torch.testing.assert_close(moved.double(), gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_encoder_decoders_compare_both_stacks(tmp_path: Path) -> None:
    config = hf.T5Config(
        vocab_size=VOCABULARY_SIZE, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=5, decoder_start_token_id=0,
    )  # fmt: skip
    models = [spread(hf.T5ForConditionalGeneration(config), seed) for seed in (0, 1)]
    rows = [row for row in text_rows(16) if (row["labels"] != -100).any()][:8]
    blocks = ("encoder.block.0", "decoder.block.0")
    seen: dict[str, list[Tensor]] = {name: [] for name in blocks}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen[name].append(output[0])
        )
        for model in models
        for name in blocks
    ]
    with torch.no_grad():
        for model in models:
            model.eval()(**stack(rows))
    for handle in handles:
        handle.remove()
    real = {"encoder.block.0": stack(rows)["attention_mask"] != 0, "decoder.block.0": stack(rows)["labels"] != -100}
    distances = {name: (own - other).square().mean(-1) for name, (own, other) in seen.items()}
    means = [((distances[name] * real[name]).sum(1) / real[name].sum(1)).mean() for name in blocks]
    trainer = distiller(*models, tmp_path, rows, temperature=None, losses=["feed_forward", "hidden_states"])
    stacks = {match.student[0].module.split(".")[0] for match in trainer.matcher.matches}
    assert stacks == {"encoder", "decoder"}
    trainer.train()
    assert trainer.state.log_history[0]["hidden_states"] == pytest.approx(float(sum(means)) / 2, rel=1e-5)


# Projections


def run(folder: Path, **options: Any) -> Any:
    defaults = {
        "max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "optim": "adamw_torch", "learning_rate": 1e-2, "temperature": None,
        "losses": ["forward_kl", {"hidden_states": {"weight": 1, "final_weight": 0}}, "feed_forward"],
    }  # fmt: skip
    seed = options.pop("seed_of_student", 0)
    return distiller(bert(seed, layers=1, **NARROW), bert(seed=1), folder, class_rows(), **{**defaults, **options})


def test_projections_are_trained_and_stay_out_of_the_student(tmp_path: Path) -> None:
    trainer = run(tmp_path, save_strategy="steps")
    before = weights_of(trainer.projections)
    assert len(before) == 2
    trainer.train()
    after = weights_of(trainer.projections)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert saved.keys() == trainer.model.state_dict().keys()
    assert equal(load_file(tmp_path / "checkpoint-8" / FILE), after)


def test_run_with_projections_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    whole.train()
    run(tmp_path, callbacks=[StopAt(4)], save_strategy="steps").train()
    resumed = run(tmp_path, seed_of_student=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert equal(state_of(whole), state_of(resumed))
    (tmp_path / "checkpoint-4" / FILE).unlink()
    with pytest.raises(CheckpointError, match="written without these losses"):
        run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_weights_follow_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path, losses=[{"logit_mse": {"weight": 0, "final_weight": 8}}], alpha=1.0)
    losses: list[tuple[float, float]] = []
    add = LoggedTerms.add
    monkeypatch.setattr(
        LoggedTerms, "add", lambda self, **terms: (losses.append(terms.get("kd_loss")), add(self, **terms))
    )
    trainer.train()
    assert losses[0] == losses[1] == 0  # the two micro-batches of the first step
    assert all(loss > 0 for loss in losses[2:])


def test_kd_is_the_sum_of_all_losses_each_times_its_weight_then(tmp_path: Path) -> None:
    lines = {"forward_kl": (2.0, 2.0), "logit_mse": (0.5, 0.0), "hidden_states": (0.0, 4.0), "relations": (3.0, 3.0)}
    losses = [{name: {"weight": first, "final_weight": last}} for name, (first, last) in lines.items()]
    trainer = run(tmp_path, losses=losses)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, 9))
    for entry in logged:
        done = (entry["step"] - 1) / 8
        kd = sum((first + (last - first) * done) * entry[name] for name, (first, last) in lines.items())
        assert entry["kd_loss"] == pytest.approx(kd, rel=1e-5)
        assert entry["loss"] == pytest.approx(ALPHA * kd + (1 - ALPHA) * entry["task_loss"], rel=1e-4)
        assert min(entry[name] for name in lines) > 0


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile": True}, "torch_compile does not run the hooks"),
        (checkpointing(True, use_reentrant=True), "Reentrant checkpointing"),
        (checkpointing(True, preserve_rng_state=True), "Reentrant checkpointing"),
        ({"losses": [{"hidden_states": {"layers": [[0, 2]]}}]}, r"\[0, 2\] names a layer that is not there"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        distiller(bert(), bert(seed=1), tmp_path, **{"temperature": None, "losses": ["hidden_states"], **options})


def test_checkpointed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    results = []
    for wanted in (False, True):
        trainer = distiller(
            llama(), llama(seed=1), tmp_path, temperature=None, losses=["hidden_states", "relations"],
            **checkpointing(wanted, use_reentrant=False),
        )  # fmt: skip
        trainer.train()
        results.append(weights_of(trainer.model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-6)


def test_two_teachers_cannot_show_their_features(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs one teacher, which is a model"):
        distiller(bert(), [bert(seed=1), bert(seed=2)], tmp_path, temperature=None, losses=["hidden_states"])
