"""Distillation across tokenizers: where two tokenizations meet, what is compared there, and what is refused."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfcompress.distillation import DistillationConfig, DistillationTrainer, cache_teacher
from hfcompress.distillation.losses import LOSSES
from hfcompress.distillation.losses.targets import Elsewhere
from hfcompress.distillation.losses.universal_logit import UniversalLogit, sorted_distance
from hfcompress.distillation.teachers.across import AcrossTokenizers
from hfcompress.distillation.teachers.spans import NOWHERE, Spans, aligned
from hfcompress.errors import DataError, HFCompressError, ModelError
from hfcompress.logits import chunks
from tests.distilling import Rows, bert, class_rows, llama, weights_of
from tests.test_distillation_head import LargestFloat32
from tests.vocabularies import CASES

pytestmark = pytest.mark.usefixtures("quick_trainers")
TEXTS = ["the small model", "a good film is not bad", "prune the film", "é is a model", "small  films", "日本 the end"]


def byte_tokenizer(merges: list[str], specials: Sequence[str], first: bool = True) -> PreTrainedTokenizerFast:
    """Byte pairs as GPT-2 has them, with these words merged from left to right.

    specials: the tokens that begin and end a text.  first: a text begins with the former.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {one: index for index, one in enumerate([*dict.fromkeys(specials), *letters])}
    pairs: list[tuple[str, str]] = []
    for word in merges:
        word = word.replace(" ", "Ġ")
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                pairs.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    begins = processors.TemplateProcessing(f"{specials[0]} $A", special_tokens=[(specials[0], 0)])
    trims = processors.ByteLevel(trim_offsets=True)
    core.post_processor = processors.Sequence([trims, begins]) if first else trims
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=specials[0], eos_token=specials[1], pad_token=specials[1]
    )


STUDENT = byte_tokenizer(["the", " small", " mod", " fil", "pru"], ("<s>", "</s>"))
TEACHER = byte_tokenizer(["th", " sma", " model", " film", "prune"], ("<|begin|>", "<|end|>", "<|turn|>"))
BARE = byte_tokenizer(["th", " sma", " model"], ("<|end|>", "<|end|>"), first=False)


def row_of(text: str, left: int, ignored: int, width: int = 40) -> dict[str, Tensor]:
    """A text between the student's special tokens, with padding on both sides and some ignored labels."""
    ids = torch.tensor([*STUDENT(text)["input_ids"], 1])
    labels = ids.clone()
    labels[:ignored] = -100
    around = (left, width - left - len(ids))
    mask = F.pad(torch.ones_like(ids), around)
    return {
        "input_ids": F.pad(ids, around, value=1),
        "attention_mask": mask,
        "labels": F.pad(labels, around, value=-100),
    }


def rows() -> Rows:
    """Rows whose numbers of labels, of padding tokens and of places that can be compared differ; one has no label."""
    made = [row_of(text, index % 3, index) for index, text in enumerate(TEXTS)]
    return [*made, row_of("the model", 0, 40), row_of("", 1, 1)]


SIZES = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def models_of(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    student = llama(seed=1, vocab_size=len(STUDENT), **SIZES)
    return student.to(dtype), llama(vocab_size=len(TEACHER), layers=3, **SIZES).to(dtype)


def trainer_of(folder: Path, student: Any, teacher: Any, **options: Any) -> DistillationTrainer:
    given = {"processing_class": STUDENT, "teacher_processing_class": TEACHER, "train_dataset": rows()}
    given |= {name: options.pop(name) for name in [*given, "teacher_weights"] if name in options}
    defaults: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no", "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "alpha": 0.4, "losses": ["universal_logit"], "logging_steps": 1,
    }  # fmt: skip
    args = DistillationConfig(folder, **{**defaults, **options})
    return DistillationTrainer(model=student, teacher_model=teacher, args=args, **given)


# Where two tokenizations meet


def test_tokens_meet_where_both_end() -> None:
    assert aligned([0, 3, 9, 12], [0, 2, 3, 12]) == [0, 2, NOWHERE, 3]
    assert aligned([NOWHERE, 3, 3], [3, NOWHERE, 3]) == [NOWHERE, NOWHERE, 2]


@pytest.mark.parametrize("tokenizer", [STUDENT, TEACHER, BARE], ids=["student", "teacher", "bare"])
@pytest.mark.parametrize("text", [*TEXTS, " a\n\n  b ", ""])
def test_ends_are_where_the_text_before_was_read(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = Spans(tokenizer)
    for found in (spans.decode(ids), (text, spans.encode(text)[1]), (text, spans.ends_by_decoding(ids, text))):
        assert found[0] == text
        known = [(count, end) for count, end in enumerate(found[1], start=1) if end != NOWHERE]
        assert [tokenizer.decode(ids[:count]) for count, _ in known] == [text[:end] for _, end in known]
        # every token but those inside of a character
        whole = [count for count in range(1, len(ids) + 1) if "\ufffd" not in tokenizer.decode(ids[:count])]
        assert [count for count, _ in known] == whole


def test_tokens_that_their_tokenizer_would_not_choose_are_followed_by_decoding() -> None:
    letters = STUDENT.convert_tokens_to_ids([*"the", "Ġmod", "Ã", "©", "Ġ"])
    assert STUDENT("the modé ", add_special_tokens=False)["input_ids"] != letters
    assert Spans(STUDENT).decode(letters) == ("the modé ", [1, 2, 3, 7, NOWHERE, 8, 9])
    assert Spans(STUDENT).ends_by_decoding(letters, "another text") == [NOWHERE] * 7


FAMILIES = {name: CASES[name].make()[1] for name in ("gpt2", "llama3", "llama2")}


@pytest.mark.parametrize(("own", "other"), list(itertools.permutations(FAMILIES, 2)), ids="-".join)
def test_families_of_tokenizers_meet_where_both_have_read_the_same(own: str, other: str) -> None:
    student, teacher = FAMILIES[own], FAMILIES[other]
    across = AcrossTokenizers(models_of()[1], student, teacher)
    text = "The quick brown fox: it's 1984!\n\n    return fast_function(x)  # déjà vu, 日本 😀\n"
    ids = student(text)["input_ids"]
    tokens, places = across.read(tuple(ids))
    met = [(place, there) for place, there in enumerate(places) if there != NOWHERE]
    for place, there in met:
        ours, theirs = student.decode(ids[: place + 1]), teacher.decode(tokens[: there + 1])
        specials = ("<s>", "<|begin_of_text|>", "<|endoftext|>")
        ours, theirs = (
            functools.reduce(lambda one, name: one.removeprefix(name), specials, x) for x in (ours, theirs)
        )
        assert ours.strip(" ") == theirs.strip(" ")
        assert text.startswith(ours.removeprefix(" "))
    assert met[-1] == (len(ids) - 1, len(tokens) - 1)
    assert len(met) > 10


def read(tokenizer: Any, *parts: int | str) -> list[int]:
    return [
        one
        for part in parts
        for one in ([part] if isinstance(part, int) else tokenizer(part, add_special_tokens=False)["input_ids"])
    ]


def test_tokens_that_begin_and_end_texts_become_the_teachers_own() -> None:
    _, teacher = models_of()
    across = AcrossTokenizers(teacher, STUDENT, TEACHER)
    # two texts in a row
    tokens, places = across.read((0, *read(STUDENT, "the", 1, " mod", 1)))
    assert tokens == read(TEACHER, 0, "the", 1, " mod", 1)
    # <s>, the (of th and e), </s>, mod, </s>
    assert places == [0, 2, 3, 4, 5]
    # a text without a beginning, and a beginning in the middle
    tokens, places = across.read(tuple(read(STUDENT, "the", 1, 0, "pru")))
    assert tokens == read(TEACHER, 0, "the", 1, 0, "pru")
    assert places == [2, 3, 4, 5]


def test_teacher_without_a_first_token_and_unknown_special_tokens_have_no_place() -> None:
    _, teacher = models_of()
    tokens, places = AcrossTokenizers(teacher, STUDENT, BARE).read(tuple(read(STUDENT, 0, "the", 1)))
    assert (tokens, places) == (read(BARE, "the", 0), [NOWHERE, 1, 2])
    chat = copy.deepcopy(STUDENT)
    chat.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = chat.convert_tokens_to_ids("<turn>")
    tokens, places = AcrossTokenizers(teacher, chat, TEACHER).read(tuple(read(chat, 0, "the", turn, "pru")))
    assert (tokens, places) == (read(TEACHER, 0, "the", "pru"), [0, 2, NOWHERE, 3])


def test_a_text_longer_than_the_teacher_takes_is_compared_as_far_as_it_reads() -> None:
    _, teacher = models_of()
    teacher.config.max_position_embeddings = 3
    tokens, places = AcrossTokenizers(teacher, STUDENT, TEACHER).read(tuple(read(STUDENT, 0, "the model", 1)))
    assert tokens == read(TEACHER, 0, "the model")[:3]
    assert places == [0, 2, *[NOWHERE] * (len(places) - 2)]


# The loss


@pytest.mark.parametrize("top", [None, 1, 4, 9, 11, 100])
@pytest.mark.parametrize("classes", [5, 13])
def test_distance_is_that_of_sorted_probabilities(top: int | None, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = 3 * torch.randn(6, classes, generator=generator, dtype=torch.float64)
    loss, slope = sorted_distance(student.detach(), teacher, 1.3, top)
    both = [F.pad((one / 1.3).softmax(-1).sort(descending=True).values, (0, 100)) for one in (student, teacher)]
    both = [one[:, : 9 + classes] for one in both]
    if top is not None:
        both = [torch.cat([one[:, :top], one[:, top:].sum(-1, keepdim=True)], -1) for one in both]
    expected = (both[0] - both[1]).abs().sum(-1)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slope, student.grad)
    order = torch.randperm(9, generator=generator)
    torch.testing.assert_close(sorted_distance(student.detach()[:, order], teacher, 1.3, top)[0], loss)
    assert float(sorted_distance(student.detach(), student.detach(), 1.3, top)[0].max()) < 1e-12


def test_only_rows_with_a_place_count() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, size, generator=generator, dtype=torch.float64) for size in (9, 13))
    told = Elsewhere(teacher, torch.tensor([2, -1, 0, 2]))
    loss, slope = UniversalLogit(top=None).rows(student, told)
    for row, place in ((0, 2), (2, 0), (3, 2)):
        one = sorted_distance(student[row][None], teacher[place][None], 1.0)
        torch.testing.assert_close((loss[row][None], slope[row][None]), one)
    assert float(loss[1]) == float(slope[1].abs().sum()) == 0
    empty = UniversalLogit().rows(student, Elsewhere(teacher, torch.full((4,), -1)))
    assert float(empty[0].abs().sum() + empty[1].abs().sum()) == 0


def reference(student: PreTrainedModel, teacher: PreTrainedModel, data: Rows) -> tuple[Tensor, Tensor, int]:
    """Return KD and task loss as means, and the number of places compared: found by decoding every prefix."""
    kd, task = torch.zeros((2,), dtype=torch.float64)
    compared = labelled = 0
    for row in data:
        real = row["attention_mask"].bool()
        ids, labels = row["input_ids"][real].tolist(), row["labels"][real].tolist()
        text = STUDENT.decode(ids, skip_special_tokens=True)
        own = [*TEACHER(text)["input_ids"], 1]
        mine, theirs = student(torch.tensor([ids])).logits[0], teacher(torch.tensor([own])).logits[0].detach()
        there = {TEACHER.decode(own[1 : place + 1]): place for place in range(len(own) - 1)}
        for place in range(len(ids) - 1):
            if labels[place + 1] == -100:
                continue
            labelled += 1
            task = task - mine[place].log_softmax(-1)[labels[place + 1]]
            prefix = STUDENT.decode(ids[1 : place + 1])
            if "\ufffd" not in prefix and prefix in there:
                q, p = (one.softmax(-1).sort(descending=True).values for one in (mine[place], theirs[there[prefix]]))
                width = max(len(q), len(p))
                q, p = (F.pad(one, (0, width - len(one))) for one in (q, p))
                kd, compared = kd + (q - p).abs().sum(), compared + 1
    return kd / compared, task / labelled, compared


@pytest.mark.parametrize(("size", "steps"), [(8, 1), (2, 4)])
def test_loss_and_gradient_are_a_plain_loop_for_every_split(size: int, steps: int, tmp_path: Path) -> None:
    student, teacher = models_of(torch.float64)
    plain, _ = models_of(torch.float64)
    trainer = trainer_of(
        tmp_path, student, teacher, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        losses=[{"universal_logit": {"top": None}}],
    )  # fmt: skip
    trainer.train()
    kd, task, compared = reference(plain, teacher, rows())
    (0.4 * kd + 0.6 * task).backward()
    assert int(trainer.counts["places of teacher 0"]) == compared > 20
    assert compared < int(trainer.counts["places"])
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(
            student.get_parameter(name).detach(), weight.detach() - 0.1 * weight.grad, rtol=0, atol=1e-8,
            msg=lambda text, n=name: f"{n}: {text}",
        )  # fmt: skip
    logged = trainer.state.log_history[0]
    assert logged["kd_loss"] == pytest.approx(float(kd.detach()))
    assert logged["task_loss"] == pytest.approx(float(task.detach()))


def test_what_padding_holds_does_not_matter(tmp_path: Path) -> None:
    results = []
    for filler in (1, 77):
        data = rows()
        for row in data:
            row["input_ids"][row["attention_mask"] == 0] = filler
        student, teacher = models_of()
        trainer_of(tmp_path, student, teacher, train_dataset=data, alpha=1.0).train()
        results.append(weights_of(student))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-6)


def test_several_teachers_with_tokenizers_of_their_own_are_their_mean(tmp_path: Path) -> None:
    other = llama(seed=3, vocab_size=len(BARE), **SIZES)
    terms = []
    for teacher, tokenizer in (
        (models_of()[1], TEACHER),
        (other, BARE),
        ([models_of()[1], other], [TEACHER, BARE]),
    ):
        shares = {"teacher_weights": [3, 1]} if isinstance(teacher, list) else {}
        trainer = trainer_of(tmp_path, models_of()[0], teacher, teacher_processing_class=tokenizer, **shares)
        trainer.train()
        terms.append(trainer.state.log_history[0]["kd_loss"])
    assert terms[2] == pytest.approx(0.75 * terms[0] + 0.25 * terms[1], rel=1e-5)
    assert terms[0] != pytest.approx(terms[1], rel=0.01)


def test_logits_are_never_whole_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 288
    monkeypatch.setattr("tests.test_distillation_head.VOCABULARY", vocabulary)
    monkeypatch.setitem(chunks.ELEMENTS_PER_CHUNK, "cpu", 4 * vocabulary)
    student = llama(vocab_size=vocabulary, **SIZES)
    teacher = llama(vocab_size=vocabulary, seed=1, **SIZES).to(torch.bfloat16)
    assert max(len(STUDENT), len(TEACHER)) <= vocabulary
    trainer = trainer_of(tmp_path, student, teacher, bf16=True)
    with LargestFloat32() as found:
        trainer.train()
    assert found.largest == 4 * vocabulary


def test_student_that_also_writes_comes_closer_to_a_teacher_of_another_tokenizer(tmp_path: Path) -> None:
    student, teacher = models_of()
    with torch.no_grad():
        teacher.get_input_embeddings().weight.mul_(8)  # sure of itself: there is something to come closer to
    trainer = trainer_of(
        tmp_path, student, teacher, max_steps=20, optim="adamw_torch", learning_rate=3e-3, alpha=0.9,
        on_policy={"fraction": 0.2, "max_new_tokens": 4, "prompt_tokens": 3},
    )  # fmt: skip
    trainer.train()
    logged = [one for one in trainer.state.log_history if "kd_loss" in one]
    losses = [one["kd_loss"] for one in logged if not one["on_policy"]]
    assert losses[-1] < 0.6 * losses[0]
    assert 0 < len(losses) < 20


# Faults


class Slow:
    is_fast = False

    def get_vocab(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_processing_class": None}, "teacher_processing_class is missing"),
        ({"processing_class": None}, "two tokenizations of one text.* processing_class is missing"),
        ({"teacher_processing_class": Slow()}, "which a Slow does not say. Use a fast tokenizer"),
        ({"teacher_processing_class": [TEACHER, TEACHER]}, "There are 1 teachers, but 2 tokenizers"),
        ({"losses": ["universal_logit", "forward_kl"]}, "forward_kl compares the same tokens.*universal_logit"),
        ({"losses": ["universal_logit", "hidden_states"]}, "hidden_states compares the same tokens.*universal_logit"),
        # other tokenizers are refused unless they are asked for
        ({"losses": ["forward_kl"]}, r"Token 0 is '<s>' for the student .* losses=\['universal_logit'\]"),
        ({"losses": ["forward_kl"], "teacher_processing_class": None}, r"have losses=\['universal_logit'\]"),
    ],
)
def test_what_does_not_cross_tokenizers_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        trainer_of(tmp_path, *models_of(), **options)


def test_only_causal_language_models_cross(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"two causal language models.*BertForSequenceClassification"):
        trainer_of(tmp_path, bert(), bert(seed=1), train_dataset=class_rows())
    with pytest.raises(ModelError, match="LlamaForCausalLM and cannot answer what a BertForSequenceClassification"):
        trainer_of(tmp_path, bert(), models_of()[1], train_dataset=class_rows())


def test_answers_on_disk_do_not_cross(tmp_path: Path) -> None:
    student, _ = models_of()
    cache_teacher(student, rows(), tmp_path / "cache", k=4)
    with pytest.raises(ModelError, match="answers on disk are to the student's tokens"):
        trainer_of(tmp_path, student, tmp_path / "cache")


def test_rows_of_another_tokenizer_are_refused_before_the_first_step(tmp_path: Path) -> None:
    unknown = copy.deepcopy(STUDENT)
    unknown.add_special_tokens({"additional_special_tokens": [f"<{index}>" for index in range(400)]})
    data = [{name: value + 300 if name == "input_ids" else value for name, value in row.items()} for row in rows()]
    student = llama(vocab_size=700, **SIZES)
    trainer = trainer_of(tmp_path, student, models_of()[1], train_dataset=data, processing_class=unknown)
    with pytest.raises(DataError, match="Is processing_class the tokenizer that made these rows"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(HFCompressError, match="top"):
        DistillationConfig(tmp_path, use_cpu=True, losses=[{"universal_logit": {"top": 0}}])
    assert [name for name, kind in LOSSES.items() if getattr(kind, "across_tokenizers", False)] == ["universal_logit"]
