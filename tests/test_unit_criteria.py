"""Criteria that watch the forward: entropy of attention, and mutual information with the label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, TrainerCallback

from hfcompress.errors import HFCompressError
from hfcompress.pruning import HeadPruneCallback, NeuronPruneCallback
from hfcompress.pruning.evidence import KEY
from hfcompress.pruning.units.attention_watch import AttentionWatch
from hfcompress.pruning.units.class_moments import class_moments
from hfcompress.pruning.units.criteria import UnitMutualInformation
from hfcompress.pruning.units.criteria.mutual_information import mixture_information, moments_within
from hfcompress.structure import closed_heads, find_attention, find_ffn
from hfcompress.structure.inputs import dummy_inputs
from tests.conftest import tiny_bert, tiny_llama
from tests.distributed import WORLD_SIZE, run_in_two_processes
from tests.families import FAMILIES
from tests.forks import Forks
from tests.pruning_runs import (
    Rows,
    class_rows,
    count_zeros,
    matrices,
    same_tensors,
    small_gpt2,
    small_llama,
    state_of,
    text_rows,
    trainer_for,
    zeros_of,
)

pytestmark = pytest.mark.usefixtures("quick_trainers")


def padded(rows: Rows) -> Rows:
    for index, row in enumerate(rows):
        row["attention_mask"] = torch.tensor([1] * (8 - index % 5) + [0] * (index % 5))
    return rows


def batch_of(rows: Rows) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# Entropy of attention


def distances_by_eager_attention(model: PreTrainedModel, batch: dict[str, Any], field: str) -> list[Tensor]:
    """Per layer, each head's mean of log(visible keys) - entropy, from the library's own attention weights."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model.eval()(**batch, output_attentions=True)[field]
    model.set_attn_implementation("sdpa")
    keep = batch.get("decoder_attention_mask" if field != "encoder_attentions" and "decoder_input_ids" in batch else
                     "attention_mask")  # fmt: skip
    found = []
    for weights in layers:
        shares = weights.double()
        # No real key gets exactly nothing from these models, and a hidden one gets exactly nothing.
        entropy = -(shares * shares.clamp_min(1e-300).log()).sum(-1)
        distance = (shares > 0).sum(-1).double().log() - entropy
        counts = torch.ones_like(distance) if keep is None else keep[:, None].expand_as(distance).double()
        found.append((distance * counts).sum((0, 2)) / counts.sum((0, 2)))
    return found


def watched(model: PreTrainedModel, batch: dict[str, Any], under: str = "") -> list[Tensor]:
    sites = {f"{one.output.name}.weight": one for one in find_attention(model) if under in one.name}
    watch = AttentionWatch(model, sites)
    watch.active = True
    model.train()(**batch)
    model.eval()(**batch)  # evaluation does not count
    watch.remove()
    model.train()(**batch)  # nor does what comes after it
    return [one[:-1].double() / one[-1] for one in watch.take().values()]


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, small_gpt2])
def test_entropy_is_that_of_eager_attention(make: Any) -> None:
    model, batch = make(), batch_of(padded(class_rows(6) if make is tiny_bert else text_rows(6)))
    expected = distances_by_eager_attention(model, batch, "attentions")
    assert len(expected) == 2
    for found, wanted in zip(watched(model, batch), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert float(expected[0].min()) > 0


@pytest.mark.parametrize(
    ("under", "field"),
    [("encoder.", "encoder_attentions"), ("SelfAttention", "decoder_attentions"), ("EncDec", "cross_attentions")],
)
def test_entropy_of_encoder_decoders_is_that_of_eager_attention(under: str, field: str) -> None:
    model = FAMILIES["t5"].model()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 60, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 4 + [0] * 3])
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5],
             "decoder_attention_mask": mask[:, :5]}  # fmt: skip
    found = watched(model, batch, under)
    expected = distances_by_eager_attention(model, batch, field)
    wanted = expected if under != "SelfAttention" else [
        *distances_by_eager_attention(model, batch, "encoder_attentions"), *expected,
    ]  # fmt: skip
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_every_family_is_watched_or_refused(family: str) -> None:
    model = FAMILIES[family].model()
    sites = {f"{one.output.name}.weight": one for one in find_attention(model)}
    if family == "deberta_v2":  # its scores hold products with positions, too
        with pytest.raises(HFCompressError, match=r"criterion='entropy' .* attends in another way. Use"):
            AttentionWatch(model, sites)
        return
    watch = AttentionWatch(model, sites)
    watch.active = True
    model.train()(**dummy_inputs(model))
    for name, sums in watch.take().items():
        assert len(sums) == sites[name].heads + 1
        assert int(sums[-1]) > 0
        assert bool((sums[:-1] > 0).all())


def test_training_keeps_its_own_attention_and_random_numbers(tmp_path: Path) -> None:
    """The run with the criterion and the run without are the same up to the first closed head."""

    class Implementations(TrainerCallback):
        seen: list[str] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            dense = kwargs["model"].bert.encoder.layer[0].attention.self.query
            dense.register_forward_hook(
                lambda *_: self.seen.append((torch.is_grad_enabled(), model.config._attn_implementation))
            )

    states = []
    for callbacks in (
        [],
        [HeadPruneCallback(0.5, criterion="entropy", schedule="oneshot", start=0.5), Implementations()],
    ):
        model = tiny_bert(hidden_dropout_prob=0.1)
        trainer = trainer_for(model, tmp_path, callbacks, max_steps=6, lr_scheduler_type="constant")
        grabbed: dict[int, dict[str, Tensor]] = {}

        class Grab(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                grabbed[state.global_step] = {n: w.detach().clone() for n, w in model.named_parameters()}  # noqa: B023

        trainer.add_callback(Grab())
        trainer.train()
        states.append(grabbed)
    assert all(same_tensors(states[0][step], states[1][step]) for step in range(4))
    assert not same_tensors(states[0][5], states[1][5])
    assert Implementations.seen == [(True, "sdpa")] * 3 + [(False, "hfcompress_weights")] + [(True, "sdpa")] * 3


# Mutual information


def information_by_integration(values: Tensor, labels: Tensor) -> Tensor:
    """The mutual information of each column's mixture of normal distributions and the class, over a dense grid."""
    found = []
    for column in values.double().t():
        classes = [column[labels == one] for one in labels.unique()]
        overall = column.var(correction=0)
        spreads = [(len(c) * c.var(correction=0) + overall) / (len(c) + 1) for c in classes]
        grid = torch.linspace(
            float(column.min() - 12 * overall.sqrt()), float(column.max() + 12 * overall.sqrt()), 40001
        )
        grid = grid.double()
        joint = torch.stack(
            [
                len(c) / len(column) * (-(grid - c.mean()).square() / (2 * v)).exp() / (2 * torch.pi * v).sqrt()
                for c, v in zip(classes, spreads)
            ]
        )
        shares = torch.tensor([len(c) / len(column) for c in classes]).double()[:, None]
        ratio = (joint / (joint.sum(0) * shares)).log().where(joint > 1e-290, 0)
        found.append(torch.trapezoid((joint * ratio).sum(0), grid))
    return torch.stack(found)


@pytest.mark.parametrize("classes", [2, 3])
def test_information_is_that_of_a_dense_integration(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (60,), generator=generator)
    values = torch.randn(60, 12, generator=generator) * (1 + torch.rand(12, generator=generator))
    values += labels[:, None] * torch.linspace(0, 8, 12)  # from nothing in common to all
    moments = class_moments(values[:, None], None, labels, classes + 2).double()  # two classes are never seen
    found = mixture_information(*moments_within(moments[:, 0], *moments[:, 1:].chunk(2, dim=1)))
    torch.testing.assert_close(found, information_by_integration(values, labels), rtol=2e-3, atol=1e-4)
    entropy = torch.special.entr(torch.bincount(labels) / 60).sum()
    assert float(found[0]) < 0.1
    assert 0.9 * entropy < float(found[-1]) <= entropy + 1e-6


def test_moments_count_examples_without_padding_and_labelled_tokens() -> None:
    inputs = torch.arange(24.0).view(2, 3, 4)
    mask, inputs[0, 2] = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.nan
    by_row = class_moments(inputs, mask, torch.tensor([1, 0]), 2)
    rows = torch.stack([inputs[0, :2].mean(0), inputs[1].mean(0)])
    assert torch.equal(by_row, torch.stack([torch.cat([torch.ones(1), row, row**2]) for row in rows.flip(0)]))
    assert torch.equal(class_moments(inputs.flatten(0, 1), mask, torch.tensor([1, 0]), 2), by_row)
    by_token = class_moments(inputs, mask, torch.tensor([[0, -100, 1], [0, 1, 1]]), 2)
    assert by_token[:, 0].tolist() == [2, 2]
    assert torch.equal(by_token[0, 1:5], inputs[0, 0] + inputs[1, 0])
    assert torch.equal(by_token[1, 5:], inputs[1, 1] ** 2 + inputs[1, 2] ** 2)


@pytest.mark.parametrize("kind", [HeadPruneCallback, NeuronPruneCallback])
def test_units_that_say_least_about_the_label_are_closed(kind: Any, tmp_path: Path) -> None:
    model, rows = tiny_bert(), padded(class_rows(16))
    batch, found = batch_of(rows), {}
    sites: list[Any] = find_attention(model) if kind is HeadPruneCallback else find_ffn(model)
    parts = [site.output if kind is HeadPruneCallback else site.down for site in sites]
    hooks = [
        model.get_submodule(part.name).register_forward_pre_hook(
            lambda module, args, part=part: found.__setitem__(part.name, args[0].detach())
        )
        for part in parts
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    scores = []
    for part in parts:
        keep = batch["attention_mask"][:, :, None]
        values = (found[part.name] * keep).sum(1) / keep.sum(1)
        scores.append(information_by_integration(values, batch["labels"])[part.features].amax(1))
    flat = torch.cat(scores)
    callback = kind(0.5, criterion="mutual_information", schedule="oneshot", start=0.0)
    trainer_for(model, tmp_path, [callback], rows=rows, max_steps=1, learning_rate=0.0,
                per_device_train_batch_size=16).train()  # fmt: skip
    closed = [(model.get_submodule(p.name).weight[:, p.features] == 0).all(2).all(0) for p in parts]
    assert torch.equal(torch.cat(closed), flat <= flat.sort().values[len(flat) // 2 - 1])


def test_heads_that_attend_most_evenly_are_closed(tmp_path: Path) -> None:
    model, rows = tiny_bert(), padded(class_rows(8))
    scores = torch.cat(distances_by_eager_attention(model, batch_of(rows), "attentions"))
    sites = find_attention(model)
    callback = HeadPruneCallback(0.5, criterion="entropy", schedule="oneshot", start=0.0)
    # Two micro-batches with unlike numbers of tokens are one step.
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer_for(model, tmp_path, [callback], rows=rows, max_steps=1, learning_rate=0.0, **options).train()
    assert torch.equal(torch.cat([closed_heads(model, site) for site in sites]), scores <= scores.sort().values[3])


# With the Trainer


@pytest.mark.parametrize("criterion", ["entropy", "mutual_information"])
def test_resumed_run_is_bit_for_bit_the_whole_one(criterion: str, tmp_path: Path) -> None:
    def trainer(folder: Path, **options: Any) -> Any:
        callback = HeadPruneCallback(0.5, criterion=criterion, frequency=2, end=1.0)
        return trainer_for(tiny_bert(hidden_dropout_prob=0.1), folder, [callback], max_steps=8, **options)

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_tensors(state_of(resumed), state_of(whole))
    assert KEY not in whole.optimizer.param_groups[0] or not whole.optimizer.param_groups[0][KEY]


@pytest.mark.parametrize("criterion", ["entropy", "mutual_information"])
@pytest.mark.parametrize("options", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_autocast_and_compiled_models_are_watched(criterion: str, options: dict[str, Any], tmp_path: Path) -> None:
    closed = []
    for more in ({}, options):
        torch.compiler.reset()
        model = tiny_bert()
        callback = HeadPruneCallback(0.5, criterion=criterion, start=0.3)
        trainer = trainer_for(
            model, tmp_path, [callback], max_steps=4, rows=class_rows(8), learning_rate=0.0, **more
        )  # fmt: skip
        trainer.train()
        closed.append(torch.cat([closed_heads(model, site) for site in find_attention(model)]).tolist())
    torch.compiler.reset()
    assert [sum(one) for one in closed] == [4, 4]
    assert [True] * 4 + [False] * 4 not in closed  # what goes when nothing was seen
    # bfloat16 decides otherwise between two heads that say nearly as much.
    assert sum(one and other for one, other in zip(*closed)) >= (3 if "bf16" in options else 4)


def _close_in_one_process(folder: str, batch_size: int = 4, **options: Any) -> None:
    """Close half of the heads by entropy and half of the neurons by information, in three steps that learn nothing."""
    model, shared = tiny_bert(), {"schedule": "linear", "end": 1.0}
    callbacks = [
        HeadPruneCallback(0.5, criterion="entropy", **shared),
        NeuronPruneCallback(0.5, criterion="mutual_information", **shared),
    ]
    options |= {"max_steps": 3, "learning_rate": 0.0, "per_device_train_batch_size": batch_size}
    trainer = trainer_for(model, Path(folder), callbacks, rows=padded(class_rows(24)), **options)
    trainer.train()
    torch.save((trainer.args.world_size, matrices(model)), Path(folder) / f"{trainer.args.process_index}.pt")


def _close_in_two(folder: str) -> None:
    _close_in_one_process(folder, ddp_backend="gloo")


@pytest.mark.distributed
def test_two_processes_watch_the_same(tmp_path: Path, forks: Forks) -> None:
    run_in_two_processes(forks, _close_in_two, str(tmp_path))
    (size, weights), (_, other) = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    assert size == WORLD_SIZE
    assert same_tensors(weights, other)
    _close_in_one_process(str(tmp_path), batch_size=8)
    assert same_tensors(zeros_of(weights), zeros_of(torch.load(tmp_path / "0.pt")[1]))
    assert count_zeros(zeros_of(weights)) > 0


# Refusals


def _unlabelled() -> Rows:
    return [{name: value for name, value in row.items() if name != "labels"} for row in class_rows(8)]


class _Streamed(IterableDataset[dict[str, Tensor]]):
    """Rows that can only be gone through, as those of a streamed data set."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


@pytest.mark.parametrize(
    ("make", "rows", "options", "match"),
    [
        (small_llama, text_rows, {}, "labels that are classes, and LlamaForCausalLM"),
        (lambda: tiny_bert(num_labels=1), class_rows, {}, r"BertForSequenceClassification \(1 labels\)"),
        (lambda: tiny_bert(problem_type="regression"), class_rows, {}, r"\(regression\)"),
        (lambda: tiny_bert(num_labels=65), class_rows, {}, "at most 64 classes, not 65"),
        (tiny_bert, _unlabelled, {}, "found: none.* Rows have: input_ids, attention_mask"),
        (tiny_bert, class_rows, {"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1 takes them"),
        (tiny_bert, class_rows, {"compute_loss_func": lambda *given, **more: None}, "compute_loss_func takes them"),
        (tiny_bert, lambda: _Streamed(_unlabelled()), {}, "in the model's forward, and found: none"),
    ],
)
def test_information_without_classes_is_refused_before_the_first_step(
    make: Any, rows: Any, options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    callback = NeuronPruneCallback(criterion="mutual_information")
    found = rows()
    trainer = trainer_for(make(), tmp_path, [callback], rows=class_rows(8), **options)
    trainer.train_dataset = found
    with pytest.raises(HFCompressError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


def test_batches_without_class_labels_are_refused_when_they_come() -> None:
    inputs = torch.ones(2, 3, 4)
    for labels in (None, torch.ones(2), torch.ones(2, 5, dtype=torch.long), torch.ones(4, dtype=torch.long)):
        with pytest.raises(HFCompressError, match="one for each row or token, in the model's forward"):
            class_moments(inputs, None, labels, 2)
    assert UnitMutualInformation(3).initial(torch.ones(2, 4, 5))["moments"].shape == (3, 17)


def test_neurons_have_no_attention_and_nothing_is_seen_before_the_first_step() -> None:
    with pytest.raises(HFCompressError, match="'taylor', 'magnitude', 'activation', 'mutual_information' or 'random'"):
        NeuronPruneCallback(criterion="entropy")
    for criterion in ("entropy", "mutual_information"):
        with pytest.raises(HFCompressError, match=f"criterion='{criterion}' has seen nothing"):
            HeadPruneCallback(criterion=criterion, schedule="constant")
