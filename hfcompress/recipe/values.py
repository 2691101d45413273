"""Types of values that several sections of a recipe share."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

FROZEN = ConfigDict(extra="forbid")
AtLeastOne = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
