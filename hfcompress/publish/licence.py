"""The licence of the model that a card's model was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, constants, hf_hub_download
from huggingface_hub.errors import HTTPError


def licence_facts(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return what the metadata of a model's card say of its licence, as ``Facts`` has it of the base model.

    The licence is None where there is no card that can be read.  name: a folder or an id.  A Hub model's card is taken
    from the cache or the Hub; one that cannot be reached now is not known.
    """
    folder = Path(name).expanduser()
    card = folder / "README.md" if folder.is_dir() else _card_of(name, revision)
    said = metadata_of(card) if card is not None and card.is_file() else None
    named = getattr(said, "license", None)
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(named, str):
        return {"base_model_license": None}
    terms = {"license_name": getattr(said, "license_name", None), "license_link": getattr(said, "license_link", None)}
    if isinstance(terms["license_link"], str) and "://" not in terms["license_link"]:  # a file beside that card
        page = f"{constants.ENDPOINT}/{name}/blob/{revision or 'main'}/{terms['license_link']}"
        terms["license_link"] = None if folder.is_dir() else page
    told = {key: text for key, text in terms.items() if isinstance(text, str)}
    return {"base_model_license": named, "base_model_license_terms": told or None}


def metadata_of(card: Path) -> ModelCardData | None:
    """Return what the head of a card says; None where it cannot be read, which is for its owner to mend."""
    try:
        return ModelCard.load(card).data
    except Exception:  # YAML, its text's encoding and the Hub's own classes raise many kinds
        return None


def _card_of(name: str, revision: str | None) -> Path | None:
    """Return the cached or downloaded card of a Hub model, None where there is none or the Hub is out of reach."""
    try:
        return Path(hf_hub_download(name, "README.md", revision=revision))
    except (OSError, ValueError, HTTPError):  # what the Hub answered is an OSError, and a broken connection is not
        return None
