"""Gradual pruning of attention heads and feed-forward neurons as Trainer callbacks."""

from __future__ import annotations

import fnmatch
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from hfcompress.callbacks import refuse_split_weights, trainer_of
from hfcompress.errors import ModelError
from hfcompress.pruning import checks
from hfcompress.pruning.criteria import Criterion
from hfcompress.pruning.gradual import GradualPruneCallback, Weights
from hfcompress.pruning.inputs import Watch
from hfcompress.pruning.masks import Masks
from hfcompress.pruning.units.bundles import (
    Bundle,
    close_lowest,
    head_bundles,
    neuron_bundles,
    refuse_impossible,
    scopes,
)
from hfcompress.pruning.units.class_moments import first_row, refuse_no_classes
from hfcompress.pruning.units.criteria import UnitMutualInformation, unit_criterion_of
from hfcompress.pruning.units.options import HeadPruneOptions, NeuronPruneOptions, UnitPruneOptions
from hfcompress.pruning.units.trial import one_of_each_kind
from hfcompress.pruning.units.watch import unit_watch
from hfcompress.structure import AttentionSite, FfnSite, Part, closed_units, find_attention, find_ffn
from hfcompress.structure.resize import input_dim, refuse_uncuttable
from hfcompress.structure.trial import refuse_unremovable

Site = TypeVar("Site", AttentionSite, FfnSite)


class UnitPruneCallback(GradualPruneCallback, Generic[Site]):
    """Close heads or neurons by zeros in the columns of the linear layer that reads them.

    Their masks have one entry per column, and lie as the weight's inputs do.
    """

    options: UnitPruneOptions
    _sites: Sequence[Site] = ()
    _bundles: Sequence[Bundle] = ()
    _readers: dict[str, Part]
    _input_dims: dict[str, int]

    @abstractmethod
    def _search(self, model: PreTrainedModel) -> list[Site]:
        """Return every site of the model."""

    @abstractmethod
    def _bundled(self, sites: Sequence[Site], modules: dict[str, nn.Module]) -> list[Bundle]:
        """Return the units that must go together."""

    @abstractmethod
    def _parts(self, site: Site) -> tuple[Part, ...]:
        """Return what is cut when units go, the layer that reads them first."""

    def _find(self, model: nn.Module) -> Weights:
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"{type(self).__name__} needs a Transformers model, not {type(model).__name__}.")
        refuse_split_weights(model, type(self).__name__)
        self._sites = self._without_excluded(self._search(model))
        refuse_uncuttable(model, {part.name for site in self._sites for part in self._parts(site)})
        parts = {site.name: self._parts(site)[0] for site in self._sites}
        modules = {part.name: model.get_submodule(part.name) for part in parts.values()}
        self._bundles = self._bundled(self._sites, modules)
        self._readers = {f"{part.name}.weight": part for part in parts.values()}
        self._input_dims = {f"{name}.weight": input_dim(module) for name, module in modules.items()}
        return {name: model.get_parameter(name) for name in self._readers}

    def _without_excluded(self, sites: list[Site]) -> list[Site]:
        """Leave out what the options exclude, and what must lose the same heads or as many of them as that."""
        kept = [site for site in sites if not _matches(site, self.options.exclude)]
        gone = {tie for site in sites if _matches(site, self.options.exclude) for tie in _ties(site)}
        kept = [site for site in kept if gone.isdisjoint(_ties(site))]
        if not kept:
            names = ", ".join(site.name for site in sites[:3])
            raise ModelError(f"exclude={list(self.options.exclude)} leaves no {self.what} to prune. Found: {names}.")
        return kept

    def _check(
        self, args: TrainingArguments, model: nn.Module, weights: Weights, criterion: Criterion, data: Any
    ) -> None:
        super()._check(args, model, weights, criterion, data)
        if isinstance(criterion, UnitMutualInformation):
            trainer = trainer_of(self)
            has_own_loss = trainer is not None and trainer.compute_loss_func is not None
            refuse_no_classes(model, args, first_row(data), has_own_loss)
        frozen = [name for name, weight in weights.items() if not weight.requires_grad]
        if frozen:
            raise ModelError(
                f"{type(self).__name__} closes {self.what} by zeros in {checks.some(frozen)}, which "
                "requires_grad=False freezes. Unfreeze them, or exclude their layers."
            )
        refuse_impossible(self._bundles, self.options.sparsity, self.options.scope, self.what)
        self._refuse_unremovable(model)

    def _refuse_unremovable(self, model: nn.Module) -> None:
        assert isinstance(model, PreTrainedModel)
        closed = one_of_each_kind(self._bundles, self._sites)
        try:
            refuse_unremovable(model, [site for site in self._sites if site.name in closed], closed)
        except ModelError as error:
            raise ModelError(
                f"{type(self).__name__} closes only {self.what} that shrink can remove, and here it cannot: {error} "
                f"Exclude these layers, or prune something else than {self.what}."
            ) from error

    def _criterion(self, seed: int, model: nn.Module) -> Criterion:
        return unit_criterion_of(self.options.criterion, seed, getattr(model.config, "num_labels", 0))

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        features = self._readers[name].features
        columns = tensor if self._input_dims[name] == 0 else tensor.t()
        if torch.equal(features.flatten(), torch.arange(len(columns))):
            return columns.unflatten(0, features.shape)
        return columns[features.to(tensor.device)]

    def _watching(self, model: nn.Module, weights: Weights, criterion: Criterion) -> Watch:
        assert isinstance(model, PreTrainedModel)
        features = {name: part.features for name, part in self._readers.items()}
        return unit_watch(criterion, model, weights, features, self._attention())

    def _attention(self) -> dict[str, AttentionSite]:
        """Return the attentions by the weight that reads their heads, where it is heads that are pruned."""
        return {n: site for n, site in zip(self._readers, self._sites) if isinstance(site, AttentionSite)}

    def _closed(self, model: nn.Module) -> list[Tensor]:
        return [closed_units(model, part) for part in self._readers.values()]

    def _masks_from_zeros(self, model: nn.Module, weights: Weights) -> Masks:
        return self._masks_of(self._closed(model), weights)

    def _masks_of(self, closed: Iterable[Tensor], weights: Weights) -> Masks:
        masks = {}
        for (name, part), units in zip(self._readers.items(), closed):
            dim, weight = self._input_dims[name], weights[name]
            mask = torch.ones(weight.shape[dim], dtype=torch.bool)
            mask[part.features[units].flatten()] = False
            masks[name] = mask.unsqueeze(1 - dim).to(weight.device)
        return masks

    def _prune(self, weights: Weights, sparsity: float) -> None:
        assert self._evidence is not None
        scores, closed, unseen = [], [], []
        for name, part in self._readers.items():
            is_unseen, count = name in self._evidence.unseen, len(part.features)
            one = torch.zeros(count) if is_unseen else self._evidence.scores(name, weights[name]).cpu()
            scores.append(one / one.norm().clamp_min(1e-30) if self.options.normalize else one)
            closed.append(~self._masks[name].flatten().cpu()[part.features].any(1))
            unseen.append(torch.full((count,), is_unseen))
        sizes = [len(one) for one in closed]
        chosen = close_lowest(
            self._bundles, torch.cat(scores), torch.cat(closed), sparsity, self.options.scope, torch.cat(unseen)
        )
        self._masks.update(self._masks_of(chosen.split(sizes), weights))

    def _reached(self, model: nn.Module, weights: Weights) -> tuple[float, dict[str, float]]:
        closed = self._closed(model)
        layers: dict[str, list[Tensor]] = {}
        for site, one in zip(self._sites, closed):
            layers.setdefault(_layer_name(site), []).append(one)
        return _share(closed), {layer: _share(found) for layer, found in layers.items()}

    def _grain(self, weights: Weights) -> float:
        steps = sum(max(bundle.size for bundle in group) for group in scopes(self._bundles, self.options.scope))
        return steps / sum(bundle.units.numel() for bundle in self._bundles)


class HeadPruneCallback(UnitPruneCallback[AttentionSite]):
    """Close attention heads gradually while the Trainer trains (Michel et al., arXiv 1905.10650).

    ``Trainer(model, ..., callbacks=[HeadPruneCallback(sparsity=0.5)]).train()`` closes half of the query heads, and
    ``hfcompress.shrink(model)`` removes them afterwards: until then they are zeros in a model of its old shape.
    See ``HeadPruneOptions`` for all options.  Heads are found by running the model once, so no architecture needs a
    rule; only what ``shrink`` can remove is closed, so counts are rounded down to what the architecture allows.
    A closed head is a zero block of columns of the output projection, kept exactly zero, so a run resumes from any
    checkpoint with no special flag; heads that are closed when training begins stay closed and count.
    Every evaluation, and the end, logs ``heads_pruned`` and ``heads_pruned/LAYER``.  Works beside
    ``NeuronPruneCallback``; beside ``PruneCallback``, too, for which the zeros count.
    Raises HFCompressError for a wrong option, and before the first step for a model it cannot prune rightly.
    """

    options_type = HeadPruneOptions
    log_name: ClassVar[str] = "heads_pruned"
    scored: ClassVar[str] = "head "
    what: ClassVar[str] = "heads"
    options: HeadPruneOptions

    def _search(self, model: PreTrainedModel) -> list[AttentionSite]:
        return find_attention(model)

    def _bundled(self, sites: Sequence[AttentionSite], modules: dict[str, nn.Module]) -> list[Bundle]:
        return head_bundles(sites, modules, self.options.grouped)

    def _parts(self, site: AttentionSite) -> tuple[Part, ...]:
        return (site.output, site.query, site.key, site.value, *site.extra)


class NeuronPruneCallback(UnitPruneCallback[FfnSite]):
    """Close feed-forward neurons gradually while the Trainer trains (Molchanov et al., arXiv 1611.06440).

    ``Trainer(model, ..., callbacks=[NeuronPruneCallback(sparsity=0.5)]).train()`` closes half of the neurons, and
    ``hfcompress.shrink(model)`` removes them afterwards: until then they are zeros in a model of its old shape.
    See ``NeuronPruneOptions`` for all options.  A closed neuron is a zero column of the block's output projection;
    all that ``HeadPruneCallback`` says of heads holds for neurons.
    Every evaluation, and the end, logs ``neurons_pruned`` and ``neurons_pruned/LAYER``.
    Raises HFCompressError for a wrong option, and before the first step for a model it cannot prune rightly.
    """

    options_type = NeuronPruneOptions
    log_name: ClassVar[str] = "neurons_pruned"
    scored: ClassVar[str] = "neuron "
    what: ClassVar[str] = "neurons"
    options: NeuronPruneOptions

    def _search(self, model: PreTrainedModel) -> list[FfnSite]:
        return find_ffn(model)

    def _bundled(self, sites: Sequence[FfnSite], modules: dict[str, nn.Module]) -> list[Bundle]:
        return neuron_bundles(sites, modules)

    def _parts(self, site: FfnSite) -> tuple[Part, ...]:
        return (site.down, *site.ups)


def _matches(site: AttentionSite | FfnSite, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, one) for name in (site.name, _layer_name(site)) for one in patterns)


def _layer_name(site: AttentionSite | FfnSite) -> str:
    return site.name if site.layer is None else f"{site.layer[0]}.{site.layer[1]}"


def _share(closed: Sequence[Tensor]) -> float:
    """Return which share of all units is closed; 0 where there are none, as in a layer that lost all its neurons."""
    return sum(int(one.sum()) for one in closed) / max(1, sum(len(one) for one in closed))


def _ties(site: AttentionSite | FfnSite) -> set[str]:
    """Return what two sites have in common that must lose the same heads, or the same number of them."""
    if isinstance(site, FfnSite):
        return set()
    return {site.same_heads_as or site.name, *(["head count"] if site.config_counts else [])}
