"""Distillation losses: each is the formula it cites, and its gradient is that formula's, chunked or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hfcompress.distillation.losses import LOSSES, LogitLoss, named, read_losses, to_plain
from hfcompress.distillation.losses.cross_entropy import cross_entropy
from hfcompress.distillation.losses.forward_kl import ForwardKL
from hfcompress.distillation.losses.jensen_shannon import JensenShannon
from hfcompress.distillation.losses.layer_map import Layers, layer_pairs
from hfcompress.distillation.losses.logit_cosine import LogitCosine
from hfcompress.distillation.losses.logit_mse import LogitMSE
from hfcompress.distillation.losses.relations import relation_kl
from hfcompress.distillation.losses.reverse_kl import ReverseKL
from hfcompress.distillation.losses.targets import TopK, top_k_of
from hfcompress.distillation.losses.top_k_kl import TopKKL
from hfcompress.errors import HFCompressError, ModelError
from hfcompress.logits import chunks
from hfcompress.logits.chunks import sum_over_rows

Reference = Callable[[Tensor, Tensor], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def soft(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits / temperature, dim=-1)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = soft(teacher, 3), soft(student, 3)
    mixture = 0.3 * p + 0.7 * q
    return 9 * (0.3 * kl(p, mixture) + 0.7 * kl(q, mixture))


def top_k_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = soft(teacher, 3), soft(student, 3)
    losses = []
    for one, other in zip(p, q):
        kept = one.argsort(descending=True)[:4].tolist()
        rest = [place for place in range(len(one)) if place not in kept]
        coarse = [torch.cat([each[kept], each[rest].sum()[None]]) for each in (one, other)]
        losses.append(9 * kl(*coarse))
    return torch.stack(losses)


PLAIN: dict[str, tuple[LogitLoss, Reference]] = {
    "forward_kl": (ForwardKL(temperature=3), lambda s, t: 9 * kl(soft(t, 3), soft(s, 3))),
    "reverse_kl": (ReverseKL(temperature=3), lambda s, t: 9 * kl(soft(s, 3), soft(t, 3))),
    "jensen_shannon": (JensenShannon(beta=0.3, temperature=3), jensen_shannon),
    "top_k_kl": (TopKKL(k=4, temperature=3), top_k_kl),
    "logit_mse": (LogitMSE(), lambda s, t: ((s - t) ** 2).mean(-1)),
    "logit_cosine": (LogitCosine(), lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1)),
}
each_loss = pytest.mark.parametrize(("loss", "reference"), PLAIN.values(), ids=PLAIN)


def logits(rows: int = 7, classes: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def summed(loss: LogitLoss, student: Tensor, teacher: Tensor, rows: Tensor | None = None) -> Tensor:
    rows = torch.arange(len(student)) if rows is None else rows
    return sum_over_rows(student, rows, [1.0], [lambda own, part: loss.rows(own, teacher[rows[part]].to(own.dtype))])[
        0
    ]


def test_every_loss_of_logits_has_a_reference() -> None:
    in_place = {name for name, kind in LOSSES.items() if issubclass(kind, LogitLoss) and not kind.across_tokenizers}
    assert PLAIN.keys() == in_place  # the others are in test_distillation_across


@each_loss
@pytest.mark.parametrize("elements", [1, 33, 10_000])
def test_value_and_gradient_are_the_formulas(
    loss: LogitLoss, reference: Reference, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunks.ELEMENTS_PER_CHUNK, "cpu", elements)
    student, teacher = logits()
    total, expected = summed(loss, student, teacher), reference(student, teacher).sum()
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=0)
    # times three: what comes from above must be passed on
    (gradient,) = torch.autograd.grad(3 * total, student)
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)
    assert torch.autograd.gradcheck(lambda own: summed(loss, own, teacher), (student,))


@each_loss
def test_only_counted_rows_count_and_inputs_stay(loss: LogitLoss, reference: Reference) -> None:
    student, teacher = logits()
    before = student.detach().clone(), teacher.clone()
    rows = torch.tensor([4, 0, 6])
    total = summed(loss, student, teacher, rows)
    torch.testing.assert_close(total, reference(student, teacher)[rows].sum(), rtol=1e-11, atol=0)
    (gradient,) = torch.autograd.grad(total, student)
    assert gradient[rows].any(-1).all()
    assert not gradient[[1, 2, 3, 5]].any()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    assert summed(loss, student, teacher, rows[:0]).item() == 0


@each_loss
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_logits_are_summed_in_float32(
    loss: LogitLoss, reference: Reference, dtype: torch.dtype, tolerance: float
) -> None:
    student, teacher = logits(rows=1000, dtype=dtype)
    # two classes that rounding made alike could take each other's place among the top k
    teacher = teacher.float() + 1e-3 * torch.arange(11)
    total = summed(loss, student, teacher)
    exact = student.detach().double().requires_grad_()
    expected = reference(exact, teacher.double()).sum()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(total, student)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


@each_loss
def test_identical_logits_cost_nothing_and_pull_nowhere(loss: LogitLoss, reference: Reference) -> None:
    student, _ = logits()
    total = summed(loss, student, student.detach())
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(total, student)[0].abs().max() < 1e-12


@each_loss
def test_distributions_do_not_change_when_logits_shift(loss: LogitLoss, reference: Reference) -> None:
    student, teacher = logits()
    shifted = torch.allclose(summed(loss, student + 5, teacher - 3), summed(loss, student, teacher))
    assert shifted == loss.of_distributions


def test_sums_of_several_terms_share_one_gradient() -> None:
    student, teacher = logits()
    labels = torch.arange(7)
    kinds = [one for one, _ in PLAIN.values()]
    weights = [0.5, 2.0, 0.25, 1.5, 3.0, 0.0]
    terms = [lambda own, part, one=one: one.rows(own, teacher[part]) for one in kinds]
    terms.append(lambda own, part: cross_entropy(own, labels[part]))
    total, sums = sum_over_rows(student, torch.arange(7), [*weights, 0.75], terms)
    references = [reference(student, teacher).sum() for _, reference in PLAIN.values()]
    references.append(F.cross_entropy(student, labels, reduction="sum"))
    torch.testing.assert_close(sums, torch.stack(references).detach())
    expected = sum(weight * one for weight, one in zip([*weights, 0.75], references))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("temperature", [2.0, 1.0])
def test_the_ends_of_jensen_shannon_are_the_two_kls(temperature: float) -> None:
    student, teacher = logits()
    for beta, kind in ((0.0, ForwardKL), (1.0, ReverseKL)):
        both = (JensenShannon(beta=beta, temperature=temperature), kind(temperature=temperature))
        ends = [one.rows(student.detach(), teacher) for one in both]
        assert all(torch.equal(one, other) for one, other in zip(*ends))


def test_all_classes_as_top_k_are_the_whole_distribution() -> None:
    student, teacher = logits()
    for one, other in zip(TopKKL(k=11, temperature=2).rows(student.detach(), teacher),
                          ForwardKL(temperature=2).rows(student.detach(), teacher)):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_probabilities_too_small_for_float32_cost_what_they_should() -> None:
    student, teacher = torch.tensor([[0.0, -300.0, 20.0]]), torch.tensor([[-250.0, 20.0, 0.0]])
    exact = student.double(), teacher.double()
    labels = torch.tensor([1])
    loss, slope = cross_entropy(student, labels)
    assert loss.item() == pytest.approx(320.0)
    torch.testing.assert_close(slope, torch.softmax(student, -1) - F.one_hot(labels, 3))
    for temperature in (1.0, 2.0):
        log_q, log_p = (torch.log_softmax(one / temperature, -1) for one in exact)
        kl_of_logs = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
        found, _ = ForwardKL(temperature=temperature).rows(student, teacher)
        assert found.item() == pytest.approx(kl_of_logs.item())


@each_loss
def test_probabilities_that_are_0_in_float32_leave_the_sums_finite(loss: LogitLoss, reference: Reference) -> None:
    student, teacher = (200 * one.detach() for one in logits())
    assert (torch.softmax(student.float() / 3, dim=-1) * torch.softmax(teacher.float() / 3, dim=-1) == 0).any()
    (found, slope), (exact, _) = loss.rows(student.float(), teacher.float()), loss.rows(student, teacher)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    assert slope.isfinite().all()


def test_a_student_without_any_tail_is_finite() -> None:
    # float32: all the student's mass on the teacher's classes, so its tail is 0
    student = torch.tensor([[200.0, 190.0, 0.0, 0.0]])
    teacher = top_k_of(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), 2, 1.0)
    loss, slope = TopKKL(k=2).rows(student, teacher)
    assert loss.isfinite().all()
    assert slope.isfinite().all()


def test_stored_distributions_lose_no_gradient_to_rounding() -> None:
    # probabilities whose sum is not exactly one still have the exact gradient of the loss as it is computed
    student, teacher = logits()
    exact = top_k_of(teacher, 3, 1.0)
    rounded = TopK(exact.classes, exact.log_probabilities.half().double(), exact.log_tail.half().double(), 1.0)
    assert torch.autograd.gradcheck(
        lambda own: sum_over_rows(own, torch.arange(7), [1.0], [lambda s, part: TopKKL().rows(s, rounded.part(part))])[
            0
        ],
        (student,),
    )


def test_gradient_keeps_its_size_over_temperatures() -> None:
    student, teacher = logits()
    for kind in (ForwardKL, ReverseKL, TopKKL, JensenShannon):
        options = {"k": 4} if kind is TopKKL else {}
        norms = [kind(temperature=t, **options).rows(student.detach(), teacher)[1].norm() for t in (100.0, 1000.0)]
        assert norms[1] == pytest.approx(norms[0].item(), rel=0.1)


# Weights, names and layers


def test_weights_stay_or_go_on_a_line() -> None:
    ramp = ForwardKL(weight=1, final_weight=0.25)
    assert [ramp.weight_at(done) for done in (0, 0.5, 1, 1.2)] == [1, 0.625, 0.25, 0.25]
    assert {ForwardKL(weight=3).weight_at(done) for done in (0, 0.4, 1)} == {3}
    assert ForwardKL(weight=0, final_weight=2).weight_at(0.5) == 1


def test_losses_are_read_as_recipes_write_them_and_back() -> None:
    given = ["reverse_kl", {"forward_kl": {"weight": 1, "temperature": 3}}, {"hidden_states": {"layers": [[0, 1]]}}]
    losses = read_losses(given)
    assert losses[1] == ForwardKL(weight=1, temperature=3)
    assert read_losses(to_plain(losses)) == losses
    assert list(named([*losses, losses[0]])) == ["reverse_kl", "forward_kl", "hidden_states", "reverse_kl-2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["forwrd_kl"], "Unknown loss 'forwrd_kl'. Did you mean 'forward_kl'"),
        ([{"forward_kl": {"temprature": 1}}], "Loss forward_kl has faults: temprature"),
        ([{"forward_kl": {"temperature": 0}}], "Loss forward_kl has faults: temperature"),
        ([{"forward_kl": {"weight": -1}}], "Loss forward_kl has faults: weight"),
        ([{"jensen_shannon": {"beta": 2}}], "Loss jensen_shannon has faults: beta"),
        ([{"top_k_kl": {"k": 0}}], "Loss top_k_kl has faults: k"),
        ([{"forward_kl": {}, "reverse_kl": {}}], "A loss is a name with its options"),
        ([], "must be a list of one or more losses"),
        ("forward_kl", "must be a list of one or more losses"),
    ],
)
def test_losses_that_are_wrong_say_so(given: object, message: str) -> None:
    with pytest.raises(HFCompressError, match=message):
        read_losses(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("auto", 3, 6, [(0, 1), (1, 3), (2, 5)]),
        ("auto", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("auto", 2, 2, [(0, 0), (1, 1)]),
        ("last", 2, 6, [(1, 5)]),
        (((0, 4), (1, 1)), 2, 6, [(0, 4), (1, 1)]),
    ],
)
def test_layers_meet_as_asked(layers: Layers, student: int, teacher: int, expected: list) -> None:
    assert layer_pairs(layers, student, teacher) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [("auto", "spreads the student's 3 layers"), (((0, 2),), r"\[0, 2\] names a layer"), ((), "no pair of layers")],
)
def test_layers_that_are_not_there_are_refused(layers: Layers, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        layer_pairs(layers, 3, 2)


# Relations


def test_relations_are_those_of_the_paper_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    counted = torch.tensor([[True] * 5, [True, True, True, False, False]])
    found = relation_kl(student, teacher, 4, counted)
    for row, length in ((0, 5), (1, 3)):
        total = torch.zeros((), dtype=torch.float64)
        for head in range(4):
            own, other = student[row, :length, 4 * head : 4 * head + 4], teacher[row, :length, 6 * head : 6 * head + 6]
            p, q = torch.softmax(other @ other.T / 6**0.5, -1), torch.softmax(own @ own.T / 4**0.5, -1)
            total += kl(p, q).sum() / (4 * length)
        torch.testing.assert_close(found[row], total)
    assert relation_kl(student, teacher, 4, torch.zeros_like(counted)).tolist() == [0, 0]
    with pytest.raises(ModelError, match="5 heads do not divide"):
        relation_kl(student, teacher, 5, counted)
