"""Find a subspace: load it from a folder if its inputs are unchanged, otherwise build and save it."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sails_align.core.artifacts import content_hash, package_versions, read_header
from sails_align.core.distributed import from_main, n_processes, process_index
from sails_align.core.errors import InputError
from sails_align.data.pairs import fingerprint
from sails_align.models.load import load_truncated
from sails_align.saes.sets import Decoders, SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.basis import Subspace
from sails_align.subspace.forward import discover
from sails_align.subspace.inputs import (
    DiscoveryData,
    DiscoveryModel,
    Sides,
    contrast_data,
    needs_moments,
    suited_to_data,
)
from sails_align.subspace.methods import MethodInputs, SubspaceMethod
from sails_align.subspace.options import DECIDES_SUBSPACE, DiscoveryOptions
from sails_align.subspace.selection import FeatureFitter, FeatureStats
from sails_align.subspace.separation import BENIGN, benign_covariance, onset_of, separation
from sails_align.subspace.statistics import ActivationFitter, ActivationStats, contrasts_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Statistics of the data."""

    found: FeatureStats | ActivationStats | None
    """Of the latents, or of hidden states, at the tokens of the contrast; None for a random basis."""
    moments: ActivationStats | None
    """Of hidden states of prompts, and of harmless conversations; None if they are not asked for."""


def find_subspace(
    model: DiscoveryModel,
    data: DiscoveryData,
    saes: SAESource | SAESet,
    method: SubspaceMethod,
    options: DiscoveryOptions,
    folder: Path | None = None,
) -> Subspace:
    """Find the subspace of a model with a method.

    Args:
        model: that is looked at.
        data: of both sides.
        saes: of the model; loaded only if they are needed.
        method: what is added up over the data, and what is made of it.
        options: of discovery.
        folder: where it is saved, and taken from if its artifact has the same input hash; None: nowhere.

    Raises:
        InputError: if the SAEs cannot be had or do not fit the model, or the data lacks a side.
    """
    _check_rank(options.rank, model)
    options = suited_to_data(options, data)
    moments = needs_moments(options, data)
    inputs = {
        "init": method.name,
        **{name: getattr(options, name) for name in DECIDES_SUBSPACE},
        "moments": moments,
        "rank": options.rank,
        "seed": options.seed,
        "max_length": options.max_length,
        "dtype": model.dtype,
        "model": model.identity,
        "saes": saes.identity(),
        "chat_template": content_hash(data.tokenizer.chat_template),
        "data": [fingerprint(part) for part in (data.pairs, data.harmless) if part is not None],
    }
    input_hash = content_hash(inputs)
    # The folder need not be one that all machines see: the main process reads and writes it for all.
    cached = None if folder is None else from_main(lambda: _cached(folder, input_hash))
    if cached is not None:
        return cached
    loaded = _loaded(saes, model, options)
    stats = _statistics(model, data, loaded, method, options, with_moments=moments)
    provenance = _provenance(model, data, loaded, method, options, inputs["data"])

    def build_and_save() -> Subspace:
        subspace = _build(model, loaded, method, options, stats, provenance)
        if folder is not None:
            subspace.save(folder, input_hash)
        return subspace

    return from_main(build_and_save)


def load_subspace(path: Path, model: DiscoveryModel, method: str, *, allow_mismatch: bool = False) -> Subspace:
    """Load a saved subspace.

    Raises:
        InputError: if it is damaged, of another model, or found by another method.
    """
    subspace = Subspace.load(path)
    if subspace.d_model != model.d_model:
        raise InputError(
            f"the subspace {path} is of a model with d_model {subspace.d_model}, but "
            f"{model.path} has {model.d_model}; give one that was found in this model"
        )
    found_in = subspace.provenance.get("model")
    if found_in not in (None, model.identity) and not allow_mismatch:
        raise InputError(
            f"the subspace {path} was found in another model ({found_in.get('name')}) than "
            f"{model.name};\ngive one of this model, or --sae_allow_mismatch true if they are close relatives"
        )
    if (found_by := subspace.provenance.get("method", method)) != method:
        raise InputError(f"the subspace {path} was made by {found_by}, but init is {method}; give --init {found_by}")
    return subspace


def _check_rank(rank: int, model: DiscoveryModel) -> None:
    if rank > model.d_model:
        raise InputError(
            f"lora_r is {rank}, but {model.path or model.name} has d_model {model.d_model}: choose at most that"
        )


def _cached(folder: Path, input_hash: str) -> Subspace | None:
    header = read_header(folder, "subspace")
    if header is None or header["input_hash"] != input_hash:
        return None
    logger.warning("the subspace in %s was made from the same inputs: discovery is skipped", folder)
    return Subspace.load(folder)


def _loaded(saes: SAESource | SAESet, model: DiscoveryModel, options: DiscoveryOptions) -> SAESet:
    """The SAEs, in memory (with `sae_placement: all`) or ready to be."""
    if isinstance(saes, SAESource):
        keep = options.sae_placement == "all"
        saes = SAESet.load(saes, keep=keep, model_config=model.config, model_name=model.name, device=model.device)
    smallest = min(saes.infos.values(), key=lambda info: info.d_sae, default=None)
    if smallest is not None and options.top_k > smallest.d_sae:
        raise InputError(
            f"top_k is {options.top_k}, but the SAE {smallest.source} has {smallest.d_sae} latents: choose at most that"
        )
    return saes


def _provenance(
    model: DiscoveryModel,
    data: DiscoveryData,
    saes: SAESet,
    method: SubspaceMethod,
    options: DiscoveryOptions,
    fingerprints: list[str],
) -> dict[str, Any]:
    return {
        "model": model.identity,
        "data": fingerprints,
        "dropped_rows": data.dropped,
        "options": {"init": method.name, **{name: getattr(options, name) for name in DECIDES_SUBSPACE}},
        "saes": {
            str(layer): {"source": info.source, "hook": info.hook_name, "sha256": info.sha256}
            for layer, info in saes.infos.items()
        },
        "versions": package_versions(),
    }


def _layers(model: DiscoveryModel, saes: SAESet) -> list[int]:
    return list(saes) or list(range(model.n_layers))


@dataclass(frozen=True)
class Pass:
    """Of one process: layers whose SAEs are in memory together, and the share of the examples that is read for them."""

    layers: list[int]
    share: int
    n_shares: int

    @classmethod
    def of_process(cls, placement: str, layers: list[int], process: int, n: int) -> list["Pass"]:
        """Those of one of n processes; over all processes, each layer sees each example once."""
        if placement == "by_layer":
            return [cls([layer], process, n) for layer in layers]
        if placement == "all":
            return [cls(layers, process, n)]
        if n <= len(layers):
            return [cls(layers[process::n], 0, 1)]
        own = process % len(layers)  # several processes have the same layer, and divide the examples
        return [cls([layers[own]], process // len(layers), len(range(own, n, len(layers))))]


def _statistics(
    model: DiscoveryModel,
    data: DiscoveryData,
    saes: SAESet,
    method: SubspaceMethod,
    options: DiscoveryOptions,
    *,
    with_moments: bool,
) -> Statistics:
    """What the fitters say of the data, each process having read its share: of the examples, or of the layers."""
    moments = ActivationFitter() if with_moments else None
    passes = Pass.of_process(options.sae_placement, _layers(model, saes), process_index(), n_processes())
    decoder, found = None, []
    for of in passes:
        fitter = method.fitter(saes, of.layers)
        if moments is None and fitter is None:
            return Statistics(None, None)
        decoder = decoder or _decoder(model, max(max(of.layers) for of in passes))
        sequences = contrast_data(data, options, (of.share, of.n_shares), with_benign=with_moments)
        _feed(decoder, sequences, fitter, moments, of.layers, options)
        found += [] if fitter is None else [fitter.result()]
        del fitter  # and the SAEs that it has, before others are loaded
    del decoder
    gc.collect()
    return Statistics(
        reduce(add, found).over_processes() if found else None,
        None if moments is None else moments.result().over_processes(),
    )


def _feed(
    decoder: nn.Module,
    sequences: Mapping[str, Mapping[str, Sides]],
    fitter: FeatureFitter | ActivationFitter | None,
    moments: ActivationFitter | None,
    layers: list[int],
    options: DiscoveryOptions,
) -> None:
    """Give each fitter its contrasts."""
    for name, sides in sequences.items():
        fed = [fitter] if fitter is not None and name in contrasts_of(options.contrast) else []
        fed += [moments] if moments is not None and name in ("prompt", BENIGN) else []
        if fed:
            discover(decoder, {name: sides}, fed, layers, progress=options.progress and process_index() == 0)


def _decoder(model: DiscoveryModel, deepest_layer: int) -> nn.Module:
    if model.loaded is not None:
        return model.loaded
    return load_truncated(
        str(model.path),
        deepest_layer,
        dtype=model.dtype,
        device=model.device,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def _build(
    model: DiscoveryModel,
    saes: SAESet,
    method: SubspaceMethod,
    options: DiscoveryOptions,
    stats: Statistics,
    provenance: dict[str, Any],
) -> Subspace:
    """The subspace of one contrast, or (`split`) of the prompts for readers and of the responses for writers."""
    moments, onset = stats.moments, None
    benign: Mapping[int, Tensor] | None = None
    if moments is not None:
        separations = {layer: separation(moments, layer) for layer in moments.layers}
        onset = onset_of(separations)
        provenance = {**provenance, "separation": {str(layer): value for layer, value in separations.items()}}
        if options.benign_whitening:
            benign = {layer: benign_covariance(moments, layer) for layer in moments.layers}
    inputs = MethodInputs(
        contrast=options.contrast,
        side=None,
        stats=stats.found,
        decoders=Decoders(saes),
        benign=benign,
        layers=_layers(model, saes),
        d_model=model.d_model,
        options=options,
        provenance=provenance,
    )
    if options.contrast != "split" or stats.found is None:
        return replace(method.build(inputs), onset=onset)
    readers = method.build(replace(inputs, contrast="prompt", side="unaligned"))
    writers = method.build(replace(inputs, contrast="response", benign=None))
    of_writers = {name: value for name, value in writers.provenance.items() if name in ("features", "layers")}
    about = {**readers.provenance, "writers": of_writers}
    return replace(readers, provenance=about, writers=writers.bases, onset=onset)
