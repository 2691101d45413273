"""What a model is worth: task metrics, size, speed and memory, put together as a ``Measurement``."""

from __future__ import annotations

from hfcompress.evaluate.hits import pack_hits, paired_bootstrap, unpack_hits
from hfcompress.evaluate.latency import Latency
from hfcompress.evaluate.machine import describe_machine
from hfcompress.evaluate.measurement import Measurement, measure
from hfcompress.evaluate.memory import peak_memory_bytes
from hfcompress.evaluate.metrics import METRICS, load_metric
from hfcompress.evaluate.quality import evaluate_model, refuse_unreadable
from hfcompress.evaluate.readers import Reader
from hfcompress.evaluate.size import StoredSize, model_size
from hfcompress.evaluate.speed import decode_speed, forward_speed

__all__ = [
    "METRICS",
    "Latency",
    "Measurement",
    "Reader",
    "StoredSize",
    "decode_speed",
    "describe_machine",
    "evaluate_model",
    "forward_speed",
    "load_metric",
    "measure",
    "model_size",
    "pack_hits",
    "paired_bootstrap",
    "peak_memory_bytes",
    "refuse_unreadable",
    "unpack_hits",
]
