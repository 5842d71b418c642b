"""Find a subspace: load it from a folder if its inputs are unchanged, otherwise build and save it."""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sails_align.core.artifacts import content_hash, package_versions, read_header
from sails_align.core.distributed import from_main, n_processes, process_index
from sails_align.core.earlier import differences, holds_other
from sails_align.core.errors import InputError
from sails_align.core.log import is_main, say
from sails_align.core.options import all_but
from sails_align.data.pairs import fingerprint
from sails_align.models.load import check_whole, load_causal_lm, load_truncated, no_load_report, not_partitioned
from sails_align.models.spec import is_same_model
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.attribution import EffectFitter, attribute
from sails_align.subspace.basis import Subspace
from sails_align.subspace.forward import discover
from sails_align.subspace.inputs import (
    DiscoveryData,
    DiscoveryModel,
    contrast_data,
    margin_data,
    needs_moments,
    suited_to_data,
)
from sails_align.subspace.methods import MethodInputs, SubspaceMethod, check_rank
from sails_align.subspace.options import BY_EFFECT, NOT_OF_SUBSPACE, DiscoveryOptions
from sails_align.subspace.selection import FeatureFitter
from sails_align.subspace.separation import BENIGN, benign_covariance, onset_of, separation
from sails_align.subspace.statistics import ActivationFitter, TokenStats, contrasts_of

logger = logging.getLogger(__name__)


def find_subspace(
    model: DiscoveryModel,
    data: DiscoveryData,
    saes: SAESource | SAESet,
    method: SubspaceMethod,
    options: DiscoveryOptions,
    folder: Path | None = None,
    *,
    overwrite: bool = True,
) -> Subspace:
    """Find the subspace of a model with a method.

    It is saved to `folder`, and loaded from there if its input hash is the same. SAEs are loaded only if needed. Raises
    `InputError` if the SAEs cannot be had or do not fit the model, the data lacks a side, or without `overwrite` the
    folder holds a subspace of other inputs.
    """
    check_rank(options.rank, model.d_model)
    options = suited_to_data(options, data)
    deciding = {"init": method.name, **all_but(NOT_OF_SUBSPACE, options)}
    inputs = {**deciding, **_inputs(model, data, saes, options)}
    input_hash = content_hash(inputs)
    # The folder need not be one that all machines see: the main process reads and writes it for all.
    cached = None if folder is None else from_main(lambda: _cached(folder, input_hash))
    if cached is None and folder is not None and not overwrite:
        from_main(lambda: _refuse_other(folder, deciding, inputs))
    if cached is not None:
        return cached
    discovery = _Discovery(model, data, _loaded(saes, model, options), method, options)
    stats = discovery.statistics(with_moments=inputs["moments"])
    about = {
        "model": model.identity,
        "data": inputs["data"],
        "dropped_rows": data.dropped,
        "options": deciding,
        "saes": discovery.about_saes(),
        "versions": package_versions(),
    }

    def build_and_save() -> Subspace:
        subspace = discovery.build(stats, about)
        if folder is not None:
            subspace.save(folder, input_hash)
        return subspace

    return from_main(build_and_save)


def _inputs(
    model: DiscoveryModel, data: DiscoveryData, saes: SAESource | SAESet, options: DiscoveryOptions
) -> dict[str, Any]:
    """Return what a subspace depends on besides the options, as JSON values."""
    return {
        "moments": needs_moments(options, data),
        "dtype": model.dtype,
        "model": model.identity,
        "saes": saes.identity(),
        "chat_template": content_hash(data.tokenizer.chat_template),
        "data": [fingerprint(rows) for rows in (data.pairs, data.harmless) if rows is not None],
    }


def load_subspace(path: Path, model: DiscoveryModel, method: str, *, allow_mismatch: bool = False) -> Subspace:
    """Load a saved subspace; raise `InputError` if it is damaged, of another model, or found by another method."""
    subspace = Subspace.load(path)
    if subspace.d_model != model.d_model:
        raise InputError(
            f"the subspace {path} is of a model with d_model {subspace.d_model}, but "
            f"{model.path} has {model.d_model}; give one that was found in this model"
        )
    found_in = subspace.provenance.get("model")
    if not is_same_model(found_in, model.identity) and not allow_mismatch:
        raise InputError(
            f"the subspace {path} was found in another model ({(found_in or {}).get('name')}) than "
            f"{model.name};\ngive one of this model, or --sae_allow_mismatch true if they are close relatives"
        )
    if (found_by := subspace.provenance.get("method", method)) != method:
        raise InputError(f"the subspace {path} was made by {found_by}, but init is {method}; give --init {found_by}")
    return subspace


def _cached(folder: Path, input_hash: str) -> Subspace | None:
    header = read_header(folder, "subspace")
    if header is None or header["input_hash"] != input_hash:
        return None
    say(f"the subspace in {folder} was made from the same inputs: discovery is skipped")
    return Subspace.load(folder)


def _refuse_other(folder: Path, deciding: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse to replace a subspace that was made from other inputs, with an `InputError`."""
    header = read_header(folder, "subspace")
    if header is not None:
        identity = {"options": deciding, **{name: inputs[name] for name in ("model", "data")}}
        found = differences(identity, header["provenance"]) or ["SAEs or chat template"]
        raise holds_other(f"{folder} holds another subspace", found)


def _loaded(saes: SAESource | SAESet, model: DiscoveryModel, options: DiscoveryOptions) -> SAESet:
    """Return the SAEs, in memory (with `sae_placement: all`) or ready to be loaded."""
    if isinstance(saes, SAESource):
        keep = options.sae_placement == "all"
        saes = SAESet.load(saes, keep=keep, model_config=model.config, model_name=model.name, device=model.device)
    smallest = min(saes.infos.values(), key=lambda info: info.d_sae, default=None)
    if smallest is not None and options.top_k > smallest.d_sae:
        raise InputError(
            f"top_k is {options.top_k}, but the SAE {smallest.source} has {smallest.d_sae} latents: choose at most that"
        )
    return saes


@dataclass(frozen=True)
class Pass:
    """Of one process: layers whose SAEs are in memory together, and the share of the examples that is read for them."""

    layers: list[int]
    share: int
    n_shares: int

    @classmethod
    def of_process(cls, placement: str, layers: list[int], process: int, n: int) -> list["Pass"]:
        """Return the passes of one of n processes; over all processes, each layer sees each example once."""
        if placement == "by_layer":
            return [cls([layer], process, n) for layer in layers]
        if placement == "all":
            return [cls(layers, process, n)]
        if n <= len(layers):
            return [cls(layers[process::n], 0, 1)]
        own = process % len(layers)  # several processes have the same layer, and divide the examples
        return [cls([layers[own]], process // len(layers), len(range(own, n, len(layers))))]


@dataclass(frozen=True)
class _Statistics:
    """What discovery has summed up, over all processes."""

    of_method: TokenStats | None = None
    """Of the method's fitter, if it has one."""
    moments: TokenStats | None = None
    """Of hidden states, if asked for."""
    effects: TokenStats | None = None
    """Of latents on the refusal margin, if they are the score."""


@dataclass(frozen=True)
class _Discovery:
    """Run discovery on a model with one method."""

    model: DiscoveryModel
    data: DiscoveryData
    saes: SAESet
    method: SubspaceMethod
    options: DiscoveryOptions

    @property
    def layers(self) -> list[int]:
        return list(self.saes) or list(range(self.model.n_layers))

    def about_saes(self) -> dict[str, dict[str, str]]:
        infos = self.saes.infos.items()
        return {str(layer): {"source": of.source, "hook": of.hook_name, "sha256": of.sha256} for layer, of in infos}

    def statistics(self, *, with_moments: bool) -> _Statistics:
        """Return the method's statistics; each process reads its share of the data.

        The share is of the examples, or of the layers. A method without a fitter has no statistics.
        """
        moments = ActivationFitter() if with_moments else None
        passes = Pass.of_process(self.options.sae_placement, self.layers, process_index(), n_processes())
        decoder, found, effects = None, [], []
        for each in passes:
            fitter = self.method.fitter(self.saes, each.layers)
            if moments is None and fitter is None:
                return _Statistics()
            scored = fitter if self.options.score in BY_EFFECT and isinstance(fitter, FeatureFitter) else None
            decoder = decoder or self._decoder(max(max(one.layers) for one in passes) if scored is None else None)
            share = (each.share, each.n_shares)
            for name, sides in contrast_data(self.data, self.options, share, with_benign=with_moments).items():
                fed = [fitter] if fitter is not None and name in contrasts_of(self.options.contrast) else []
                fed += [moments] if moments is not None and name in ("prompt", BENIGN) else []
                if fed:
                    discover(decoder, {name: sides}, fed, each.layers, progress=self._shows_progress)
            found += [] if fitter is None else [fitter.result()]
            effects += [] if scored is None else [self._effects(decoder, scored, each.layers, share)]
            del fitter, scored  # and the SAEs that it has, before others are loaded
        del decoder
        gc.collect()
        return _Statistics(
            of_method=reduce(add, found).over_processes() if found else None,
            moments=None if moments is None else moments.result().over_processes(),
            effects=reduce(add, effects).over_processes() if effects else None,
        )

    @property
    def _shows_progress(self) -> bool:
        return self.options.progress and is_main()

    def _effects(
        self, model: nn.Module, features: FeatureFitter, layers: Sequence[int], share: tuple[int, int]
    ) -> TokenStats:
        """Return the effects of some layers' latents on the refusal margin, over a share of the examples."""
        fitter, contrasts = EffectFitter(features.saes), contrasts_of(self.options.contrast)
        sides = margin_data(self.data, self.options, share)
        attribute(model, sides, contrasts, fitter, layers, progress=self._shows_progress)
        return fitter.result()

    def _decoder(self, deepest_layer: int | None) -> nn.Module:
        """Return the model up to a layer, or (None) the whole model with its head."""
        model = self.model
        if model.loaded is not None:
            return model.loaded
        how = {"dtype": model.dtype, "device": model.device}
        where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        if deepest_layer is not None:
            return load_truncated(str(model.path), deepest_layer, **how, **where)
        check_whole(str(model.path), **where)
        with no_load_report(), not_partitioned():
            return load_causal_lm(str(model.path), **how, **where)

    def build(self, stats: _Statistics, provenance: dict[str, Any]) -> Subspace:
        """Build the subspace of one contrast, or (`split`) of the prompts for readers and the responses for writers."""
        onset, moments = None, stats.moments
        benign: Mapping[int, Tensor] | None = None
        if moments is not None:
            separations = {layer: separation(moments, layer) for layer in moments.layers}
            onset = onset_of(separations)
            provenance = {**provenance, "separation": {str(layer): value for layer, value in separations.items()}}
            if self.options.benign_whitening:
                benign = {layer: benign_covariance(moments, layer) for layer in moments.layers}
        inputs = MethodInputs(
            contrast=self.options.contrast,
            side=None,
            stats=stats.of_method,
            effects=stats.effects,
            saes=self.saes,
            benign=benign,
            layers=self.layers,
            d_model=self.model.d_model,
            options=self.options,
            provenance=provenance,
        )
        if self.options.contrast != "split" or stats.of_method is None:
            return replace(self.method.build(inputs), onset=onset)
        readers = self.method.build(replace(inputs, contrast="prompt", side="unaligned"))
        writers = self.method.build(replace(inputs, contrast="response", benign=None))
        of_writers = {name: value for name, value in writers.provenance.items() if name in ("features", "layers")}
        about = {**readers.provenance, "writers": of_writers}
        return replace(readers, provenance=about, writers=writers.bases, onset=onset)
