"""The compression plugin for Hugging Face Transformers: prune, distil and quantize with Trainer and from_pretrained.

Importing it registers the loader of unevenly pruned checkpoints with Transformers, and does nothing else.
Names are imported when they are first used, so that ``import hfcompress`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

from hfcompress.loading.hook import register_with_transformers

_HOME_OF = {
    "PruneCallback": "hfcompress.pruning",
    "HeadPruneCallback": "hfcompress.pruning",
    "NeuronPruneCallback": "hfcompress.pruning",
    "Magnitude": "hfcompress.pruning.oneshot",
    "SparseGPT": "hfcompress.pruning.oneshot",
    "Wanda": "hfcompress.pruning.oneshot",
    "prune": "hfcompress.pruning.oneshot",
    "DistillationConfig": "hfcompress.distillation",
    "DistillationTrainer": "hfcompress.distillation",
    "OnPolicy": "hfcompress.distillation",
    "Seq2SeqDistillationConfig": "hfcompress.distillation",
    "Seq2SeqDistillationTrainer": "hfcompress.distillation",
    "CachedTeacher": "hfcompress.distillation",
    "cache_teacher": "hfcompress.distillation",
    "make_student": "hfcompress.distillation",
    "BitsAndBytes": "hfcompress.quantization",
    "GPTQ": "hfcompress.quantization",
    "RTN": "hfcompress.quantization",
    "Float8": "hfcompress.quantization",
    "AWQ": "hfcompress.quantization",
    "SmoothQuant": "hfcompress.quantization",
    "quantize": "hfcompress.quantization",
    "calibration_batches": "hfcompress.calibration",
    "QuantizeAwareCallback": "hfcompress.quantization",
    "compress": "hfcompress.pipeline",
    "load_recipe": "hfcompress.recipe",
    "Recipe": "hfcompress.recipe",
    "DropLayers": "hfcompress.structure",
    "ShrinkReport": "hfcompress.structure",
    "shrink": "hfcompress.structure",
    "drop_layers": "hfcompress.structure",
    "PrunedVocabulary": "hfcompress.vocabulary",
    "prune_vocabulary": "hfcompress.vocabulary",
    "inspect_checkpoint": "hfcompress.checkpoint",
    "save_compressed": "hfcompress.checkpoint",
    "to_dense": "hfcompress.checkpoint",
    "HFCompressConfig": "hfcompress.loading.quantizer",
    "from_config": "hfcompress.loading.record",
    "verify_checkpoint": "hfcompress.checkpoint",
    "Measurement": "hfcompress.evaluate",
    "measure": "hfcompress.evaluate",
    "ModelCardMixin": "hfcompress.publish",
    "push": "hfcompress.publish",
    "write_model_card": "hfcompress.describing",
    "write_report": "hfcompress.publish",
    "HFCompressError": "hfcompress.errors",
}
__all__ = sorted(_HOME_OF)


register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hfcompress' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
