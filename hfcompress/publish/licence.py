"""The licence of the model that a card's model was made from."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HTTPError


def license_of(name: str, revision: str | None = None) -> str | None:
    """Return the licence that the metadata of a model's card name; None where there is no card that can be read.

    name: a folder or an id.  A Hub model's card is taken from the cache or the Hub; one that cannot be reached now is
    not known.
    """
    folder = Path(name).expanduser()
    card = folder / "README.md" if folder.is_dir() else _card_of(name, revision)
    if card is None or not card.is_file():
        return None
    named = getattr(metadata_of(card), "license", None)
    return named if isinstance(named, str) else None


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
