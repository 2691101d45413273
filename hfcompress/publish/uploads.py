"""Which files of a folder are the checkpoint, and as what others get to see them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfcompress.checkpoint import weight_files
from hfcompress.checkpoint.atomic import MARKER
from hfcompress.checkpoint.files import INDEX, read_header
from hfcompress.errors import CheckpointError
from hfcompress.publish.card import CARD, PICTURES, render_folder
from hfcompress.publish.facts import FILE_NAME
from hfcompress.publish.sharing import shared, shared_recipe

_TEXT = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".md", ".yaml")
_OURS = {MARKER, FILE_NAME, "recipe.yaml", CARD, *(file for file, _ in PICTURES.values())}
# What Transformers writes beside a model while it trains.
_OF_TRAINING = {"trainer_state.json", "hfcompress_masks.json"}
_FOLDERS = {".eval_results", "additional_chat_templates"}
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub: for each name a file, or other content than the file's.  left_out: names that do not."""

    files: dict[str, Path | bytes]
    left_out: tuple[str, ...]


def choose_files(folder: Path, repo_id: str) -> Upload:
    """Choose a checkpoint's own files: weights, configs, tokenizer, code, card and facts.

    The rest (optimizer states, caches, pickles, Trainer's checkpoints) is left out.  Paths of this machine are cut out
    of the facts, and the card's loading example names the repository unless somebody edited the card.
    Raises CheckpointError for a damaged or missing weight file, and for an access token in a file.
    """
    weights = weight_files(folder)
    for file in weights:
        read_header(file)
    names = {file.name for file in weights}
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in names or _belongs(path, name):
            files[name] = path
        else:
            left_out.append(name)
    if len(weights) == 1:
        files.pop(INDEX, None)
    files.update(_for_others(folder, repo_id))
    _refuse_tokens({name: content for name, content in files.items() if name not in names})
    return Upload(files, tuple(left_out))


def _belongs(path: Path, name: str) -> bool:
    above = name.rpartition("/")[0]
    if above:
        return above in _FOLDERS and path.suffix in (".yaml", ".jinja")
    if path.name.startswith(".") or path.name in _OF_TRAINING or path.suffix == ".safetensors":
        return False
    return path.name in _OURS or path.suffix in _TEXT or path.name.startswith("LICENSE")


def _for_others(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Return what differs from the folder's files: facts and recipe without local paths, the card with the id."""
    found: dict[str, Path | bytes] = {}
    facts, recipe, card = folder / FILE_NAME, folder / "recipe.yaml", folder / CARD
    if facts.is_file():
        values: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        found[FILE_NAME] = (json.dumps(shared_facts(values), indent=2) + "\n").encode()
        if card.is_file() and card.read_text(encoding="utf-8") == render_folder(folder):
            found[CARD] = render_folder(folder, repo_id).encode()
    if recipe.is_file():
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        found["recipe.yaml"] = yaml.safe_dump(shared_recipe(values), sort_keys=False, allow_unicode=True).encode()
    return found


def shared_facts(values: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``measurements.json`` without paths of one machine."""
    named: dict[str, Any] = {
        name: shared(values[name]) for name in ("base_model", "data", "training") if name in values
    }
    recipe = values.get("recipe")
    if recipe:
        named["recipe"] = shared_recipe(recipe)
    return {**values, **named}


def _refuse_tokens(files: dict[str, Path | bytes]) -> None:
    for name, content in files.items():
        if _TOKEN.search(content if isinstance(content, bytes) else content.read_bytes()):
            raise CheckpointError(
                f"{name} holds what looks like a Hugging Face access token. Nothing was uploaded; take it out, and "
                "revoke the token if others have seen it."
            )
