"""Training and distilling count every labelled item once, in every kind of outputs; padding never counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel, TrainerCallback, TrainingArguments

from hfcompress.distillation import DistillationConfig, DistillationTrainer, cache_teacher
from hfcompress.distillation.losses import LOSSES, LogitLoss
from hfcompress.errors import ModelError
from hfcompress.outputs import IGNORED, Binary, Classes, Frames, NextTokens, Numbers, Spans, Vectors, outputs_of
from hfcompress.outputs.trainer import PerItemTrainer
from tests.conftest import tiny_bert
from tests.kinds import KINDS, ROWS, encoder, pad, wav2vec2

pytestmark = pytest.mark.usefixtures("quick_trainers")
Gradients = dict[str, Tensor]
each_kind = pytest.mark.parametrize("kind", KINDS)
with_labels = pytest.mark.parametrize("kind", [name for name in KINDS if name != "vector"])


class Noted(TrainerCallback):
    """Keeps the gradients of the one step, before it is taken."""

    def __init__(self) -> None:
        self.found: Gradients = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.found = {name: value.grad.clone() for name, value in parameters if value.grad is not None}


def one_step(
    kind: str, folder: Path, batch_size: int, teacher: Any = None, exact: bool = False, **options: Any
) -> tuple[Gradients, float]:
    """Return the gradients and the logged loss of one step over all eight rows.  exact: in float64."""
    steps = ROWS // batch_size
    plain = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": batch_size, "optim": "sgd",
        "gradient_accumulation_steps": steps, "max_grad_norm": 0, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    noted, tiny = Noted(), KINDS[kind]
    given: dict[str, Any] = {
        "model": tiny.make().double() if exact else tiny.make(),
        "train_dataset": exact_rows(kind) if exact else tiny.rows(),
        "data_collator": pad,
        "callbacks": [noted],
    }
    trainer: PerItemTrainer
    if teacher is None:
        trainer = PerItemTrainer(args=TrainingArguments(**plain, **options), **given)
    else:
        arguments = DistillationConfig(**plain, **options)
        trainer = DistillationTrainer(teacher_model=teacher, args=arguments, **given)
    trainer.train()
    return noted.found, trainer.state.log_history[0]["loss"]


def assert_same(found: tuple[Gradients, float], expected: tuple[Gradients, float]) -> None:
    largest = max(float(value.abs().max()) for value in expected[0].values())
    assert largest > 0
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, atol=2e-5 * largest, rtol=1e-3, msg=name)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)


def losses_for(kind: str) -> list[str | dict[str, Any]]:
    """Return all losses of logits that mean something, each with a weight of its own."""
    outputs = outputs_of(KINDS[kind].make())
    in_place = {n: one for n, one in LOSSES.items() if issubclass(one, LogitLoss) and not one.across_tokenizers}
    logits = {name: one.of_distributions for name, one in in_place.items()}
    fitting = [n for n, odds in logits.items() if (outputs.values == "odds" if odds else not outputs.ragged)]
    if kind == "yes or no":
        fitting.remove("logit_cosine")  # the direction of one number has no gradient
    more = {"top_k_kl": {"k": 2}}
    return [{name: {"weight": 1 + place / 4, **more.get(name, {})}} for place, name in enumerate(fitting)]


@with_labels
def test_training_is_the_same_however_a_batch_is_split(kind: str, tmp_path: Path) -> None:
    assert_same(one_step(kind, tmp_path, 2), one_step(kind, tmp_path, ROWS))


@each_kind
def test_distilling_is_the_same_however_a_batch_is_split(kind: str, tmp_path: Path) -> None:
    options = {"alpha": 0.7, "losses": losses_for(kind)}
    runs = [one_step(kind, tmp_path, size, KINDS[kind].make(seed=1), **options) for size in (2, ROWS)]
    assert_same(*runs)


@each_kind
def test_features_are_the_same_however_a_batch_is_split(kind: str, tmp_path: Path) -> None:
    losses = [{name: {"weight": 1 + place / 4}} for place, name in enumerate(KINDS[kind].features)]
    options = {"alpha": 0.7, "losses": losses}
    runs = [one_step(kind, tmp_path, size, KINDS[kind].make(seed=1), **options) for size in (2, ROWS)]
    assert_same(*runs)


def exact_rows(kind: str) -> list[dict[str, Tensor]]:
    rows = KINDS[kind].rows()
    return [{n: one.double() if one.is_floating_point() else one for n, one in row.items()} for row in rows]


def places_by_hand(kind: str, output: Any, row: dict[str, Tensor]) -> list[tuple[Tensor, Any]]:
    """Return the logits at each place of a row without padding, and its class where it has one."""
    if kind == "span":
        both = [(output.start_logits[0], row["start_positions"]), (output.end_logits[0], row["end_positions"])]
        return [(logits, place) for logits, place in both if place < len(logits)]
    if kind == "vector":
        return [(output.last_hidden_state[0].mean(0), None)]
    logits, labels = output.logits[0], row["labels"]
    if kind == "letter of a sound":
        return [(one, None) for one in logits]
    if kind == "yes or no":
        pairs = (torch.stack([torch.zeros_like(one), one]) for one in logits)
        return list(zip(pairs, labels.long()))
    if kind == "numbers" or labels.dim() == 0:
        return [(logits, labels)]
    moved = zip(logits, labels[1:]) if kind == "next tokens" else zip(logits, labels)
    return [(one, label) for one, label in moved if label != IGNORED]


def distance_by_hand(kind: str, own: Tensor, other: Tensor) -> Tensor:
    """Return the default loss of a kind; the temperature is 2."""
    if kind in ("numbers", "vector"):
        cosine = functional.cosine_similarity(own, other, dim=0) if kind == "vector" else 1
        return (own - other).square().mean() + 1 - cosine
    p, q = ((one / 2).softmax(-1) for one in (other, own))
    return 4 * (p * (p / q).log()).sum()


def task_by_hand(kind: str, output: Any, places: list[tuple[Tensor, Any]]) -> list[Tensor]:
    """Return the task loss of each of a row's items."""
    if kind in ("vector", "letter of a sound"):
        return [output.loss] if kind == "letter of a sound" else []
    if kind == "numbers":
        return [functional.mse_loss(*places[0])]
    return [functional.cross_entropy(logits, label) for logits, label in places]


@each_kind
def test_distilling_is_a_plain_loop_over_rows_without_padding(kind: str, tmp_path: Path) -> None:
    student, teacher = (KINDS[kind].make(seed).double().eval() for seed in (0, 1))
    kd: list[Tensor] = []
    task: list[Tensor] = []
    for row in exact_rows(kind):
        output = student(**pad([row]))
        with torch.no_grad():
            other = places_by_hand(kind, teacher(**pad([row])), row)
        own = places_by_hand(kind, output, row)
        kd += [distance_by_hand(kind, mine, theirs) for (mine, _), (theirs, _) in zip(own, other)]
        task += task_by_hand(kind, output, own)
    alpha = 0.7 if task else 1.0
    loss = alpha * torch.stack(kd).mean() + (1 - alpha) * (torch.stack(task).mean() if task else 0)
    loss.backward()
    expected = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
    found, logged = one_step(kind, tmp_path, 2, teacher, exact=True, alpha=0.7)
    assert_same(({name: found[name] for name in expected}, logged), (expected, loss.item()))
    assert not any(value.any() for name, value in found.items() if name not in expected)


@each_kind
def test_every_kind_has_a_loss_of_its_own_and_a_cache(kind: str, tmp_path: Path) -> None:
    teacher = KINDS[kind].make(seed=1)
    cache_teacher(teacher, KINDS[kind].rows(), tmp_path / "cache", collator=pad, batch_size=3)
    from_cache = one_step(kind, tmp_path, 2, tmp_path / "cache")
    assert_same(from_cache, one_step(kind, tmp_path, ROWS, teacher))


@with_labels
def test_padding_changes_no_task_loss(kind: str) -> None:
    """The mean over all rows is that of the rows alone, each weighed by its items."""
    model = KINDS[kind].make().eval()
    outputs, rows = outputs_of(model), KINDS[kind].rows()

    def loss(some: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        batch = pad(some)
        mean = outputs.task_loss(model(**batch), batch)
        items = outputs.labelled(batch).sum()
        return (mean * items if items else mean.new_zeros(())), items

    with torch.no_grad():
        together, items = loss(rows)
        apart = [loss([row]) for row in rows]
    assert items == sum(one for _, one in apart)
    torch.testing.assert_close(torch.stack([one for one, _ in apart]).sum(), together, rtol=1e-4, atol=1e-5)


def test_spans_ignore_padding_and_positions_outside() -> None:
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "start_positions": torch.tensor([1, 4]),
        "end_positions": torch.tensor([2, 3]),
    }
    start, end = torch.randn(2, 4), torch.randn(2, 4)
    start[0, 3] = end[0, 3] = 50.0  # padding that looks like the best answer
    output = {"start_logits": start, "end_logits": end}
    kind = Spans()
    assert kind.labelled(batch).tolist() == [[True, True], [False, True]]
    expected = (
        functional.cross_entropy(start[:1, :3], torch.tensor([1]))
        + functional.cross_entropy(end[:1, :3], torch.tensor([2]))
        + functional.cross_entropy(end[1:], torch.tensor([3]))
    ) / 3
    torch.testing.assert_close(kind.task_loss(output, batch), expected)


def test_binary_outcomes_are_a_softmax_of_two() -> None:
    kind, raw = Binary(), torch.randn(4, 3)
    both = kind.logits({"logits": raw}, {}).softmax(-1)
    torch.testing.assert_close(both[..., 1], raw.sigmoid())
    labels = torch.tensor([[1.0, 0.0, 1.0]] * 4)
    likelihood = functional.cross_entropy(kind.logits({"logits": raw}, {}).flatten(0, 1), labels.long().flatten())
    torch.testing.assert_close(likelihood, functional.binary_cross_entropy_with_logits(raw, labels))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]),
        ("cls", [[1.0, 2.0], [1.0, 2.0], [5.0, 6.0]]),
        ("last", [[3.0, 4.0], [7.0, 8.0], [7.0, 8.0]]),
    ],
)
def test_vectors_are_pooled_without_padding(pooling: Any, expected: list[list[float]]) -> None:
    """Padding may stand on the right or, as decoders have it, on the left."""
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]).repeat(3, 1, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    found = Vectors(pooling).logits({"last_hidden_state": hidden}, {"attention_mask": mask})
    assert found.tolist() == expected


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_frames_of_padding_are_not_compared(reduction: str) -> None:
    model = wav2vec2(ctc_loss_reduction=reduction)
    kind = outputs_of(model)
    assert isinstance(kind, Frames)
    sound = torch.randn(2, 2000)
    mask = torch.ones_like(sound, dtype=torch.long)
    mask[1, 1200:] = 0
    batch = {"input_values": sound, "attention_mask": mask, "labels": torch.tensor([[3, 4], [5, -100]])}
    compared = kind.compared(batch)
    output = model(**batch)
    assert compared.shape == output.logits.shape[:2]
    alone = model(sound[1:, :1200]).logits.shape[1]
    assert compared.sum(dim=1).tolist() == [compared.shape[1], alone]
    if reduction == "sum":
        torch.testing.assert_close(kind.task_loss(output, batch), output.loss / 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Classes), ({"num_labels": 1}, Numbers), ({"problem_type": "regression"}, Numbers),
        ({"problem_type": "multi_label_classification"}, Binary),
    ],
)  # fmt: skip
def test_the_kind_follows_the_config_of_classifiers(options: dict[str, Any], expected: type) -> None:
    model = tiny_bert(**{"num_labels": 2, **options})
    assert type(outputs_of(model)) is expected
    derived = type("Mine", (type(model),), {})
    assert type(outputs_of(derived(model.config))) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("TheirForQuestionAnswering", Spans), ("TheirForCausalLM", NextTokens), ("TheirForTokenClassification", Classes)],
)
def test_classes_from_elsewhere_are_known_by_their_ending(name: str, expected: type) -> None:
    theirs = type(name, (nn.Module,), {"config": tiny_bert().config})
    assert type(outputs_of(theirs())) is expected


@pytest.mark.parametrize(
    ("kind", "loss", "message"),
    [
        ("span", "logit_mse", "logit_mse would depend on the padding"),
        ("numbers", "forward_kl", r"gives numbers \(regression\); forward_kl compares distributions"),
        ("vector", "top_k_kl", "gives a vector; top_k_kl compares distributions"),
        ("yes or no", "logit_cosine", "which has no gradient, so logit_cosine would teach nothing"),
    ],
)
def test_losses_that_mean_nothing_are_refused(kind: str, loss: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        one_step(kind, tmp_path, ROWS, KINDS[kind].make(seed=1), losses=[loss])


SMOOTHED = [
    "next tokens", "class", "class of a token", "hidden token", "choice", "token of a text", "class of an image",
    "token of a speech",
]  # fmt: skip


def smoothed(kind: str, factor: float) -> float:
    """The mean over all labelled items of the cross-entropy with smoothed labels, one row at a time."""
    model, losses = KINDS[kind].make().eval(), []
    outputs = outputs_of(model)
    for row in KINDS[kind].rows():
        batch = pad([row])
        labels = outputs.labels(batch).reshape(-1)
        with torch.no_grad():
            logits = model(**batch).logits
        losses += [
            functional.cross_entropy(place, label, label_smoothing=factor)
            for place, label in zip(logits.reshape(len(labels), -1), labels)
            if label != IGNORED
        ]
    return float(torch.stack(losses).mean())


@pytest.mark.filterwarnings("ignore:Label smoothing is not compatible:UserWarning")  # we refuse it just after
@pytest.mark.parametrize("distils", [False, True])
@with_labels
def test_smoothed_labels_give_the_loss_of_a_hand_written_loop(kind: str, distils: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"label_smoothing_factor": 0.2}
    if distils:
        options |= {"teacher": KINDS[kind].make(seed=1), "alpha": 0.0}
    if kind in SMOOTHED:
        assert one_step(kind, tmp_path, 2, **options)[1] == pytest.approx(smoothed(kind, 0.2), rel=1e-4)
    else:
        with pytest.raises(ModelError, match=r"label_smoothing_factor=0\.2 needs a loss of classes"):
            one_step(kind, tmp_path, 2, **options)


@pytest.mark.parametrize("kind", ["span", "choice"])
def test_fewer_classes_than_k_are_all_compared(kind: str, tmp_path: Path) -> None:
    """How many there are depends on the rows, so the default k of 64 may be more."""
    teacher, plain = KINDS[kind].make(seed=1), [{"forward_kl": {"temperature": 1.0}}]
    found = one_step(kind, tmp_path, 2, teacher, losses=["top_k_kl"])
    assert_same(found, one_step(kind, tmp_path, ROWS, teacher, losses=plain))
    with pytest.raises(ModelError, match=r"k=2 classes cannot be kept: .* depends on the row\. Leave k out"):
        cache_teacher(teacher, KINDS[kind].rows(), tmp_path / "cache", collator=pad, k=2)


def test_vectors_of_other_widths_meet_by_a_projection_alone(tmp_path: Path) -> None:
    wide = encoder(BertModel, hidden_size=64)()
    with pytest.raises(ModelError, match="gives 32 numbers for a row and the teacher 64"):
        one_step("vector", tmp_path, ROWS, wide)
    assert one_step("vector", tmp_path, ROWS, wide, losses=["sentence_embedding"])[1] > 0


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    with pytest.raises(ModelError, match=r"label_smoothing_factor=0\.1 needs .*gives a start and an end"):
        PerItemTrainer(model=KINDS["span"].make(), args=arguments)
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True)
    trainer = PerItemTrainer(model=tiny_bert(), args=arguments, train_dataset=[{"input_ids": [6, 7, 8]}])
    with pytest.raises(ModelError, match="batches hold no 'labels'"):
        trainer.train()


@pytest.mark.parametrize("name", KINDS)
def test_a_teacher_is_another_model_than_its_student(name: str) -> None:
    student, teacher = (KINDS[name].make(seed) for seed in (0, 1))
    pairs = list(zip(student.parameters(), teacher.parameters()))
    assert not [one for one, other in pairs if torch.equal(one, other)], "else what they differ by tests nothing"
