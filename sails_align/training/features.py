"""Find out what the features of a finished run's subspace mean, and what training did to them.

<run>/features.json   for each layer: the features, their activations before and after training, how many are concepts
                      of harm; texts that they are active in, words they promote, neighbours, Neuronpedia pages
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.core.progress import progress_bar
from sails_align.data.messages import Message
from sails_align.data.tokens import TokenizedSide, padded, tokenize_prompt, tokenize_response
from sails_align.models.adapters import read_json
from sails_align.models.hooks import evaluation_mode, token_states
from sails_align.models.load import load_model
from sails_align.models.quantized import is_quantized
from sails_align.models.resolve import resolve_model
from sails_align.saes.explain import logit_lens, meanings, words
from sails_align.saes.sets import SAESet
from sails_align.subspace.basis import Subspace
from sails_align.subspace.concepts import States, concepts, last_token_states, shown
from sails_align.training import run as align
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan
from sails_align.training.starts import load_base
from sails_align.training.subspace import saes_of

FEATURES_FILE = "features.json"
BATCH_SIZE = 16
N_PROMOTED = 3
"""Words that a feature is told by, beside a prompt."""


def explain(run: Path, n_texts: int = 256) -> dict[str, Any]:
    """Explain the features of a run. Write the result to its `features.json`, and return it.

    Args:
        run: of `sails train`, with adapters initialized by SAE features.
        n_texts: number of harmful texts to read, and of harmless ones.

    Raises:
        InputError: if the run has no subspace of SAE features, or its model, SAEs or data are missing or changed.
    """
    opened = _opened(run)
    subspace, source, saes, max_length = opened.subspace, opened.source, opened.saes, opened.max_length
    if source.helpful is None:
        raise InputError(
            f"{run} had no harmless requests to compare harmful ones with;\ntrain one with --helpful_dataset_name"
        )
    sides = (source.held_out, source.helpful)
    spec = resolve_model(str(run), trust_remote_code=opened.options.training.trust_remote_code)
    if spec.adapter is None:
        raise InputError(f"{run} has no adapter; give a run with --init sails")
    model: Any = load_model(spec)

    def states() -> tuple[States, States]:
        harmful, harmless = (
            last_token_states(model, source.tokenizer, list(saes), side["prompt"][:n_texts], max_length)
            for side in sides
        )
        return harmful, harmless

    after = states()
    with model.disable_adapter():
        before = states()
        texts = list(texts_of(source, n_texts, max_length))
        told = meanings(model.get_base_model(), source.tokenizer, saes, shown(subspace), texts)
    drift = read_json(run / "metrics.json").get("drift")
    found = {
        **concepts(subspace, saes, before, after),
        "drift": drift,
        "meanings": [asdict(meaning) for meaning in told],
    }
    write_json(run / FEATURES_FILE, found)
    return found


@dataclass(frozen=True)
class _Opened:
    """A finished run, with what it was made of."""

    options: TrainingPlan
    source: TrainingSource
    subspace: Subspace
    saes: SAESet

    @property
    def max_length(self) -> int:
        """Of a text, in tokens."""
        return self.options.training.max_length or 1024


def _opened(run: Path) -> _Opened:
    """Open a run whose adapters were initialized by SAE features; see `explain`."""
    record = read_json(run / "run.json")
    method = record["options"].get("method") if isinstance(record.get("options"), dict) else None
    if method not in ("sft", "dpo") or not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run of sails train sft or dpo; give the folder of one")
    if not (run / "subspace").is_dir():
        raise InputError(f"the adapter of {run} was not initialized in a subspace; pass a run with --init sails")
    subspace = Subspace.load(run / "subspace")
    if "features" not in subspace.provenance:
        raise InputError(f"the subspace of {run} was not made of SAE features; give a run with --init sails")
    options = align.parse(method, ["--config", str(run / "config.yaml"), "--push_to_hub", "false"])
    options, testbed = align.resolved(options)
    source = align.load_source(options, testbed)
    saes = saes_of(options, source)
    if lacking := subspace.provenance["features"]["layers"].keys() - set(map(str, saes)):
        raise InputError(
            f"there is no SAE of layer {', '.join(sorted(lacking))}; give a run with its SAEs (--sae_path)"
        )
    _check_same(run, record, source, saes)
    return _Opened(options, source, subspace, saes)


def _check_same(run: Path, record: Mapping[str, Any], source: TrainingSource, saes: SAESet) -> None:
    """Refuse to look at a run with another model, other data or other SAEs than it had."""
    now = {str(layer): info.sha256 for layer, info in saes.infos.items()}
    then = {layer: of["sha256"] for layer, of in (record.get("saes") or {}).items()}
    changed = {
        "SAEs": now != then,
        "training data": record["data"]["train"]["sha256"] != source.data_hash(),
        "base model": record["identity"]["model"] != source.identity(),
    }
    if other := [name for name, is_other in changed.items() if is_other]:
        raise InputError(
            f"the {' and '.join(other)} in config.yaml of {run} changed since training;\nrestore them, or train again"
        )


def explain_subspace(
    args: TrainingPlan, source: TrainingSource, subspace: Subspace, n_texts: int
) -> list[dict[str, Any]]:
    """Describe every feature of a subspace: its place in the ranking, and what it means in the training's model.

    Args:
        args: of the training.
        source: of its model and data.
        subspace: made of SAE features.
        n_texts: number of harmful conversations, and of harmless ones, to look for contexts in.

    Returns:
        a dictionary for each feature, best first within a layer: `layer`, `used_by`, `id`, `delta`, `score`,
        `rate_aligned`, `rate_unaligned`, `effect` (if it is the score), and the fields of `saes.explain.Meaning`.

    Raises:
        InputError: if the model or an SAE cannot be loaded.
    """
    ranked = subspace.feature_rows()
    ids = {layer: [row["id"] for row in ranked if row["layer"] == layer] for layer in {row["layer"] for row in ranked}}
    unique = {layer: list(dict.fromkeys(of)) for layer, of in sorted(ids.items())}
    model = _base_model(args, source)
    texts = list(texts_of(source, n_texts, args.training.max_length or 1024))
    found = meanings(model, source.tokenizer, saes_of(args, source), unique, texts)
    told = {(meaning.layer, meaning.id): asdict(meaning) for meaning in found}
    return [{**row, **told[row["layer"], row["id"]]} for row in ranked]


def _base_model(args: TrainingPlan, source: TrainingSource) -> Any:
    model: Any = load_base(args, source)
    return model if is_quantized(model) else model.to(args.training.device)


def active_features(
    run: Path, requests: Sequence[list[Message]], *, n: int = 5, progress: bool = True
) -> dict[int, list[tuple[int, int, float, str]]]:
    """Find the features of a run's subspace that are most active at the last token of requests, in its base model.

    Args:
        run: of `sails train`, with adapters initialized by SAE features.
        requests: conversations that end with a user's turn.
        n: number of features of each request, at most.
        progress: show a bar.

    Returns:
        By the request's place: layer, id, activation, and the words that the feature promotes; the most active first.
        A request that is longer than the run's `max_length` is left out.

    Raises:
        InputError: as `explain` does.
    """
    opened = _opened(run)
    model, tokenizer = _base_model(opened.options, opened.source), opened.source.tokenizer
    of_layers = {int(layer): of["ids"] for layer, of in opened.subspace.provenance["features"]["layers"].items()}
    sides = [tokenize_prompt(tokenizer, request, opened.max_length, tokens="last") for request in requests]
    places = [place for place, side in enumerate(sides) if any(side.mask)]
    found: dict[int, list[tuple[int, int, float, str]]] = {place: [] for place in places}
    hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in of_layers}
    with progress_bar(progress) as bar, torch.no_grad(), evaluation_mode(model):
        for start in bar.track(range(0, len(places), BATCH_SIZE), description="features of prompts"):
            batch = places[start : start + BATCH_SIZE]
            states = token_states(model, list(of_layers), *padded([sides[place] for place in batch]))
            for layer, hidden_ND in states.items():
                hidden[layer].append(hidden_ND.float().cpu())
        for layer, ids in of_layers.items() if places else ():
            sae = opened.saes[layer]  # which may be loaded on each access
            acts_NK = torch.cat([sae.encode(hidden_ND)[:, list(ids)].cpu() for hidden_ND in hidden[layer]])
            for place, acts_K in zip(places, acts_NK.tolist(), strict=True):
                found[place] += [(layer, id_, act, "") for id_, act in zip(ids, acts_K, strict=True) if act > 0]
    best = {place: sorted(of, key=lambda feature: -feature[2])[:n] for place, of in found.items()}
    told = _promoted(model, tokenizer, opened.saes, {feature[:2] for of in best.values() for feature in of})
    return {place: [(*feature[:3], told[feature[:2]]) for feature in of] for place, of in best.items()}


def _promoted(
    model: Any, tokenizer: PreTrainedTokenizerBase, saes: SAESet, features: Collection[tuple[int, int]]
) -> dict[tuple[int, int], str]:
    """Return the words whose logits each feature (layer, id) raises most."""
    promoted = {}
    for layer in sorted({layer for layer, _ in features}):
        ids = sorted(id_ for of, id_ in features if of == layer)
        lens_VK = logit_lens(model, normalize(saes[layer].W_dec_FD[ids], dim=1))
        for place, id_ in enumerate(ids):
            tokens = lens_VK[:, place].topk(N_PROMOTED).indices.tolist()
            promoted[layer, id_] = " ".join(word.strip() for word in words(tokenizer, tokens))
    return promoted


def texts_of(source: TrainingSource, n: int, max_length: int) -> Iterator[TokenizedSide]:
    """Yield the first conversations of the training data: of harmful requests, then of harmless ones."""
    for dataset in (source.safety, source.helpful):
        for row in [] if dataset is None else dataset.select(range(min(n, len(dataset)))).to_list():
            yield tokenize_response(source.tokenizer, row["prompt"], row["chosen"], max_length)
