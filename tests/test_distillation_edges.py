"""What is easily distilled wrongly without a word: padding on the left, single numbers, sounds without masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import IterableDataset
from torch import Tensor

from hfcompress import HeadPruneCallback
from hfcompress.distillation import DistillationConfig, cache_teacher, make_student
from hfcompress.distillation.checks import check_run
from hfcompress.distillation.losses import LOSSES, LogitLoss
from hfcompress.distillation.pairs import refuse_other_preparation
from hfcompress.distillation.teachers.keys import keys_of
from hfcompress.errors import DataError, ModelError
from hfcompress.job import Source
from hfcompress.outputs import Frames, NextTokens, Spans, Vectors, outputs_of
from hfcompress.quantization import RTN, quantize
from hfcompress.tasks.speech_seq2seq import START_TOKENS
from hfcompress.teaching import cache_recipe_teacher, check_teachers
from tests.distilling import bert, class_rows, distiller, llama, text_rows, weights_of
from tests.kinds import KINDS, encoder, family, pad, wav2vec2
from tests.tiny_tasks import TINY, text_tokenizer

pytestmark = pytest.mark.usefixtures("quick_trainers")

LOGIT_LOSSES = {name: kind for name, kind in LOSSES.items() if issubclass(kind, LogitLoss)}


@pytest.mark.parametrize("loss", sorted(set(LOGIT_LOSSES) - {"universal_logit"}))
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_taken_moves_the_student(kind: str, loss: str, tmp_path: Path) -> None:
    made = KINDS[kind]
    student, teacher = made.make(), made.make(seed=1)
    before = weights_of(student)
    options = {"top_k_kl": {"k": 2}}.get(loss, {})
    settings: dict[str, Any] = {"temperature": None, "losses": [{loss: options}], "alpha": 1.0, "data_collator": pad}
    try:
        trainer = distiller(student, teacher, tmp_path, made.rows(), remove_unused_columns=False, **settings)
    except ModelError:
        return  # what cannot be compared so is refused, with the reason
    trainer.train()
    moved = [float((weight - before[name]).abs().max()) for name, weight in weights_of(student).items()]
    assert max(moved) > 1e-6


def one_number() -> hf.PreTrainedModel:
    return encoder(hf.BertForSequenceClassification, num_labels=1)()


@pytest.mark.parametrize("model", [KINDS["yes or no"].make, one_number], ids=["several labels", "one number"])
def test_the_direction_of_a_single_number_teaches_nothing(model: Any, tmp_path: Path) -> None:
    losses = {"temperature": None, "losses": ["logit_cosine"]}
    with pytest.raises(ModelError, match=r"is its sign, which has no gradient.* Use logit_mse"):
        distiller(model(), model(), tmp_path, KINDS["yes or no"].rows(), **losses)


def test_several_devices_in_one_process_are_refused(tmp_path: Path) -> None:
    args = DistillationConfig(tmp_path, use_cpu=True)
    assert args.n_gpu <= 1
    check_run(args, {})
    args._n_gpu = 2
    with pytest.raises(ModelError, match=r"2 copies of the student.* torchrun"):
        check_run(args, {})


def test_adapters_are_refused_by_name(tmp_path: Path) -> None:
    class Adapted(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, self.config = base, base.config

        def get_base_model(self) -> Any:
            return self.base

        def forward(self, **inputs: Any) -> Any:
            return self.base(**inputs)

    with pytest.raises(ModelError, match=r"An? Adapted has adapters.*merge_and_unload"):
        distiller(Adapted(bert()), bert(seed=1), tmp_path, class_rows())  # type: ignore[arg-type]


# Questions whose tokenizer pads on the left


def left_questions(folder: Path) -> tuple[Source, list[dict[str, Any]]]:
    source = Source(TINY["question-answering"].recipe(folder))
    source.processor.padding_side = "left"
    rows: Any = source.encoded("train")
    return source, [rows[index] for index in range(6)]


def test_answers_stand_where_their_labels_say_whatever_the_tokenizers_side(tmp_path: Path) -> None:
    source, rows = left_questions(tmp_path)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    batch = source.task.collator(source.processor, source.recipe.data)(rows)
    for index, row in enumerate(rows):
        for column in ("start_positions", "end_positions"):
            place = int(batch[column][index])
            assert int(batch["input_ids"][index, place]) == row["input_ids"][row[column]]


def test_kept_answers_are_refused_for_rows_padded_on_the_left(tmp_path: Path) -> None:
    made = KINDS["span"]
    rows = made.rows()
    batch = pad(rows)
    moved = {name: one.flip(1) if one.dim() == 2 else one for name, one in batch.items()}
    assert bool((moved["attention_mask"][:, 0] == 0).any())
    with pytest.raises(DataError, match=r"padded on the left.*padding_side='right'"):
        cache_teacher(made.make(seed=1), [rows], tmp_path / "cache", collator=lambda _: moved, batch_size=1)
    assert isinstance(outputs_of(made.make()), Spans)


# Vectors


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_kept_vectors_are_pooled_as_the_recipe_says(pooling: str, tmp_path: Path) -> None:
    recipe = TINY["sentence-embeddings"].recipe(tmp_path, pooling=pooling)
    cache_recipe_teacher(recipe, tmp_path / "cache", teacher="original", k=None, temperature=1.0, batch_size=4)
    source = Source(recipe)
    rows, collator = source.encoded("train"), source.task.collator(source.processor, recipe.data)
    student, teacher = source.open_original(), source.open_original()
    kind = Vectors(pooling)  # type: ignore[arg-type]
    trainer = trainer_of_vectors(student, tmp_path, rows, collator, kind)
    batch = collator([rows[index] for index in range(4)])
    counted = kind.compared(batch).nonzero().squeeze(1)
    ((kept, _),) = trainer.teachers
    with torch.no_grad():
        expected = kind.logits(teacher(**batch), batch)
    torch.testing.assert_close(kept.answer(batch, kind, counted, ()).targets, expected, rtol=1e-4, atol=1e-5)
    other = Vectors("cls" if pooling == "mean" else "mean")
    with pytest.raises(ModelError, match=f"pooled by '{pooling}', but the student's are by '{other.pooling}'"):
        trainer_of_vectors(student, tmp_path, rows, collator, other)
    changed = TINY["sentence-embeddings"].recipe(
        tmp_path, [{"distill": {"steps": 1, "teacher": str(tmp_path / "cache")}}], pooling=other.pooling
    )
    with pytest.raises(ModelError, match=f"pooled by '{pooling}'"):
        check_teachers(Source(changed), changed.stages[0])


def trainer_of_vectors(student: Any, folder: Path, rows: Any, collator: Any, kind: Vectors) -> Any:
    from hfcompress.distillation import DistillationTrainer

    args = DistillationConfig(folder / "run", use_cpu=True, report_to="none", max_steps=1)
    return DistillationTrainer(
        student, args, teacher_model=str(folder / "cache"), train_dataset=rows, data_collator=collator, outputs=kind
    )


# Sounds


def test_sounds_without_a_mask_end_where_their_zeros_begin() -> None:
    model = wav2vec2()
    kind = outputs_of(model)
    assert isinstance(kind, Frames)
    sounds = [torch.randn(400 + 90 * index) for index in range(3)]
    batch = {"input_values": torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True)}
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(one)) for one in sounds], batch_first=True).long()
    assert torch.equal(kind.compared(batch), kind.compared({**batch, "attention_mask": mask}))
    alone = [keys_of({"input_values": one[None]}, {"input_values"}) for one in sounds]
    assert keys_of(batch, {"input_values"}) == [key for (key,) in alone]


def test_whisper_is_measured_with_transcripts_of_any_length_it_takes(tmp_path: Path) -> None:
    limit = family("whisper")().config.max_target_positions
    source = Source(TINY["speech-seq2seq"].recipe(tmp_path, max_target_length=limit))
    model = source.open_original()
    reader: Any = source.task.reader(source.held_out()[1])
    assert reader.new_tokens(model) == limit - START_TOKENS
    rows: Any = source.encoded("held_out")
    batch = source.task.collator(source.processor, source.recipe.data)([rows[0]])
    assert len(reader.generated(model, batch)) == 1


# Teachers and losses of a recipe, before its first stage


def distilled(folder: Path, task: str, **options: Any) -> Source:
    stages = [*TINY[task].stages()[: TINY[task].learns], {"distill": {"steps": 1, "teacher": "original", **options}}]
    return Source(TINY[task].recipe(folder, stages))


def refused_by_recipe(source: Source, match: str) -> None:
    stage = source.recipe.stages[-1]
    with pytest.raises(ModelError, match=match):
        check_teachers(source, stage)


@pytest.mark.parametrize(
    ("task", "loss", "match"),
    [
        ("regression", "forward_kl", r"numbers \(regression\); forward_kl compares distributions.* Use logit_mse\."),
        ("regression", "logit_cosine", "direction of a single number"),
        ("multi-label", "logit_cosine", "direction of a single number"),
        ("question-answering", "logit_mse", "depend on the padding"),
        ("sentence-embeddings", "reverse_kl", "Use logit_mse or logit_cosine"),
    ],
)
def test_losses_that_do_not_fit_the_task_are_refused_before_the_first_stage(
    task: str, loss: str, match: str, tmp_path: Path
) -> None:
    stages = {"teacher": "finetune"} if TINY[task].learns else {}
    refused_by_recipe(distilled(tmp_path, task, losses=[loss], **stages), match)


def test_a_caches_temperature_is_looked_at_before_the_first_stage(tmp_path: Path) -> None:
    recipe = TINY["causal-lm"].recipe(tmp_path)
    cache_recipe_teacher(recipe, tmp_path / "cache", teacher="original", k=4, temperature=2.0, batch_size=4)
    losses = [{"top_k_kl": {"k": 4, "temperature": 1.0}}]
    source = distilled(tmp_path, "causal-lm", teacher=str(tmp_path / "cache"), losses=losses)
    refused_by_recipe(source, r"was written at temperature 2, but top_k_kl has 1\.")


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"image_mean": [0.1, 0.2, 0.3]}, "image_mean"), ({"size": {"height": 16, "width": 16}}, "size")],
)
def test_a_teacher_of_other_pictures_is_refused(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    TINY["image-classification"].write(tmp_path / "teacher")
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "teacher")
    source = distilled(tmp_path, "image-classification", teacher=str(tmp_path / "teacher"))
    refuse_other_preparation("teacher", source.processor, processor)
    for option, value in changes.items():
        setattr(processor, option, value)
    processor.save_pretrained(tmp_path / "teacher")
    refused_by_recipe(source, f"reads inputs with {name}=")


# Models and students of other kinds


def test_models_that_see_and_write_predict_the_next_token() -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**text, image_size=8, patch_size=4),
        text_config=hf.LlamaConfig(**text, vocab_size=40),
        image_token_index=39,
    )
    assert isinstance(outputs_of(hf.LlavaForConditionalGeneration(config)), NextTokens)
    assert not isinstance(outputs_of(family("t5")()), NextTokens)
    assert not isinstance(outputs_of(encoder(hf.BertForMaskedLM)()), NextTokens)


def test_what_an_architecture_keeps_fixed_stays_so_in_a_student() -> None:
    teacher = family("whisper")().requires_grad_(False)
    fixed = {name for name, one in family("whisper")().named_parameters() if not one.requires_grad}
    assert fixed
    student = make_student(teacher, layers=1)
    assert {name for name, one in student.named_parameters() if not one.requires_grad} == fixed


@pytest.mark.parametrize("loss", ["hidden_states", "relations", "feed_forward"])
def test_a_quantized_teacher_shows_its_layers(loss: str, tmp_path: Path) -> None:
    found = []
    for bits in (None, 8):
        teacher = llama(seed=1)
        if bits:
            quantize(teacher, RTN(bits=bits, group_size=16))
        student = llama()
        options = {"temperature": None, "losses": [loss], "alpha": 1.0}
        trainer = distiller(student, teacher, tmp_path, text_rows()[:8], **options)
        trainer.train()
        found.append(trainer.state.log_history[0]["kd_loss"])
    assert found[0] > 0
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


# The Trainer's own ways


def test_a_command_line_gives_losses_and_policy(tmp_path: Path) -> None:
    parser = hf.HfArgumentParser(DistillationConfig)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--alpha", "0.7", "--on_policy", '{"fraction": 0.25}']
    (args,) = parser.parse_args_into_dataclasses(
        [*words, "--losses", '["hidden_states", {"forward_kl": {"temperature": 3}}]']
    )
    assert args.alpha == 0.7
    assert args.on_policy.fraction == 0.25
    assert [type(one).__name__ for one in args.chosen] == ["HiddenStates", "ForwardKL"]
    assert DistillationConfig(tmp_path, use_cpu=True).losses is None


def test_processors_show_their_tokenizers(tmp_path: Path) -> None:
    class Processor:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def save_pretrained(self, folder: str) -> None:
            self.tokenizer.save_pretrained(folder)

    both = {"processing_class": Processor(text_tokenizer()), "teacher_processing_class": Processor(text_tokenizer())}
    larger = llama(seed=1, vocab_size=llama().config.vocab_size + 8)
    trainer = distiller(llama(), larger, tmp_path, text_rows(), **both)
    trainer.train()
    assert trainer.state.log_history[0]["kd_loss"] > 0


def test_streams_that_end_early_have_the_means_of_their_steps(tmp_path: Path) -> None:
    rows = class_rows(16)
    logged = []
    for data in (rows, IterableDataset.from_generator(lambda: iter(rows))):
        options = {"max_steps": 6, "logging_steps": 6, "learning_rate": 0.0, "dataloader_drop_last": False}
        trainer = distiller(bert(), bert(seed=1), tmp_path, data, **options)
        trainer.train()
        (first, *_) = (one for one in trainer.state.log_history if "kd_loss" in one)
        logged.append(first["kd_loss"])
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)


def test_an_infinite_task_loss_has_no_share_where_alpha_is_1(tmp_path: Path) -> None:
    made = KINDS["letter of a sound"]
    student, teacher = made.make(), made.make(seed=1)
    student.config.ctc_zero_infinity = False
    rows = [{**row, "labels": torch.arange(1, 15).repeat(20)} for row in made.rows()]
    trainer = distiller(student, teacher, tmp_path, rows, alpha=1.0, data_collator=pad, remove_unused_columns=False)
    trainer.train()
    assert all(bool(weight.isfinite().all()) for weight in weights_of(student).values())


def test_attention_that_is_watched_leaves_the_student_its_gradient(tmp_path: Path) -> None:
    """Entropy runs the model once more before its own pass, from which losses must take nothing."""
    moved = []
    for criterion in ("magnitude", "entropy"):
        student = llama()
        before = weights_of(student)
        callback = HeadPruneCallback(0.5, criterion=criterion, start=0.0, end=1.0)
        options = {"temperature": None, "losses": ["forward_kl", "hidden_states"], "alpha": 1.0, "max_steps": 3}
        trainer = distiller(student, llama(seed=1), tmp_path, text_rows(), callbacks=[callback], **options)
        trainer.train()
        assert trainer.state.log_history[0]["kd_loss"] > 0
        moved.append({name: weight - before[name] for name, weight in weights_of(student).items()})
    embedding: list[Tensor] = [next(value for name, value in one.items() if "embed" in name) for one in moved]
    assert all(float(one.abs().max()) > 1e-4 for one in embedding)
    assert np.isfinite(float(sum(one.abs().sum() for one in embedding)))
