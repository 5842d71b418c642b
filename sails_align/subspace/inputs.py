"""Define the inputs of discovery: a model, and data with two sides."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide, tokenize_prompt, tokenize_response
from sails_align.subspace.margin import BegunResponse, begun_response
from sails_align.subspace.options import BY_EFFECT, DiscoveryOptions
from sails_align.subspace.separation import BENIGN
from sails_align.subspace.statistics import contrasts_of

logger = logging.getLogger(__name__)
Sequence_ = TypeVar("Sequence_", bound=TokenizedSide)


@dataclass(frozen=True)
class DiscoveryModel:
    """A model for discovery: in memory, or named for `from_pretrained`; only the needed blocks are loaded."""

    name: str
    """Name in messages and in the metadata of its SAEs."""
    config: PreTrainedConfig
    identity: dict[str, Any]
    """Hashes of its files, or a commit on the hub; part of the key of a cached subspace."""
    path: str | None = None
    loaded: PreTrainedModel | None = None
    """The model in memory, in place of `path`."""
    dtype: str = "float32"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def d_model(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def n_layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers


@dataclass(frozen=True)
class DiscoveryData:
    """The two sides of the contrasts, as conversations."""

    tokenizer: PreTrainedTokenizerBase
    pairs: Dataset
    """Harmful requests (`prompt`, messages) with a `chosen` response and, for the response contrast, a `rejected`."""
    harmless: Dataset | None
    """Harmless requests, with or without a `chosen` response."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that could not be used, counted by cause."""


class Sides(Generic[Sequence_]):
    """Sequences of one side of a contrast, tokenized as they are asked for."""

    def __init__(self, dataset: Dataset, tokenize: Callable[[Any], Sequence_]) -> None:
        self.dataset, self.tokenize = dataset, tokenize

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Sequence_]:
        return (self.tokenize(row) for row in self.dataset)


def contrast_data(
    data: DiscoveryData,
    options: DiscoveryOptions,
    share: tuple[int, int] = (0, 1),
    *,
    with_benign: bool = False,
) -> dict[str, dict[str, Sides[TokenizedSide]]]:
    """Return a share (its number, and the number of shares) of the contrasts' sequences.

    They are chosen against rejected responses, and harmless against harmful prompts; `with_benign`, the prompts in any
    case, and the responses to harmless ones, if any.
    """
    tokenizer, max_length = data.tokenizer, options.max_length

    def response(column: str) -> Any:
        return lambda row: tokenize_response(tokenizer, row["prompt"], row[column], max_length)

    def prompt(row: dict[str, Any]) -> TokenizedSide:
        return tokenize_prompt(tokenizer, row["prompt"], max_length, tokens=options.prompt_tokens)  # pyright: ignore[reportArgumentType]

    pairs = _some(data.pairs, options, share)
    contrasts: dict[str, dict[str, Sides[TokenizedSide]]] = {}
    wanted = contrasts_of(options.contrast)
    if "response" in wanted:
        contrasts["response"] = {
            "aligned": Sides(pairs, response("chosen")),
            "unaligned": Sides(pairs, response("rejected")),
        }
    if "prompt" in wanted or with_benign:
        assert data.harmless is not None
        harmless = _some(data.harmless, options, share)
        contrasts["prompt"] = {"aligned": Sides(harmless, prompt), "unaligned": Sides(pairs, prompt)}
        if with_benign and "chosen" in harmless.column_names:
            contrasts[BENIGN] = {"aligned": Sides(harmless, response("chosen"))}
    return contrasts


def margin_data(
    data: DiscoveryData, options: DiscoveryOptions, share: tuple[int, int] = (0, 1)
) -> dict[str, Sides[BegunResponse]]:
    """Return, by side, a share of the harmful requests, each with the first tokens of its response."""

    def begun(column: str) -> Callable[[dict[str, Any]], BegunResponse]:
        def tokenize(row: dict[str, Any]) -> BegunResponse:
            return begun_response(
                data.tokenizer, row["prompt"], row[column], options.max_length, prompt_tokens=options.prompt_tokens
            )

        return tokenize

    pairs = _some(data.pairs, options, share)
    return {"aligned": Sides(pairs, begun("chosen")), "unaligned": Sides(pairs, begun("rejected"))}


def _some(dataset: Dataset, options: DiscoveryOptions, share: tuple[int, int]) -> Dataset:
    n = min(options.max_discovery_examples, len(dataset))
    chosen = dataset if n == len(dataset) else dataset.shuffle(seed=options.seed).select(range(n))
    return chosen if share[1] == 1 else chosen.select(range(share[0], n, share[1]))


def check_score(options: DiscoveryOptions, data: DiscoveryData) -> None:
    """Raise `InputError` if the data lacks what the score of features needs."""
    if options.score in BY_EFFECT and "rejected" not in data.pairs.column_names:
        raise InputError(
            f"score is {options.score}, which needs the effect on how much likelier chosen responses are than rejected "
            "ones, but the data has no rejected ones;\n"
            "give preference data (or labelled rows with --bad_responses pair), or use --score mean_diff"
        )


def suited_to_data(options: DiscoveryOptions, data: DiscoveryData) -> DiscoveryOptions:
    """Return the options with a contrast that suits the data; raise `InputError` if the named one does not."""
    contrast = options.contrast
    if contrast != "response" and data.harmless is None:
        if "contrast" in options.given:
            raise InputError(
                f"contrast is {contrast}, but there are no harmless prompts to compare harmful ones with;\n"
                "give --helpful_dataset_name, or use --contrast response"
            )
        logger.warning("no helpful data: the contrast is that of the responses alone (--contrast response)")
        contrast = "response"
    if contrast != "prompt" and "rejected" not in data.pairs.column_names:
        raise InputError(
            f"contrast {contrast} compares chosen with rejected responses, but the data has no rejected ones;\n"
            "give preference data (or labelled rows with --bad_responses pair), or use --contrast prompt with "
            "--helpful_dataset_name"
        )
    return replace(options, contrast=contrast)


def needs_moments(options: DiscoveryOptions, data: DiscoveryData) -> bool:
    """Return whether prompts are also compared by hidden states; raise `InputError` if that needs harmless ones."""
    asked = {"benign_whitening": options.benign_whitening, "layer_map": options.layer_map == "from_onset"}
    if not any(asked.values()):
        return False
    if data.harmless is not None:
        return True
    given = [name for name, is_asked in asked.items() if is_asked and name in options.given]
    if given:
        raise InputError(
            f"{given[0]} is {getattr(options, given[0])}, but there are no harmless prompts to look at;\n"
            "give --helpful_dataset_name, or leave it out"
        )
    logger.warning("no helpful data: all blocks have adapters, and nothing is ranked against harmless conversations")
    return False
