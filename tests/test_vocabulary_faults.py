"""What vocabulary pruning refuses, before anything changed, and the corners where a wrong model would be silent."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from hfcompress.errors import DataError, HFCompressError, ModelError
from hfcompress.vocabulary import prune_vocabulary
from hfcompress.vocabulary.needed import merged_parts, needed_tokens
from tests.conftest import tiny_llama
from tests.vocabularies import CASES, CORPUS, SMALL, SMALL_SEQ2SEQ, bert_tokenizer, gpt2_tokenizer, trained


def _refused(model: Any, tokenizer: Any, texts: Any, message: str, error: type = ModelError, **options: Any) -> None:
    """Check that pruning is refused, and that model, configs and tokenizer are as they were."""

    def state() -> tuple:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        generation = model.generation_config.to_dict() if hasattr(model, "generation_config") else None
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
        return shapes, model.config.to_dict(), generation, vocabulary

    before = copy.deepcopy(state())
    with pytest.raises(error, match=message):
        prune_vocabulary(model, tokenizer, texts, **options)
    assert state() == before


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "There are no texts"),
        (iter(()), "There are no texts"),
        ("one text", "it is one text"),
        (["good", 3], "it holds a int"),
        (["", ""], "The 2 texts are empty"),
    ],
)
def test_texts_that_are_none_are_refused(texts: Any, message: str) -> None:
    _refused(*CASES["gpt2"].make(), texts, message, DataError)


def test_slow_tokenizer_is_refused() -> None:
    model, _ = CASES["gpt2"].make()
    slow = hf.CanineTokenizer()
    _refused(model, slow, CORPUS, "CanineTokenizer is not a fast tokenizer")


def test_word_level_vocabulary_is_refused(tokenizer: Any) -> None:
    _refused(tiny_llama(vocab_size=len(tokenizer)), tokenizer, ["the model"], "'WordLevel'.*Known: BPE, Unigram")


def test_tokenizer_of_another_model_is_refused() -> None:
    model, tokenizer = CASES["gpt2"].make()
    model.resize_token_embeddings(600)
    _refused(model, tokenizer, CORPUS, "token ids up to 700, but the embedding of GPT2LMHeadModel has 600 rows")
    model.resize_token_embeddings(4000)
    _refused(model, tokenizer, CORPUS, r"701 tokens.*has 4000 rows.*resize_token_embeddings\(701\)")


def test_unknown_extra_token_is_refused() -> None:
    _refused(*CASES["gpt2"].make(), CORPUS, "keep_extra: the tokenizer has no token 'Zebra'", keep_extra=["Zebra"])
    _refused(*CASES["gpt2"].make(), CORPUS, "has no token 99999", keep_extra=[99999])


class _WithTensor(hf.LlamaForCausalLM):
    """A Llama with one more thing of the vocabulary's size; ``make`` says which."""

    make: Any

    def __init__(self, config: hf.LlamaConfig) -> None:
        super().__init__(config)
        self.extra = type(self).make(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda config: nn.AdaptiveLogSoftmaxWithLoss(32, config.vocab_size, [20, 100]),
            r"extra.tail.1.1.weight of \w+ depends on the vocabulary in a way that is not known",
        ),
        (lambda config: nn.Linear(4, 701), r"extra\.weight of \w+ has a dimension of 701.* not follow"),
        (lambda config: nn.Linear(4, config.vocab_size - 200), "not known|cannot be built"),
    ],
    ids=["adaptive", "fixed", "shifted"],
)
def test_unknown_weights_of_the_vocabularys_size_are_refused_by_name(make: Any, message: str) -> None:
    tokenizer = gpt2_tokenizer()
    kind = type("WithTensor", (_WithTensor,), {"make": staticmethod(make)})
    _refused(kind(hf.LlamaConfig(vocab_size=701, **SMALL)), tokenizer, CORPUS, message)


def test_known_weights_beside_the_embedding_follow() -> None:
    kind = type("WithTensor", (_WithTensor,), {"make": staticmethod(lambda config: nn.Linear(config.vocab_size, 4))})
    model, tokenizer = kind(hf.LlamaConfig(vocab_size=701, **SMALL)), gpt2_tokenizer()
    before = model.extra.weight.clone()
    report = prune_vocabulary(model, tokenizer, CORPUS)
    assert torch.equal(model.extra.weight, before[:, report.old_ids])
    assert model.extra.in_features == report.rows_after


def test_model_with_two_vocabularies_is_refused() -> None:
    model, tokenizer = CASES["gpt2"].make()
    model.config.decoder_vocab_size = 900
    _refused(model, tokenizer, CORPUS, "GPT2Config.decoder_vocab_size is 900, but its token embedding has 701 rows")


def test_replaced_head_is_refused() -> None:
    model, tokenizer = CASES["llama3"].make()
    model.lm_head = nn.Linear(32, 9)
    _refused(model, tokenizer, CORPUS, r"lm_head\.weight of LlamaForCausalLM is not as its config describes it")


def test_hidden_size_that_equals_the_vocabulary_by_chance_is_left_alone() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.add_tokens([f"<{index}>" for index in range(704 - len(tokenizer))])
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=704, **{**SMALL, "intermediate_size": 704})).eval()
    ids = tokenizer(CORPUS[0], return_tensors="pt")["input_ids"]
    before = model(ids).logits
    report = prune_vocabulary(model, tokenizer, CORPUS)
    after = model(tokenizer(CORPUS[0], return_tensors="pt")["input_ids"]).logits
    torch.testing.assert_close(after, before[..., report.old_ids])


def test_positions_counted_from_the_padding_id_stay() -> None:
    vocabulary = list(trained("wordpiece")["vocab"])
    first = [token for token in vocabulary if not token.startswith("[")][-20:]
    ordered = list(dict.fromkeys([*first, *vocabulary]))
    tokenizer = hf.BertTokenizer(vocab={token: index for index, token in enumerate(ordered)})
    assert tokenizer.pad_token_id == 20
    model = hf.RobertaModel(hf.RobertaConfig(vocab_size=700, max_position_embeddings=90, pad_token_id=20, **SMALL))
    model.eval()
    inputs = tokenizer(["in the", "of the if and"], padding=True, return_tensors="pt")
    before = model(**inputs).last_hidden_state
    report = prune_vocabulary(model, tokenizer, ["of the if and in"])
    assert report.rows_after < 300
    assert model.config.pad_token_id == tokenizer.pad_token_id == 20
    torch.testing.assert_close(
        model(**tokenizer(["in the", "of the if and"], padding=True, return_tensors="pt")).last_hidden_state, before
    )


def test_generation_config_of_whisper_follows() -> None:
    tokenizer = gpt2_tokenizer()
    extra = ["<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": extra})
    english, german, transcribe, plain = tokenizer.convert_tokens_to_ids(extra)
    end = tokenizer.eos_token_id
    config = hf.WhisperConfig(
        vocab_size=len(tokenizer),
        **SMALL_SEQ2SEQ,
        num_mel_bins=4,
        max_source_positions=8,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), end),
    )
    model = hf.WhisperForConditionalGeneration(config).eval()
    unused = tokenizer.convert_tokens_to_ids(list(trained("bytelevel")["vocab"])[-1])
    kept = tokenizer(CORPUS[0])["input_ids"][0]
    generation = model.generation_config
    generation.suppress_tokens = [kept, unused, -1]
    generation.begin_suppress_tokens = [unused, end]
    generation.forced_decoder_ids = [[1, english], [2, transcribe]]
    generation.lang_to_id = {"<|en|>": english, "<|de|>": german}
    generation.no_timestamps_token_id = plain
    generation.bad_words_ids = [[kept, unused], [kept, german]]
    generation.sequence_bias = [[[kept], -2.0], [[unused], 1.0]]
    generation.eos_token_id = [end, german]
    features = torch.randn(1, 4, 16)
    ids = tokenizer(CORPUS[0], return_tensors="pt")["input_ids"][:, :20]
    before = model(features, decoder_input_ids=ids).logits

    report = prune_vocabulary(model, tokenizer, CORPUS)
    english, german, transcribe, plain = tokenizer.convert_tokens_to_ids(extra)
    end, kept = tokenizer.eos_token_id, tokenizer(CORPUS[0])["input_ids"][0]
    assert unused not in report.old_ids
    assert generation.suppress_tokens == [kept, -1]
    assert generation.begin_suppress_tokens == [end]
    assert generation.forced_decoder_ids == [[1, english], [2, transcribe]]
    assert generation.lang_to_id == {"<|en|>": english, "<|de|>": german}
    assert generation.no_timestamps_token_id == plain
    assert generation.bad_words_ids == [[kept, german]]
    assert generation.sequence_bias == [[[kept], -2.0]]
    assert generation.eos_token_id == [end, german]
    assert model.config.decoder_start_token_id == end
    ids = tokenizer(CORPUS[0], return_tensors="pt")["input_ids"][:, :20]
    torch.testing.assert_close(model(features, decoder_input_ids=ids).logits, before[..., report.old_ids])


def test_image_token_and_nested_config_follow() -> None:
    _, tokenizer = CASES["llama3"].make()
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = hf.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SMALL)
    vision = hf.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=32, **SMALL)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=image)
    model = hf.LlavaForConditionalGeneration(config).eval()
    pixels = torch.randn(1, 3, 8, 8)
    prompt = "<image>" * 4 + CORPUS[0][:60]
    before = model(**tokenizer(prompt, return_tensors="pt"), pixel_values=pixels).logits
    report = prune_vocabulary(model, tokenizer, CORPUS)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") < image
    assert model.config.text_config.vocab_size == report.rows_after
    after = model(**tokenizer(prompt, return_tensors="pt"), pixel_values=pixels).logits
    torch.testing.assert_close(after, before[..., report.old_ids])


def test_extra_tokens_stay_and_can_be_used() -> None:
    model, tokenizer = CASES["bert-masked"].make()
    unused = [token for token in trained("wordpiece")["vocab"] if len(token) > 4 and token.isalpha()][-3:]
    plain, plain_tokenizer = CASES["bert-masked"].make()
    prune_vocabulary(plain, plain_tokenizer, CORPUS)
    assert not any(token in plain_tokenizer.get_vocab() for token in unused)
    prune_vocabulary(model, tokenizer, CORPUS, keep_extra=unused)
    assert tokenizer.tokenize(" ".join(unused)) == unused


def test_what_the_caller_set_on_the_tokenizer_stays() -> None:
    model, tokenizer = CASES["bert-masked"].make()
    tokenizer.padding_side, tokenizer.model_max_length = "left", 17
    prune_vocabulary(model, tokenizer, CORPUS)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 17)


def test_gradients_of_the_old_size_are_dropped_and_training_goes_on() -> None:
    model, tokenizer = CASES["bert-masked"].make()
    inputs = tokenizer(CORPUS[0], return_tensors="pt", truncation=True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    prune_vocabulary(model, tokenizer, CORPUS)
    inputs = tokenizer(CORPUS[0], return_tensors="pt", truncation=True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters() if parameter.requires_grad)


def test_merged_parts_follow_the_encoder_and_not_just_any_merge() -> None:
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("ab", "c"): 2, ("a", "bc"): 3}
    assert merged_parts(list("abc"), ranks) == {"a", "b", "c", "bc", "abc"}
    assert merged_parts(list("ab"), ranks) == {"a", "b", "ab"}
    assert merged_parts(list("aaaa"), {("a", "a"): 0, ("aa", "aa"): 1}) == {"a", "aa", "aaaa"}
    assert merged_parts(list("acb"), ranks) == set()


def test_parts_of_kept_merges_stay_though_they_never_occur() -> None:
    vocabulary = {token: index for index, token in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd", "bc", "xyz"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c")]))
    content = json.loads(core.to_str())["model"]
    assert needed_tokens(content, {"abcd"}) == {"a", "b", "c", "d", "ab", "cd", "abcd"}


def test_tokens_that_single_characters_cannot_spell_stay() -> None:
    vocabulary = {token: index for index, token in enumerate(["[UNK]", "a", "##a", "##b", "##ab", "##ax", "aab"])}
    core = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    content = json.loads(core.to_str())["model"]
    assert needed_tokens(content, {"a"}) == {"[UNK]", "a", "##a", "##b", "##ax"}


def test_lowest_unigram_score_stays_so_that_unknown_characters_cost_the_same() -> None:
    # Were "zz" dropped, an unknown character would cost 10 below -3 and no longer 10 below -30, and "x?" be split
    pieces = [("<unk>", 0.0), ("a", -1.0), ("x", -3.0), ("x?", -25.0), ("zz", -30.0), ("z", -2.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    content = json.loads(core.to_str())["model"]
    kept = needed_tokens(content, {"a", "x?"})
    assert "zz" in kept
    smaller = Tokenizer(models.Unigram([piece for piece in pieces if piece[0] in kept], unk_id=0))
    for text in ("ax?a", "x??", "ax"):
        assert smaller.encode(text).tokens == core.encode(text).tokens


def test_every_fault_is_of_our_own_kind() -> None:
    with pytest.raises(HFCompressError, match="no token embedding"):
        prune_vocabulary(hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **SMALL)), bert_tokenizer(), CORPUS)
