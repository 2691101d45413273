"""How a reader of a card loads the model: the pipeline tag and the lines of Python for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COMPRESSED_TENSORS, BITSANDBYTES = "compressed-tensors", "bitsandbytes"


@dataclass(frozen=True)
class TaskPage:
    """What the Hub and Transformers call a task.  processor: the Auto class of its tokenizer or processor."""

    pipeline_tag: str
    auto_class: str
    processor: str = "AutoTokenizer"


_SPEECH = TaskPage("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", "AutoProcessor")
TASK_PAGES: dict[str, TaskPage] = {
    "causal-lm": TaskPage("text-generation", "AutoModelForCausalLM"),
    "sequence-classification": TaskPage("text-classification", "AutoModelForSequenceClassification"),
    "token-classification": TaskPage("token-classification", "AutoModelForTokenClassification"),
    "question-answering": TaskPage("question-answering", "AutoModelForQuestionAnswering"),
    "masked-lm": TaskPage("fill-mask", "AutoModelForMaskedLM"),
    "summarization": TaskPage("summarization", "AutoModelForSeq2SeqLM"),
    "translation": TaskPage("translation", "AutoModelForSeq2SeqLM"),
    "feature-extraction": TaskPage("feature-extraction", "AutoModel"),
    "image-classification": TaskPage("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
    "audio-classification": TaskPage(
        "audio-classification", "AutoModelForAudioClassification", "AutoFeatureExtractor"
    ),
    "automatic-speech-recognition": _SPEECH,
}


def loading_lines(task: str, name: str, loads_without_hfcompress: bool) -> str:
    """Return the Python lines that load a model; ``import hfcompress`` is one only where it is needed."""
    page = TASK_PAGES.get(task, TaskPage("", "AutoModel"))
    variable = "tokenizer" if page.processor == "AutoTokenizer" else "processor"
    lines = [
        f"from transformers import {', '.join(sorted((page.auto_class, page.processor)))}",
        f'{variable} = {page.processor}.from_pretrained("{name}")',
        f'model = {page.auto_class}.from_pretrained("{name}")',
    ]
    if not loads_without_hfcompress:
        lines.insert(0, "import hfcompress  # teaches from_pretrained this checkpoint's format")
    return "\n".join(lines)


def packages_to_install(config: dict[str, Any], loads_without_hfcompress: bool) -> list[str]:
    """Return the packages, beside Transformers, that the checkpoint's format needs."""
    options = config.get("quantization_config") or {}
    method, inner = options.get("quant_method"), (options.get("quantization") or {}).get("quant_method")
    needed = [] if loads_without_hfcompress else ["hfcompress"]
    if BITSANDBYTES in (method, inner):
        return [*needed, BITSANDBYTES]
    return [*needed, COMPRESSED_TENSORS] if method == COMPRESSED_TENSORS else needed
