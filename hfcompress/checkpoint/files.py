"""The safetensors files of a checkpoint folder, checked for damage before anything reads them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Beside the weights: configs, tokenizers of every kind, chat templates, and code that comes with the model.
_DECIDES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library itself


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a safetensors file: tensor name to dtype, shape and ``data_offsets`` in bytes.

    Raises CheckpointError for an empty, truncated or padded file and for what is no safetensors file.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        if start.startswith(b"version h"):
            raise CheckpointError(
                f"{path.name} is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder."
            )
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
        if start[8:] != b"{" or length > _LARGEST_HEADER:
            state = "is empty" if size == 0 else f"is not a safetensors file ({size} bytes)"
            raise CheckpointError(f"{path.name} {state}. Copy or download it again.")
        text = start[8:] + file.read(length - 1)
    described = 8 + length
    if size >= described:
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            described += max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path.name} is damaged: its header cannot be read ({error}). Copy or download it again."
            ) from error
        if size == described:
            return header
    raise CheckpointError(
        f"{path.name} is damaged: its header describes {described} bytes, the file has {size}. "
        "Copy or download it again."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's mapping; raise CheckpointError when it is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is not a checkpoint folder.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a mapping.")
    return value


def weight_files(folder: str | Path) -> list[Path]:
    """Return a checkpoint's safetensors files: the shards that its index names, or the single file.

    Raises CheckpointError when the folder, a shard or every weight file is missing.  Pickles are never opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    if (folder / INDEX).is_file():
        shards = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            raise CheckpointError(
                f"{folder} lacks {', '.join(missing) or 'the weights'} named by {INDEX}. "
                "Copy or download the folder again."
            )
        return [folder / name for name in shards]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(path.name for path in folder.glob("*.bin") if "model" in path.name)
    if pickles:
        raise CheckpointError(
            f"{folder} holds {', '.join(pickles)}, a pickle, which is never opened. Convert it: "
            "load it with from_pretrained where you trust it, then save_pretrained."
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}.")


def deciding_files(folder: Path) -> list[Path]:
    """Return what decides how a checkpoint folder answers: weights, configs, tokenizer, chat templates and code.

    Raises CheckpointError as ``weight_files`` does.
    """
    beside = [path for path in folder.iterdir() if path.suffix in _DECIDES and not path.name.startswith(".")]
    templates = (folder / "additional_chat_templates").glob("*.jinja")
    return sorted({*weight_files(folder), *(path for path in (*beside, *templates) if path.is_file())})


def digest_of(folder: Path, files: Iterable[Path]) -> str:
    """Return a digest of files, of their names under ``folder`` and their content, read in pieces."""
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                content.update(piece)
        digest.update(f"{file.relative_to(folder).as_posix()}\0{content.hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """Return a digest of a checkpoint's weight files."""
    return digest_of(folder, weight_files(folder))
