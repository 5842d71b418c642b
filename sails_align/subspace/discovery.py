"""The stage that finds the subspace of a run: loaded, taken from the run directory if nothing changed, or built."""

import gc
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from sails_align.core.artifacts import content_hash, file_hash, package_versions, read_header
from sails_align.core.distributed import from_main, n_processes, process_index
from sails_align.core.errors import InputError
from sails_align.data.pairs import fingerprint
from sails_align.data.tokens import TokenizedSide, tokenize_prompt, tokenize_response
from sails_align.initializers.baselines import (
    ActivationFitter,
    ActivationStats,
    activation_pca,
    mean_diff,
    random_basis,
    random_features,
)
from sails_align.models.load import load_truncated
from sails_align.saes.sets import Decoders, SAESet
from sails_align.subspace.basis import Subspace, build_subspace
from sails_align.subspace.forward import discover
from sails_align.subspace.options import SailsArguments
from sails_align.subspace.selection import FeatureFitter, FeatureStats, select_features
from sails_align.subspace.separation import BENIGN, benign_covariance, onset_of, separation
from sails_align.subspace.statistics import contrasts_of
from sails_align.training.dataset import Source

logger = logging.getLogger(__name__)

SAE_FILES = ("cfg.json", "sae_weights.safetensors", "params.npz")
"""The files that a local SAE consists of, in sae-lens' format and Gemma Scope's."""


@dataclass(frozen=True)
class DiscoveryOptions:
    """What discovery needs of the trainer's options."""

    rank: int
    max_length: int
    seed: int
    dtype: str
    device: str
    revision: str | None
    trust_remote_code: bool
    progress: bool = True


@dataclass(frozen=True)
class Statistics:
    """What the data says."""

    found: FeatureStats | ActivationStats | None
    """Of the latents, or of hidden states, at the tokens of the contrast; None for a random basis."""
    moments: ActivationStats | None
    """Of hidden states of prompts, and of harmless conversations; None if they are not asked for."""


class Sides:
    """Sequences of one side of a contrast, tokenised as they are asked for."""

    def __init__(self, dataset: Dataset, tokenize: Any) -> None:
        self.dataset, self.tokenize = dataset, tokenize

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[TokenizedSide]:
        return (self.tokenize(row) for row in self.dataset)


def find_subspace(args: SailsArguments, source: Source, options: DiscoveryOptions, folder: Path) -> Subspace:
    """The subspace that adapters start in.

    Taken from `--subspace_path`; else from `folder`, if its artifact has the same input hash; else built and saved.

    Raises:
        InputError: if it does not fit the model, the SAEs cannot be had, or the data has no contrast.
    """
    d_model = source.model_config.get_text_config().hidden_size
    if options.rank > d_model:
        raise InputError(
            f"lora_r is {options.rank}, but {source.model_name} has d_model {d_model}: choose at most that"
        )
    if args.subspace_path is not None:
        subspace = Subspace.load(Path(args.subspace_path))
        if subspace.d_model != d_model:
            raise InputError(
                f"the subspace {args.subspace_path} is of a model with d_model {subspace.d_model}, but "
                f"{source.model_name} has {d_model}; give one that was found in this model"
            )
        found_in = subspace.provenance.get("model")
        if found_in not in (None, source.identity()) and not args.sae_allow_mismatch:
            raise InputError(
                f"the subspace {args.subspace_path} was found in another model ({found_in.get('name')}) than "
                f"{source.name};\ngive one of this model, or --sae_allow_mismatch true if they are close relatives"
            )
        method = subspace.provenance.get("method", args.init)
        if method != args.init:
            raise InputError(
                f"the subspace {args.subspace_path} was made by {method}, but init is {args.init}; give --init {method}"
            )
        given = subspace
        from_main(lambda: given.save(folder, content_hash({"subspace": given.provenance})))
        return subspace
    contrast = _contrast(args, source)
    needs_moments = _needs_moments(args, source)
    inputs = {
        **args.subspace_options(),
        "contrast": contrast,
        "moments": needs_moments,
        "rank": options.rank,
        "seed": options.seed,
        "max_length": options.max_length,
        "dtype": options.dtype,
        "model": source.identity(),
        "saes": _named_saes(args, source),
        "chat_template": content_hash(source.tokenizer.chat_template),
        "data": [fingerprint(part) for part in (source.safety, source.helpful) if part is not None],
    }
    input_hash = content_hash(inputs)
    # The folder need not be one that all machines see: the main process reads and writes it for all.
    cached = from_main(lambda: _cached(folder, input_hash))
    if cached is not None:
        return cached
    saes = load_named_saes(args, source, options)
    provenance = {
        "model": inputs["model"],
        "data": inputs["data"],
        "dropped_rows": source.dropped,
        "options": {**args.subspace_options(), "contrast": contrast},
        "saes": {
            str(layer): {"source": info.source, "hook": info.hook_name, "sha256": info.sha256}
            for layer, info in saes.infos.items()
        },
        "versions": package_versions(),
    }
    stats = _statistics(args, source, options, contrast, saes, needs_moments)

    def build_and_save() -> Subspace:
        subspace = _build(args, source, options, contrast, saes, stats, provenance)
        subspace.save(folder, input_hash)
        return subspace

    return from_main(build_and_save)


def _cached(folder: Path, input_hash: str) -> Subspace | None:
    header = read_header(folder, "subspace")
    if header is None or header["input_hash"] != input_hash:
        return None
    logger.warning("the subspace in %s was made from the same inputs: discovery is skipped", folder)
    return Subspace.load(folder)


def _layers(source: Source, saes: SAESet) -> list[int]:
    return list(saes) or list(range(source.model_config.get_text_config().num_hidden_layers))


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
    args: SailsArguments,
    source: Source,
    options: DiscoveryOptions,
    contrast: str,
    saes: SAESet,
    needs_moments: bool,
) -> Statistics:
    """What the fitters say of the data, each process having read its share: of the examples, or of the layers."""
    moments = ActivationFitter() if needs_moments else None
    if moments is None and args.init == "random_basis":
        return Statistics(None, None)
    passes = Pass.of_process(args.sae_placement, _layers(source, saes), process_index(), n_processes())
    model = load_truncated(
        source.model_name,
        max(max(of.layers) for of in passes),
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    wanted, found = contrasts_of(contrast), []
    for of in passes:
        fitter = _fitter(args, saes, of.layers)
        data = contrast_data(args, source, options, contrast, (of.share, of.n_shares), with_benign=needs_moments)
        for name, sides in data.items():
            fed = [fitter] if fitter is not None and name in wanted else []
            fed += [moments] if moments is not None and name in ("prompt", BENIGN) else []
            if fed:
                discover(model, {name: sides}, fed, of.layers, progress=options.progress and process_index() == 0)
        found += [] if fitter is None else [fitter.result()]
        del fitter  # and the SAEs that it has, before others are loaded
    del model
    gc.collect()
    return Statistics(
        reduce(add, found).over_processes() if found else None,
        None if moments is None else moments.result().over_processes(),
    )


def _fitter(args: SailsArguments, saes: SAESet, layers: list[int]) -> FeatureFitter | ActivationFitter | None:
    if args.init == "random_basis":
        return None
    if args.init in ("sails", "random_features"):
        return FeatureFitter(saes.some(layers))
    return ActivationFitter(second_moment=args.init == "activation_pca")


def _build(
    args: SailsArguments,
    source: Source,
    options: DiscoveryOptions,
    contrast: str,
    saes: SAESet,
    stats: Statistics,
    provenance: dict[str, Any],
) -> Subspace:
    """The subspace of one contrast, or (`split`) of the prompts for readers and of the responses for writers."""
    moments, benign, onset = stats.moments, None, None
    if moments is not None:
        separations = {layer: separation(moments, layer) for layer in moments.layers}
        onset = onset_of(separations)
        provenance = {**provenance, "separation": {str(layer): value for layer, value in separations.items()}}
        if args.benign_whitening:
            benign = {layer: benign_covariance(moments, layer) for layer in moments.layers}
    decoders = Decoders(saes)

    def of(contrast: str, benign: Mapping[int, Tensor] | None, side: str | None) -> Subspace:
        if stats.found is None:
            d_model = source.model_config.get_text_config().hidden_size
            return random_basis(d_model, _layers(source, saes), options.rank, options.seed, provenance=provenance)
        common: dict[str, Any] = {"contrast": contrast, "provenance": provenance, "benign": benign}
        if isinstance(stats.found, ActivationStats):
            if args.init == "mean_diff":
                return mean_diff(stats.found, **common)
            return activation_pca(stats.found, rank=options.rank, **common)
        assert args.score is not None
        assert args.top_k is not None
        assert args.tau is not None
        common |= {"tau": args.tau, "weighting": bool(args.weighting), "center": bool(args.center)}
        chosen: dict[str, Any] = {"score": args.score, "top_k": args.top_k}
        if args.init == "random_features":
            return random_features(stats.found, decoders, seed=options.seed, **common, **chosen)
        selection = select_features(stats.found, contrast=common.pop("contrast"), side=side, **chosen)
        common["provenance"] = {**provenance, "method": "sails"}
        return build_subspace(selection, decoders, **common)

    if contrast != "split" or stats.found is None:
        return replace(of(contrast, benign, None), onset=onset)
    readers, writers = of("prompt", benign, "unaligned"), of("response", None, None)
    of_writers = {name: value for name, value in writers.provenance.items() if name in ("features", "layers")}
    about = {**readers.provenance, "writers": of_writers}
    return replace(readers, provenance=about, writers=writers.bases, onset=onset)


def contrast_data(
    args: SailsArguments,
    source: Source,
    options: DiscoveryOptions,
    contrast: str,
    share: tuple[int, int] = (0, 1),
    *,
    with_benign: bool = False,
) -> dict[str, dict[str, Sides]]:
    """A share (its number, and how many there are) of the contrasts' sequences: chosen against rejected responses,
    harmless against harmful prompts; `with_benign`, the prompts in any case, and the responses to harmless ones."""
    tokenizer, max_length = source.tokenizer, options.max_length

    def response(column: str) -> Any:
        return lambda row: tokenize_response(tokenizer, row["prompt"], row[column], max_length)

    def prompt(row: dict[str, Any]) -> TokenizedSide:
        return tokenize_prompt(tokenizer, row["prompt"], max_length, tokens=args.prompt_tokens)  # pyright: ignore[reportArgumentType]

    def some(dataset: Dataset) -> Dataset:
        n = min(args.max_discovery_examples, len(dataset))
        chosen = dataset if n == len(dataset) else dataset.shuffle(seed=options.seed).select(range(n))
        return chosen if share[1] == 1 else chosen.select(range(share[0], n, share[1]))

    safety = some(source.safety)
    contrasts: dict[str, dict[str, Sides]] = {}
    wanted = contrasts_of(contrast)
    if "response" in wanted:
        contrasts["response"] = {
            "aligned": Sides(safety, response("chosen")),
            "unaligned": Sides(safety, response("rejected")),
        }
    if "prompt" in wanted or with_benign:
        assert source.helpful is not None
        helpful = some(source.helpful)
        contrasts["prompt"] = {"aligned": Sides(helpful, prompt), "unaligned": Sides(safety, prompt)}
        if with_benign:
            contrasts[BENIGN] = {"aligned": Sides(helpful, response("chosen"))}
    return contrasts


def _contrast(args: SailsArguments, source: Source) -> str:
    """The contrast asked for, if the data has both of its sides."""
    contrast = args.contrast
    assert contrast is not None
    if contrast != "response" and source.helpful is None:
        if "contrast" in args.given:
            raise InputError(
                f"contrast is {contrast}, but there are no harmless prompts to compare harmful ones with;\n"
                "give --helpful_dataset_name, or use --contrast response"
            )
        logger.warning("no helpful data: the contrast is that of the responses alone (--contrast response)")
        contrast = "response"
    if contrast != "prompt" and "rejected" not in source.safety.column_names:
        raise InputError(
            f"contrast {contrast} compares chosen with rejected responses, but the data has no rejected ones;\n"
            "give preference data, or use --contrast prompt with --helpful_dataset_name"
        )
    return contrast


def _needs_moments(args: SailsArguments, source: Source) -> bool:
    """Whether harmful and harmless prompts are to be compared by hidden states, too."""
    asked = {"benign_whitening": bool(args.benign_whitening), "layer_map": args.layer_map == "from_onset"}
    if not any(asked.values()):
        return False
    if source.helpful is not None:
        return True
    given = [name for name, is_asked in asked.items() if is_asked and name in args.given]
    if given:
        raise InputError(
            f"{given[0]} is {getattr(args, given[0])}, but there are no harmless prompts to look at;\n"
            "give --helpful_dataset_name, or leave it out"
        )
    logger.warning("no helpful data: all blocks have adapters, and nothing is ranked against harmless conversations")
    return False


def _named_saes(args: SailsArguments, source: Source) -> dict[str, Any]:
    """What identifies the SAEs, without loading them or sae-lens: the hashes of local files, or a release and its ids.

    Raises:
        InputError: if none are given and they are needed.
    """
    if args.sae_release is None and args.sae_path is None:
        if args.init in ("sails", "random_features"):
            raise InputError(
                f"--init {args.init} needs SAEs of {source.model_name}:\n"
                "give --sae_release and --sae_ids, or --sae_path; "
                "for a model without public SAEs, train some with sails train-sae"
            )
        return {}
    named: dict[str, Any] = {"ids": args.sae_ids, "allow_mismatch": args.sae_allow_mismatch}
    if args.sae_path is None:
        return {**named, "release": args.sae_release}
    path = Path(args.sae_path)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    of_saes = [file for file in files if file.name in SAE_FILES]
    return {**named, "files": {str(file.relative_to(path)): file_hash(file) for file in of_saes}}


def load_named_saes(args: SailsArguments, source: Source, options: DiscoveryOptions) -> SAESet:
    """The SAEs named, loaded (with `sae_placement: all`) or ready to be; none if none are named."""
    if args.sae_release is None and args.sae_path is None:
        return SAESet({}, {}, {})
    saes = SAESet.load(
        keep=args.sae_placement == "all",
        release=args.sae_release,
        sae_ids=args.sae_ids or (),
        path=args.sae_path,
        model_config=source.model_config,
        model_name=source.name,
        device=options.device,
        allow_mismatch=args.sae_allow_mismatch,
    )
    smallest = min(saes.infos.values(), key=lambda info: info.d_sae)
    if args.top_k is not None and args.top_k > smallest.d_sae:
        raise InputError(
            f"top_k is {args.top_k}, but the SAE {smallest.source} has {smallest.d_sae} latents: choose at most that"
        )
    return saes
