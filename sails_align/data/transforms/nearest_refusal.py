"""Learn for each harmful request the nearest acceptable answer of a pool, not one stock refusal.

SafeR-CLIP (arXiv 2511.16743) redirects an unsafe caption to the nearest safe one, so that as little as possible of what
the model knows has to change. Here the request x is the unsafe text and refusals y are the safe ones:

    target(x) = argmax over y in the pool of cos(h(x) - mean h(x'), h(y) - mean h(y'))

h is a hidden state of the frozen base model (`training.reader`), in which each text stands as a user's message. The
means, over all requests and over the pool, are what requests or refusals share; it says nothing about which belong
together, and without its removal all cosines would be near 1.

The pool holds no text that is not a refusal (`data.refusals`). Cosines are rounded to four digits, so that rounding
errors hardly ever choose another target.

Shapes: N requests, M answers of the pool, D d_model.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from torch import Tensor
from torch.nn.functional import normalize as unit

from sails_align.core.log import say
from sails_align.data.formats import ANSWERS, find_format
from sails_align.data.loading import load_rows
from sails_align.data.messages import user
from sails_align.data.options import NearestRefusalOptions
from sails_align.data.pairs import AlignmentExamples, Reader, normalize
from sails_align.data.refusals import harmful_rows, refusals_among
from sails_align.data.rows import columns_by_lower_name

SIMILARITY = "similarity"
"""Column: the cosine of a request and its target; None in rows that keep their response."""
CHUNK = 4096
"""Requests that are compared with the pool at once."""


def transform(examples: AlignmentExamples, options: NearestRefusalOptions, seed: int) -> AlignmentExamples:
    """Replace the chosen responses of harmful requests; rows whose column `harmful` is false keep theirs.

    Raises `InputError` if there are no refusals in the pool.
    """
    if not options.nearest_refusal:
        return examples
    pairs, reader = examples.safety, examples.reader
    assert reader is not None, "trainings have one"
    replaced = harmful_rows(pairs)
    pool = _pool(options, pairs.select(replaced), reader)
    tokens: Any = options.refusal_tokens
    requests_ND = reader.embed([pairs[index]["prompt"] for index in replaced], tokens)
    pool_MD = reader.embed([[user(text)] for text in pool], tokens)
    cosines_of = _Cosines(requests_ND, pool_MD)
    targets_N = cosines_of.nearest()
    if options.refusal_control_seed is not None:
        targets_N = np.random.default_rng(options.refusal_control_seed).permutation(targets_N)
    cosines_N = cosines_of.at(targets_N)
    say(
        f"    nearest refusals: {len(set(targets_N.tolist()))} of the {len(pool)} in the pool are used; "
        f"mean similarity {cosines_N.mean() if len(cosines_N) else 0.0:.2f}"
    )
    made = {
        index: {"chosen": pool[target], SIMILARITY: cosine}
        for index, target, cosine in zip(replaced, targets_N.tolist(), cosines_N.tolist(), strict=True)
    }

    def with_target(row: dict[str, Any], index: int) -> dict[str, Any]:
        return made.get(index, {SIMILARITY: None})

    features = Features({**pairs.features, SIMILARITY: Value("float64")})
    safety = pairs.map(with_target, with_indices=True, features=features, keep_in_memory=True)
    return replace(examples, safety=safety, train=safety)


def _pool(options: NearestRefusalOptions, own: Dataset, reader: Reader) -> list[str]:
    """Return the different refusals of the pool, in their order; raise `InputError` if there are none."""
    name = options.refusal_dataset_name
    texts = own["chosen"] if name is None else _responses(name)
    different = list(dict.fromkeys(text.strip() for text in texts if text and text.strip()))
    remedy = "give refusals with --refusal_dataset_name FILE, or leave --nearest_refusal out"
    refusals = refusals_among(
        different, reader.is_refusal, source=name or "the safety data", user="nearest_refusal", remedy=remedy
    )
    return [different[number] for number in refusals]


def _responses(name: str) -> list[str]:
    """Return the responses of a data set in any known format, or one that has nothing but a column of responses."""
    rows = load_rows(name)
    columns = columns_by_lower_name(rows)
    column = next((columns[answer] for answer in ANSWERS if answer in columns), None)
    if find_format(columns) is None and column is not None:
        return list(map(str, rows[column]))
    return list(normalize(rows, name=name, on_bad_rows="skip").dataset["chosen"])


class _Cosines:
    """Cosines of requests and answers, each side without its mean, rounded to four digits."""

    def __init__(self, requests_ND: Tensor, pool_MD: Tensor) -> None:
        self._requests_ND, self._pool_MD = (unit(each - each.mean(0), dim=1) for each in (requests_ND, pool_MD))

    def nearest(self) -> np.ndarray:
        """Return the index of each request's nearest answer, the first of several. (N,)"""
        chunks = [(chunk_CD @ self._pool_MD.T).round(decimals=4) for chunk_CD in self._requests_ND.split(CHUNK)]
        # numpy's argmax returns the first of equal values, which torch does not promise.
        return np.concatenate([cosines_CM.numpy().argmax(1) for cosines_CM in chunks]).astype(np.int64)

    def at(self, targets_N: np.ndarray) -> np.ndarray:
        """Return the cosine of each request and an answer. (N,)"""
        return (self._requests_ND * self._pool_MD[targets_N]).sum(1).round(decimals=4).numpy()
