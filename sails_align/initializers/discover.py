"""Find the subspace of an initialization, by its name."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import tensors_hash
from sails_align.core.errors import InputError
from sails_align.core.suggestions import did_you_mean
from sails_align.data.pairs import dataset_of, requests_of
from sails_align.data.pairs import normalize as normalized
from sails_align.data.rows import OnBadRows
from sails_align.data.tokens import TemplateCheck
from sails_align.initializers import INITIALIZERS, subspace_initializers
from sails_align.saes.explain import N_WORDS, logit_lens, neuronpedia_page, words
from sails_align.saes.load import ResidualSAE
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.basis import Subspace
from sails_align.subspace.discovery import find_subspace
from sails_align.subspace.inputs import DiscoveryData, DiscoveryModel, check_score
from sails_align.subspace.options import PRESETS, DiscoveryOptions


def discover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Mapping[int, ResidualSAE] | None,
    pairs: Dataset | Sequence[Mapping[str, Any]],
    harmless: Dataset | Sequence[Any] | None = None,
    *,
    init: str = "sails",
    preset: str = "default",
    on_bad_rows: OnBadRows = "error",
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Subspace:
    """Find the safety subspace of a model in memory, on the device and with the type that it has.

    Args:
        model: is not changed; its mode (train or eval) is restored.
        tokenizer: of the model, with a chat template.
        saes: by layer, as `load_saes` gives them; None for an `init` without SAEs.
        pairs: rows of harmful requests with a `chosen` response and, unless `contrast="prompt"`, a `rejected` one: a
            data set, or a list of dicts, in any format that `sails train sft` reads.
        harmless: requests to compare harmful ones with: texts, conversations, prompts of `load_prompts`, or rows like
            `pairs`. Without them only responses are compared.
        init: which subspace: `sails`, or a baseline (`random_basis`, `random_features`, `activation_pca`, `mean_diff`).
        preset: of the options: `default` or `paper`.
        on_bad_rows: `error`, or `skip` rows that cannot be used.
        cache_dir: where the subspace is saved, and taken from if model, SAEs, data and options are the same.
        options: of `DiscoveryOptions`, such as `contrast`, `top_k`, `tau`, `max_discovery_examples`, `max_length`.

    Raises:
        InputError: if an option, the SAEs or the data cannot be used.

    Examples:
        >>> subspace = sails.discover(model, tokenizer, saes, pairs, harmless, top_k=8, progress=False)
        >>> {layer: tuple(basis.shape) for layer, basis in subspace.bases.items()}
        {1: (96, 8), 2: (96, 8), 3: (96, 8)}
    """
    # Saved subspaces are found again by the weights; nothing else tells the state of a model in memory.
    identity = {"name": model.config.name_or_path, "in_memory": True}
    if cache_dir is not None:
        identity["sha256"] = tensors_hash(model.state_dict())
    looked_at = DiscoveryModel(
        name=model.config.name_or_path or type(model).__name__,
        config=model.config,
        identity=identity,
        loaded=model,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )
    rows = pairs if isinstance(pairs, Dataset) else dataset_of(pairs, "pairs")
    how: dict[str, Any] = {"on_bad_rows": on_bad_rows, "check": TemplateCheck(tokenizer)}
    harmful = normalized(rows, name="pairs", **how)
    compared = None if harmless is None else requests_of(harmless, name="harmless", **how)
    data = DiscoveryData(tokenizer, harmful.dataset, compared, harmful.dropped)
    folder = None if cache_dir is None else Path(cache_dir)
    of = SAESet.of(saes or {})
    subspace = discover_subspace(init, looked_at, data, of, _options(preset, options), folder)
    return _described(subspace, model, tokenizer, of)


def discover_subspace(
    init: str,
    model: DiscoveryModel,
    data: DiscoveryData,
    saes: SAESource | SAESet,
    options: DiscoveryOptions,
    folder: Path | None = None,
    *,
    overwrite: bool = True,
) -> Subspace:
    """Run `find_subspace` with the method of an initialization.

    Raises `InputError` if it builds no subspace, lacks the SAEs it needs, or the data lacks what the score of features
    needs, and as `find_subspace`.
    """
    entry = INITIALIZERS.get(init)
    if not entry.makes_subspace:
        raise InputError(f"init is {init}, which uses no subspace; choose {', '.join(subspace_initializers())}")
    if entry.needs_saes and not (saes.named if isinstance(saes, SAESource) else saes):
        raise InputError(
            f"--init {init} needs SAEs of {model.path or model.name}:\n"
            "give --sae_release and --sae_ids, or --sae_path; "
            "for a model without public SAEs, train some with sails train-sae"
        )
    if entry.needs_saes:
        check_score(options, data)
    return find_subspace(model, data, saes, entry.load(), options, folder, overwrite=overwrite)


def _options(preset: str, given: Mapping[str, Any]) -> DiscoveryOptions:
    """Return the options of a preset, with the given ones in place."""
    known = [field.name for field in fields(DiscoveryOptions) if field.name not in ("given", "sae_placement")]
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"there is no option {unknown[0]!r} of discovery{did_you_mean(unknown[0], known)}")
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}{did_you_mean(preset, PRESETS)}")
    of_preset = {name: value for name, value in PRESETS[preset].items() if name in known}
    return DiscoveryOptions(**{**of_preset, **given}, given=frozenset(given))


def _described(
    subspace: Subspace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, saes: SAESet
) -> Subspace:
    """Add, to each feature of the subspace, the tokens that it promotes most and its page (if any)."""

    def described(about: Mapping[str, Any]) -> dict[str, Any]:
        layers = {}
        for layer, of in about["features"]["layers"].items():
            sae, ids = saes[int(layer)], of["ids"]
            promoted_VK = logit_lens(model, normalize(sae.W_dec_FD[ids], dim=1))
            best = promoted_VK.topk(min(N_WORDS, len(promoted_VK)), dim=0).indices.T.tolist()
            links = [neuronpedia_page(sae, feature) for feature in ids]
            layers[layer] = {**of, "promoted": [words(tokenizer, tokens) for tokens in best], "links": links}
        return {**about, "features": {**about["features"], "layers": layers}}

    about = dict(subspace.provenance)
    if "features" in about:
        about = described(about)
    if "features" in about.get("writers", {}):
        about["writers"] = described(about["writers"])
    return replace(subspace, provenance=about)
