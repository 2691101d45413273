"""How a reader of a card loads the model: the pipeline tag and the lines of Python for each task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

COMPRESSED_TENSORS, BITSANDBYTES = "compressed-tensors", "bitsandbytes"


@dataclass(frozen=True)
class TaskPage:
    """What the Hub and Transformers call a task.

    pipeline_tag: None where the Hub has none.  processor: the Auto class of its tokenizer or processor.
    """

    pipeline_tag: str | None
    auto_class: str
    processor: str = "AutoTokenizer"


# By the names that recipes know, and two kinds of models that only a Trainer makes.
TASK_PAGES: dict[str, TaskPage] = {
    "causal-lm": TaskPage("text-generation", "AutoModelForCausalLM"),
    "masked-lm": TaskPage("fill-mask", "AutoModelForMaskedLM"),
    "sequence-classification": TaskPage("text-classification", "AutoModelForSequenceClassification"),
    "token-classification": TaskPage("token-classification", "AutoModelForTokenClassification"),
    "question-answering": TaskPage("question-answering", "AutoModelForQuestionAnswering"),
    "multiple-choice": TaskPage("multiple-choice", "AutoModelForMultipleChoice"),
    # Which of summarization, translation and others it is, neither the task nor the model's class says.
    "seq2seq-lm": TaskPage(None, "AutoModelForSeq2SeqLM"),
    "image-classification": TaskPage("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
    "speech-seq2seq": TaskPage("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", "AutoProcessor"),
    "speech-ctc": TaskPage("automatic-speech-recognition", "AutoModelForCTC", "AutoProcessor"),
    # Of a model that a Trainer made without a head; the next has the same class, and is a recipe's.
    "feature-extraction": TaskPage("feature-extraction", "AutoModel"),
    "sentence-embeddings": TaskPage("feature-extraction", "AutoModel"),
    "audio-classification": TaskPage(
        "audio-classification", "AutoModelForAudioClassification", "AutoFeatureExtractor"
    ),
}


def loading_lines(task: str, name: str, loads_without_hfcompress: bool, trusted: bool = False) -> str:
    """Return the Python lines that load a model; ``import hfcompress`` is one only where it is needed.

    trusted: the model comes with code of its own, which a reader has to allow.
    """
    page = TASK_PAGES.get(task, TaskPage(None, "AutoModel"))
    variable = "tokenizer" if page.processor == "AutoTokenizer" else "processor"
    given = json.dumps(name, ensure_ascii=False) + ", trust_remote_code=True" * trusted
    lines = [
        f"from transformers import {', '.join(sorted((page.auto_class, page.processor)))}",
        f"{variable} = {page.processor}.from_pretrained({given})",
        f"model = {page.auto_class}.from_pretrained({given})",
    ]
    if not loads_without_hfcompress:
        lines.insert(0, "import hfcompress  # teaches from_pretrained this checkpoint's format")
    return "\n".join(lines)


def runs_own_code(recipe: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a model runs code that comes with it: as its recipe says, else as its config does."""
    if recipe:
        return bool((recipe.get("model") or {}).get("trust_remote_code"))
    return bool(config.get("auto_map"))


def packages_to_install(config: dict[str, Any], loads_without_hfcompress: bool) -> list[str]:
    """Return the packages, beside Transformers, that the checkpoint's format needs."""
    method, inner = quant_methods(config)
    needed = [] if loads_without_hfcompress else ["hfcompress"]
    if BITSANDBYTES in (method, inner):
        return [*needed, BITSANDBYTES]
    return [*needed, COMPRESSED_TENSORS] if method == COMPRESSED_TENSORS else needed


def quant_methods(config: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the method of a checkpoint's ``quantization_config``, and the one inside it, if it is our loader's."""
    options = config.get("quantization_config") or {}
    return options.get("quant_method"), (options.get("quantization") or {}).get("quant_method")
