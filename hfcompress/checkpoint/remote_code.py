"""Opt-in: turn an uneven checkpoint into one that carries the few lines of Python which resize the library's class.

It loads without hfcompress, but only for readers who pass ``trust_remote_code=True``.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from transformers import PreTrainedModel

from hfcompress.checkpoint.verify import auto_class_of
from hfcompress.errors import ModelError
from hfcompress.packed import packed_layers
from hfcompress.structure import shapes as resizing

MODULE, RECORD = "modeling_uneven", "uneven_shapes"
_TEMPLATE = '''"""{name} with other numbers of heads and neurons in each layer.  Written by hfcompress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import {name}

ModelError = ValueError
_SIZES = {sizes}


{functions}


class Uneven{name}({name}):
    """The library's class, resized as config.json's ``{record}`` says."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for name, values in config.{record}.items():
            _resize_module_(self.get_submodule(name), values)

    def _get_static_cache_init_shape(self) -> None:
        """Let ``generate`` make static caches at the first call: layers have other numbers of heads."""
'''


def refuse_remote_code(model: PreTrainedModel) -> None:
    """Raise ModelError for models that a few lines of Python cannot rebuild."""
    if packed_layers(model):
        raise ModelError("A checkpoint with remote code cannot be packed; save it with uneven='loader'.")
    if type(model).__module__.split(".")[0] != "transformers":
        raise ModelError(f"{type(model).__name__} is not a class of Transformers, which the remote code could resize.")


def remote_class_of(model: PreTrainedModel) -> str:
    """Return the name of the Auto class that loads the model with its remote code."""
    auto = auto_class_of(model)
    return auto if auto.startswith("Auto") else "AutoModel"


def add_remote_code(folder: Path, model: PreTrainedModel) -> None:
    """Write the module beside the weights, and name it in ``config.json`` instead of our loader."""
    name = type(model).__name__
    needed = (resizing._size_names, resizing._resize_module_, resizing._reshape_)
    functions = "\n\n".join(inspect.getsource(function) for function in needed).rstrip()
    text = _TEMPLATE.format(name=name, sizes=repr(resizing._SIZES), functions=functions, record=RECORD)
    (folder / f"{MODULE}.py").write_text(text, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[RECORD] = config.pop("quantization_config")["modules"]
    config["auto_map"] = {remote_class_of(model): f"{MODULE}.Uneven{name}"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
