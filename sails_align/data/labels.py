"""Read labels: columns that say whether a row's response is one to learn from.

Known columns are used by their meaning. Any other column that looks like a label is refused until the user says what it
means, because a response that is labelled bad must not be trained on.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Value

from sails_align.core.errors import InputError
from sails_align.data.formats import NO_LABEL, Columns, Format
from sails_align.data.messages import BadRowError

logger = logging.getLogger(__name__)

GOOD = "labelled_good"
"""The column of rows that have a label, until `use_labels` has used it."""
_TRUTH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_SAFETY = {"safe": True, "unsafe": False, "unharmful": True, "harmless": True, "harmful": False}
MEANINGS: Mapping[str, Mapping[str, bool]] = {
    "is_safe": {**_TRUTH, **_SAFETY},  # BeaverTails, PKU-SafeRLHF-QA
    "is_response_safe": {**_TRUTH, **_SAFETY},
    "label": {"true": True, "false": False, **_SAFETY},  # KTO; the numbers mean good in one set and toxic in another
    "kto_tag": _TRUTH,  # LLaMA-Factory
    "response_harm_label": _SAFETY,  # WildGuardMix
    "response_label": _SAFETY,  # Aegis 2.0
}
"""Known label columns: value in lower case -> whether the response is good."""
OF_PROMPTS = {"harmful", "kind", "adversarial", "prompt_label", "prompt_harm_label", "prompt_harm_agreement"}
"""Columns that say something of the prompt alone."""
BESIDE = {
    "response_harm_label": {"response_refusal_label", "response_refusal_agreement", "response_harm_agreement"},
    "response_label": {"prompt_label_source", "response_label_source", "violated_categories"},
    "is_safe": {"severity_level", "harm_category"},
}
"""Columns that a known label makes superfluous."""
_WORDS = re.compile(
    "label(l?ed|s)?|(un)?safer?|safety|harm(ful|less|lessness)?|toxic(ity)?|scores?|ratings?|quality|prefer(red|ence)|"
    "accept(ed|able)|approved|chosen|rejected|good|bad|better|best|worse|worst|(in)?correct|verdict|flag(ged)?|"
    "violat(es|ion|ing)|refus(al|ed)|compliance|complied|judge?ment|severity|reward|rank|votes?|winner|desirable|"
    "helpful(ness)?|jailbroken|success|grade|moderation|valid|pass(ed)?|keep|is"
)
"""Words in the name of a column that looks like a label."""
_OF_PAIRS = re.compile("labels?|prefer(red|ence)|better|safer|best|winner|verdict")
"""The same, where there are pairs: scores of theirs are not in doubt."""
_VERDICTS = frozenset([*_SAFETY, "true", "false", "good", "bad", "toxic", "refusal", "compliance", "yes", "no"])
_OPPOSITES = _VERDICTS.union(
    *[("y", "n"), ("ok", "nontoxic", "non-toxic", "benign", "malicious"), ("refused", "complied"), ("pass", "fail")],
    *[("accept", "reject", "accepted", "rejected", "acceptable", "unacceptable"), ("correct", "incorrect")],
    *[("right", "wrong"), ("positive", "negative")],
)
"""Words that are verdicts if there are others beside them."""
_SCORES = [
    (f"{name}{mark}{side}", f"{name}{mark}{other}") if before else (f"{side}{mark}{name}", f"{other}{mark}{name}")
    for name in ("score", "rating", "reward", "avg_rating")
    for mark in ("_", "-")
    for before in (True, False)
    for side, other in [("chosen", "rejected")]
]
"""Columns of the scores of the two responses of a pair (UltraFeedback and others), of which the first is the higher."""


@dataclass(frozen=True)
class Label:
    """A label column and the meaning of its values."""

    column: str
    meaning: Mapping[str, bool]
    good: frozenset[str] | None = None
    """The good values, if the user named them; all others are bad then."""

    def is_good(self, row: Mapping[str, Any]) -> bool:
        """Return what a row's label says; raise `BadRowError` if it says nothing."""
        value = row[self.column]
        if value is None or not str(value).strip():
            raise BadRowError(f"{self.column}, a label, is empty")
        text = _as_text(value)
        if self.good is not None:
            return text in self.good
        if text not in self.meaning:
            raise BadRowError(
                f"{self.column} is a label of unknown meaning ({text[:20]}); name its good values with --good_labels"
            )
        return self.meaning[text]


def find_labels(dataset: Dataset, columns: Mapping[str, str], form: Format, name: str, asked: Columns) -> list[Label]:
    """Return the labels of a dataset.

    Args:
        dataset: has the `columns`, lower-case name -> name.
        columns: see `dataset`.
        form: its format. The responses of pairs are told apart already.
        name: for messages.
        asked: what the user says of them.

    Raises:
        InputError: if there is no such column, or another one looks like a label.
    """
    option = f"--{asked.prefix}label_column"
    if asked.label is not None and asked.label.lower() == NO_LABEL:
        return []
    if asked.label is not None:
        column = asked.label.lower()
        if column not in columns:
            raise InputError(
                f"{name} has no column {asked.label!r} for the label; it has {', '.join(dataset.column_names)}.\n"
                f"Correct {option}"
            )
        good = None if asked.good_labels is None else frozenset(map(_as_text, asked.good_labels))
        if good is None and column not in MEANINGS:
            raise InputError(
                f"which values of {asked.label} in {name} are good?\nName them with --good_labels, such as true"
            )
        return [Label(column, MEANINGS.get(column, {}), good)]
    found = [] if form.paired else [column for column in MEANINGS if column in columns]
    used = {*form.reads, *found, *OF_PROMPTS, *(other for column in found for other in BESIDE.get(column, ()))}
    for column in columns:
        feature = dataset.features[columns[column]]
        if found and (feature == Value("bool") or isinstance(feature, dict)):
            continue  # kinds of harm, which a known label sums up
        if column not in used and _looks_like_label(dataset, columns[column], form):
            raise InputError(
                f"{name} has a column {columns[column]!r} that looks like a label of responses, and its meaning is not "
                f"known.\nGive {option} {columns[column]} with --good_labels (the values of good responses), "
                f"or {option} none if all are good"
            )
    for column in found:
        feature = dataset.features[columns[column]]
        values = dataset.unique(columns[column]) if isinstance(feature, Value) else []
        said = sorted({_as_text(value) for value in values if value is not None and str(value).strip()})
        if said and not MEANINGS[column].keys() & said:
            raise InputError(
                f"the label {columns[column]!r} of {name} has the values {', '.join(said[:5])}, and it is not known "
                f"which are those of good responses.\nGive {option} {columns[column]} with --good_labels {said[-1]} "
                f"(or the other values of good responses), or {option} none if all are good"
            )
    return [Label(column, MEANINGS[column]) for column in found]


def _as_text(value: Any) -> str:
    text = str(value).strip().lower()
    return text.removesuffix(".0")  # a column of numbers in which some are missing


def _looks_like_label(dataset: Dataset, column: str, form: Format) -> bool:
    words, feature = _words(column), dataset.features[column]
    if form.paired:
        return any(map(_OF_PAIRS.fullmatch, words)) and not {"chosen", "rejected"}.intersection(words)
    if any(map(_WORDS.fullmatch, words)) or feature == Value("bool"):
        return True
    if isinstance(feature, dict):  # such as `metadata`
        names = [word for name in feature for word in _words(name)]
        return any(map(_WORDS.fullmatch, names)) or Value("bool") in feature.values()
    if not isinstance(feature, Value) or not re.match("(large_)?string|u?int|float|double", feature.dtype):
        return False
    return _are_verdicts(dataset[:1000][column]) and _are_verdicts(dataset.unique(column), len(dataset))


def _are_verdicts(values: Sequence[Any], n: int = 0) -> bool:
    """Whether the values can be labels; the numbers of few rows cannot, since they may be what they count."""
    different = {_as_text(value) for value in values if value is not None and str(value).strip()}
    if different and different <= {"0", "1", "-1"}:
        return n == 0 or (different in ({"0", "1"}, {"-1", "1"}, {"-1", "0", "1"}) and n > 2)
    several = n == 0 or len(different) > 1  # n == 0: a part of the rows, and the others are still to be seen
    return bool(different) and different <= (_OPPOSITES if several else _VERDICTS)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())


def score_columns(columns: Iterable[str]) -> tuple[str, str] | None:
    """Return the columns of the scores of chosen and rejected responses, if there are such."""
    present = set(columns)
    return next((pair for pair in _SCORES if present.issuperset(pair)), None)


def check_scores(row: Mapping[str, Any], columns: tuple[str, str] | None) -> None:
    """Raise `BadRowError` if the chosen response of a pair has a lower score than the rejected one."""
    if columns is None:
        return
    chosen, rejected = (_number(row[column]) for column in columns)
    if chosen is not None and rejected is not None and chosen < rejected:
        raise BadRowError(f"{columns[0]} is less than {columns[1]}, so the rejected response is the better one")


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


# -- using them --------------------------------------------------------------------------------------------------------


def use_labels(rows: Dataset, pair: bool, name: str) -> tuple[Dataset, dict[str, int], int]:
    """Leave out the rows labelled bad; or pair their responses, as rejected ones, with the good ones to their prompt.

    A response that is labelled both good and bad counts as bad. Returns the rows without the column of the label, how
    many were left out, by cause, and how many became rejected ones. Raises `InputError` if none is left.
    """
    labels: list[bool] = rows[GOOD][:]
    rows = rows.remove_columns(GOOD)
    keys = [(json.dumps(row["prompt"]), row["chosen"]) for row in rows]  # pyright: ignore
    bad = {key: None for key, is_good in zip(keys, labels, strict=True) if not is_good}
    kept = [index for index, key in enumerate(keys) if labels[index] and key not in bad]
    dropped = {
        "the response is labelled bad": labels.count(False),
        "the response is labelled both good and bad": labels.count(True) - len(kept),
    }
    n_paired = 0
    if pair and "rejected" not in rows.column_names:
        by_prompt: dict[str, list[str]] = {}
        for prompt, response in bad:
            by_prompt.setdefault(prompt, []).append(response)
        good = [index for index in kept if keys[index][0] in by_prompt]
        dropped["no response to the prompt is labelled bad"] = len(kept) - len(good)
        turns: dict[str, int] = {}
        rejected: list[str] = []
        for index in good:
            prompt = keys[index][0]
            turn = turns[prompt] = turns.get(prompt, -1) + 1
            rejected.append(by_prompt[prompt][turn % len(by_prompt[prompt])])
        used = {(keys[index][0], text) for index, text in zip(good, rejected, strict=True)}
        n_paired = sum(key in used for key, is_good in zip(keys, labels, strict=True) if not is_good)
        dropped["the response is labelled bad"] -= n_paired
        kept = good
        rows = rows.select(kept).add_column("rejected", rejected) if kept else rows  # pyright: ignore
    elif len(kept) < len(rows):
        rows = rows.select(kept)
    dropped = {cause: n for cause, n in dropped.items() if n}
    report = ", ".join(f"{cause}: {n}" for cause, n in dropped.items())
    if not kept:
        raise InputError(f"{name} has no response to learn from ({report});\ngive other data, or see --bad_responses")
    if dropped:
        logger.warning(
            "%s: %d of %d rows are left out by their labels (%s)", name, sum(dropped.values()), len(labels), report
        )
    return rows, dropped, n_paired
