"""A Trainer that writes our card in the place of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, Trainer

from hfcompress.checkpoint.atomic import write_text
from hfcompress.errors import HFCompressError
from hfcompress.evaluated import OTHER_DATA, digest_of_model, note_evaluation
from hfcompress.publish.card import CARD, write_model_card
from hfcompress.publish.facts import FILE_NAME
from hfcompress.publish.licence import licence_facts, metadata_of
from hfcompress.publish.sharing import local_names
from hfcompress.publish.trained import facts_of_trainer, is_sharded

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ModelCardMixin(_Base):
    """Gives a Trainer our model card: ``class MyTrainer(hfcompress.ModelCardMixin, Trainer)``.

    ``create_model_card``, which ``push_to_hub`` calls, then writes the card and ``measurements.json`` into the output
    folder: what was trained how, and what the Trainer measured on the weights as they are now.
    """

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does, and write into its log which weights and which rows the metrics are of."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, Mapping)
        if not several:  # each of several came here alone
            note = note_evaluation(self, metrics)
            if note and not self._is_own(eval_dataset):
                note[OTHER_DATA] = True
        return metrics

    def _is_own(self, data: Any) -> bool:
        """Whether data given to ``evaluate`` are the Trainer's own ``eval_dataset``, or one of several."""
        own = self.eval_dataset
        known = own.values() if isinstance(own, Mapping) else [own]
        return data is None or isinstance(data, str) or any(data is one for one in known)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as the Trainer does, and remember where sharded weights went: a card cannot save them again."""
        without_weights = state_dict is not None and not state_dict  # as DeepSpeed's are that nothing gathers
        super()._save(output_dir, state_dict)
        if is_sharded(self) and self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir)).absolute()
            self._saved = None if without_weights else (folder, digest_of_model(self.model))

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md and measurements.json into the output folder, from this process if it is the first.

        The model is saved there first: sizes on a card are those of files, and what lies there may be of an earlier
        training.  A model that is no PreTrainedModel, as one with adapters is not, has the Trainer's own card.
        Raises HFCompressError where FSDP or DeepSpeed shard the weights and ``save_model`` was not called before, in
        every process.
        """
        if not self.is_world_process_zero():
            return
        if not isinstance(self.accelerator.unwrap_model(self.model), PreTrainedModel):
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        folder = Path(str(self.args.output_dir))
        if not is_sharded(self):
            self.save_model(_internal_call=True)
        elif getattr(self, "_saved", None) != (folder.absolute(), digest_of_model(self.model)):
            # Saving a sharded model takes all processes, and only this one is here.
            raise HFCompressError(
                f"A card of {folder} would tell of other weights than those that were trained: they are sharded, and "
                "were not saved there as they are now. Call trainer.save_model() in every process before, as "
                "push_to_hub does, with whole weights: state_dict_type FULL_STATE_DICT of FSDP, or DeepSpeed's "
                "stage3_gather_16bit_weights_on_model_save."
            )
        data = _data_told(_listed(dataset), _listed(dataset_tags), _listed(dataset_args))
        facts = facts_of_trainer(self, folder, name=model_name, data=data)
        if finetuned_from:
            facts |= {"base_model": finetuned_from, "local": [], **licence_facts(finetuned_from)}
        if license:
            facts |= {"base_model_license": license, "base_model_license_terms": None}
        facts["training"] |= {
            "tags": [*facts["training"]["tags"], *_listed(tags), *(_tags_there(folder) if tags else ())],
            "language": language,
            "tasks": _listed(tasks),
            "datasets": _listed(dataset_tags) or _listed(dataset),
        }
        facts["local"] += local_names([finetuned_from, *_listed(dataset_tags), *_listed(dataset)])
        write_text(folder / FILE_NAME, json.dumps(facts, indent=2, allow_nan=False) + "\n")
        write_model_card(folder, getattr(self, "hub_model_id", None) or self.args.hub_model_id)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _data_told(names: list[str], ids: list[str], configurations: list[str]) -> dict[str, Any] | None:
    """Return what the card says of the data: of the first, which the Trainer's ``eval_dataset`` is of."""
    found = {"id": next(iter(ids or names), None), "name": next(iter(configurations), None),
             "called": next(iter(names), None) if ids else None}  # fmt: skip
    return {key: value for key, value in found.items() if value} or None


def _tags_there(folder: Path) -> list[str]:
    """Return the tags of a card that lies in the folder: tags that are given now are added to them."""
    file = folder / CARD
    return list(getattr(metadata_of(file), "tags", None) or ()) if file.is_file() else []
