"""Which files of a folder are the checkpoint, and as what others get to see them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers.dynamic_module_utils import get_relative_import_files

from hfcompress.checkpoint import weight_files
from hfcompress.checkpoint.atomic import MARKER
from hfcompress.checkpoint.files import INDEX, read_header
from hfcompress.errors import CheckpointError
from hfcompress.publish.card import CARD, PICTURES, is_as_written, render_folder
from hfcompress.publish.facts import FILE_NAME
from hfcompress.publish.sharing import shared, shared_recipe, shared_text

# What is told of one model, beside its card.
FACTS = frozenset({FILE_NAME, "recipe.yaml", "quantization_report.json", "pruning_report.json",
                   ".eval_results/hfcompress.yaml", *(file for file, _ in PICTURES.values())})  # fmt: skip
_OURS = {MARKER, CARD, *FACTS}
_CONFIGS = {"config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json",
            "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
            "feature_extractor_config.json"}  # fmt: skip
# Vocabularies have names of their own in some tokenizers; theirs are asked for.
_TOKENIZERS = {"tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
               "merges.txt", "normalizer.json", "chat_template.jinja", "chat_template.json"}  # fmt: skip
_VOCABULARIES = (".model", ".spm", ".tiktoken")
_FOLDERS = {".eval_results", "additional_chat_templates"}
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub: for each name a file, or other content than the file's.  left_out: names that do not."""

    files: dict[str, Path | bytes]
    left_out: tuple[str, ...]


def choose_files(folder: Path, repo_id: str) -> Upload:
    """Choose a checkpoint's own files: weights, configs, tokenizer, code, card and facts.

    They are known by name, or asked for by a config.  The rest (optimizer states, caches, notes, credentials) is left
    out, whatever it is.  Paths of this machine are cut out of the facts, and the card's loading example names the
    repository unless somebody edited the card.
    Raises CheckpointError for a damaged or missing weight file, and for an access token in a file.
    """
    weights = weight_files(folder)
    for file in weights:
        read_header(file)
    names = {file.name for file in weights} | {INDEX} | _OURS | _CONFIGS | _TOKENIZERS | _named_by_configs(folder)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in names or _is_told_by_place_or_kind(path, name):
            files[name] = path
        else:
            left_out.append(name)
    if len(weights) == 1:
        files.pop(INDEX, None)
    files.update(_for_others(folder, repo_id))
    _refuse_tokens({name: content for name, content in files.items() if not name.endswith(".safetensors")})
    return Upload(files, tuple(left_out))


def _is_told_by_place_or_kind(path: Path, name: str) -> bool:
    above = name.rpartition("/")[0]
    if above:
        return above in _FOLDERS and path.suffix in (".yaml", ".jinja")
    return path.suffix in _VOCABULARIES or path.name.startswith(("LICENSE", "NOTICE"))


def _named_by_configs(folder: Path) -> set[str]:
    """Return the files that configs ask for: a tokenizer's vocabularies, and modules with what they import."""
    found: set[str] = set()
    for file in (folder / name for name in _CONFIGS):
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        tokenizer = getattr(transformers, str(config.get("tokenizer_class")), None)
        found |= set(getattr(tokenizer, "vocab_files_names", {}).values())
        for module in _modules_of(config.get("auto_map") or {}):
            if (folder / module).is_file():
                used = get_relative_import_files(str(folder / module))
                found |= {module, *(Path(one).relative_to(folder).as_posix() for one in used)}
    return found


def _modules_of(auto_map: dict[str, Any]) -> set[str]:
    """Return the files of an ``auto_map``: each value is ``module.Class``, or several, as a tokenizer's are."""
    told = [one for value in auto_map.values() for one in (value if isinstance(value, list) else [value]) if one]
    return {f"{one.rpartition('.')[0]}.py" for one in told if "--" not in one}


def _for_others(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Return what differs from the folder's files: facts and recipe without local paths, the card with the id."""
    found: dict[str, Path | bytes] = {}
    facts, recipe, card = folder / FILE_NAME, folder / "recipe.yaml", folder / CARD
    if facts.is_file():
        values: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        found[FILE_NAME] = (json.dumps(shared_facts(values), indent=2) + "\n").encode()
        if card.is_file() and is_as_written(folder):
            found[CARD] = render_folder(folder, repo_id).encode()
    if recipe.is_file():
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        found["recipe.yaml"] = yaml.safe_dump(shared_recipe(values), sort_keys=False, allow_unicode=True).encode()
    return found


def shared_facts(values: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``measurements.json`` without paths of one machine."""
    named: dict[str, Any] = {
        name: shared(values[name]) for name in ("base_model", "data", "training", "local") if name in values
    }
    recipe = values.get("recipe")
    if recipe:
        named["recipe"] = shared_recipe(recipe)
    # Lines of text, in which several paths may stand.
    if named.get("training"):
        named["training"]["options"] = _shared_lines(values["training"].get("options"))
    if values.get("inputs"):
        named["inputs"] = _shared_lines(values["inputs"])
    named["stages"] = [{**stage, **_shared_lines({"summary": stage.get("summary")})} for stage in values["stages"]]
    return {**values, **named}


def _shared_lines(values: dict[str, Any] | None) -> dict[str, Any]:
    return {key: shared_text(value) if isinstance(value, str) else value for key, value in (values or {}).items()}


def _refuse_tokens(files: dict[str, Path | bytes]) -> None:
    for name, content in files.items():
        if _TOKEN.search(content if isinstance(content, bytes) else content.read_bytes()):
            raise CheckpointError(
                f"{name} holds what looks like a Hugging Face access token. Nothing was uploaded; take it out, and "
                "revoke the token if others have seen it."
            )
