"""Refuses rows that are longer than a model takes."""

from __future__ import annotations

from hfcompress.errors import RecipeError


def refuse_longer(model: str, limit: int | None, option: str, length: int) -> None:
    """Raise RecipeError when an option asks for more tokens than the model, named for the message, takes at most."""
    if limit is not None and length > limit:
        raise RecipeError(
            f"{option} is {length} tokens, but '{model}' takes at most {limit}. Use {limit} or less there."
        )
