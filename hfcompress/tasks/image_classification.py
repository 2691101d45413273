"""A class for an image."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig, default_data_collator

from hfcompress.recipe import DataSpec
from hfcompress.tasks.base import Head, LazyRows, Task
from hfcompress.tasks.images import check_images, open_image, undecoded
from hfcompress.tasks.labels import label_names, numbered, refuse_single


class ImageClassification(Task):
    """Choose a class for an image, which the model's image processor resizes and normalizes; nothing is augmented."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    auto_processor = "AutoImageProcessor"
    metrics = ("accuracy", "macro_f1")
    head_name: ClassVar[str | None] = "ForImageClassification"
    pads: ClassVar[bool] = False

    def columns(self, spec: DataSpec) -> list[str]:
        """Return the columns of images and labels."""
        return [str(spec.image_column_name), str(spec.label_column)]

    def kept(self, rows: Dataset, spec: DataSpec) -> Dataset:
        """Return the rows with images as their bytes or paths, each of which has been looked at.

        Raises DataError, naming the row, for an image that cannot be read.
        """
        rows = undecoded(rows, str(spec.image_column_name))
        check_images(rows, str(spec.image_column_name))
        return rows

    def head(self, rows: Dataset, spec: DataSpec) -> Head:
        """Return the labels' names."""
        names = label_names(rows, str(spec.label_column))
        refuse_single(names)
        return Head(tuple(names))

    def check(self, config: PreTrainedConfig, processor: Any, spec: DataSpec) -> None:
        """Check nothing: image processors bring images to the model's size."""

    def encode(self, rows: Dataset, processor: Any, spec: DataSpec, labels: list[str] | None) -> LazyRows:
        """Return rows whose images are opened when they are used."""
        column = str(spec.image_column_name)
        numbers = None if labels is None else numbered(rows, str(spec.label_column), labels)
        numbered_rows = rows.select_columns([column])
        if numbers is not None:
            numbered_rows = numbered_rows.add_column("labels", numbers)

        def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
            image = open_image(row[column], column, index)
            pixels = processor(images=[image], return_tensors="np")["pixel_values"][0]
            label = {"labels": row["labels"]} if "labels" in row else {}
            return {"pixel_values": np.asarray(pixels, dtype=np.float32), **label}

        return LazyRows(numbered_rows, encode)

    def row_length(self, spec: DataSpec) -> None:
        """Return None: an image is no row of tokens."""

    def collator(self, processor: Any, spec: DataSpec, seed: int | None = None) -> Any:
        """Return transformers' default collator: all images have the same size."""
        return default_data_collator
