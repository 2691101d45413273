"""What is written to a checkpoint folder, how it is read back, and what it holds."""

from __future__ import annotations

from hfcompress.checkpoint.dense import to_dense
from hfcompress.checkpoint.files import read_header, weight_files
from hfcompress.checkpoint.inspect import CheckpointSummary, inspect_checkpoint
from hfcompress.checkpoint.save import SavedCheckpoint, refuse_nan, save_compressed
from hfcompress.checkpoint.verify import Probe, Verification, verify_checkpoint

__all__ = [
    "CheckpointSummary",
    "Probe",
    "SavedCheckpoint",
    "Verification",
    "inspect_checkpoint",
    "read_header",
    "refuse_nan",
    "save_compressed",
    "to_dense",
    "verify_checkpoint",
    "weight_files",
]
