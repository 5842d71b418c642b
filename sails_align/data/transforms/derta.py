"""Teach the model to refuse in the middle of a harmful answer (DeRTa, Yuan et al. 2024, arXiv 2407.09121, eq. 2).

Plain refusals are learned at the first token of a response only, so a model that was brought to begin a harmful answer
goes on with it. DeRTa makes two kinds of examples of a preference pair (request, refusal, harmful answer):

- prefix: the request and the first k words of the harmful answer are read, the refusal is learned. k is uniform from 1
  to two words less than the answer has; in a share of them k is 0, as in a plain refusal.
- RTO, reinforced transition optimization: at every token of the whole harmful answer and at its end, the first token of
  the refusal is learned.

The columns `prefill` and `transition` say so; `data.prefilled` makes tokens and labels of them. As in the paper, the
loss is one mean over all tokens, in which an RTO example counts as many tokens as its harmful answer has.
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets

from sails_align.core.errors import InputError
from sails_align.data.options import DertaOptions
from sails_align.data.pairs import AlignmentExamples
from sails_align.data.prefilled import PREFILL, TRANSITION


def transform(examples: AlignmentExamples, options: DertaOptions, seed: int) -> AlignmentExamples:
    """Put prefix examples in the place of refusals, and add RTO examples; discovery still sees the pairs."""
    if options.used is None:
        return examples
    pairs = examples.train
    if "rejected" not in pairs.column_names:
        raise InputError(
            f"{options.used} is {getattr(options, options.used)}, but the safety data has no rejected responses, which "
            "are the harmful answers;\nleave it out, or give pairs"
        )
    rng = np.random.default_rng([seed, 1])  # not the draws of other transforms
    chosen = rng.permutation(len(pairs))[: round(options.derta_prefix_share * len(pairs))]
    with_words = set(chosen[round(options.derta_empty_share * len(chosen)) :].tolist())
    texts = list(pairs["rejected"])
    prefills = [first_words(text, drawn(text, rng)) if i in with_words else "" for i, text in enumerate(texts)]
    of_rto = np.sort(rng.permutation(len(pairs))[: round(options.derta_rto_share * len(pairs))])
    refusals = with_columns(pairs, lambda row, index: {PREFILL: prefills[index], TRANSITION: None})
    rto = with_columns(
        pairs.select(of_rto),
        lambda row, index: {PREFILL: row["rejected"].strip(), TRANSITION: options.derta_refusal or row["chosen"]},
    )
    return replace(examples, train=concatenate_datasets([refusals, rto]) if len(rto) else refusals)


def drawn(text: str, rng: np.random.Generator) -> int:
    """Draw the number of words of a prefix: from 1 to two less than the text has, and 1 of three words or fewer."""
    return int(rng.integers(1, max(2, len(text.split()) - 1)))


def first_words(text: str, n: int) -> str:
    """Return a text up to its n-th word, with the white space between words as it is; all of it if it has fewer."""
    words = list(re.finditer(r"\S+", text))
    return text[words[0].start() : words[min(n, len(words)) - 1].end()] if words and n else ""


def with_columns(pairs: Dataset, made: Any) -> Dataset:
    """Add the two columns, made of a row and its place."""
    features = Features({**pairs.features, PREFILL: Value("string"), TRANSITION: Value("string")})
    return pairs.map(made, with_indices=True, features=features, keep_in_memory=True, desc="Marking rows")
