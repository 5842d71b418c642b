"""Answers of an LLM judge, read strictly.

An answer counts if it carries the marker of its request and one of the answers allowed. No text that is judged can
hold that marker (see `shielding`), so that no score is ever taken from it, also where the judge quotes it. All else is
unscored, with the judge's words as the explanation.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sails_align.evaluation.records import Completion, Message, Verdict

EXPLANATION_LIMIT = 500
"""Characters of an answer that are kept."""

# What reasoning models write before their answer; it may begin in the chat template, so that only its end is there.
_REASONING = re.compile(r"\A.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)
_OPEN_REASONING = re.compile(r"\s*<(?:think|thinking|reasoning)>", re.IGNORECASE)
_REFUSAL = re.compile(
    r"""\W*(?:sorry\b | i\W?(?:\ a)?m\ (?:very\ |so\ )?(?:sorry|unable|not\ able)\b | i\ apologi[sz]e\b
    | (?:unfortunately,?\ |sorry,?\ )?(?:i|we)\ (?:can\s?not|can\Wt|won\Wt|will\ not|(?:must\ )?decline)\b)""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class Question:
    """One request to the judge."""

    conversation: tuple[Message, ...]
    mark: str
    """What its answer must carry."""
    key: str
    """Under which its answer gives a choice."""
    scores: Mapping[int | str, float]
    """What each choice means on the scale of the task."""


def read(question: Question, completion: Completion) -> Verdict:
    """The verdict in a judge's answer, or why there is none."""
    if completion.finish_reason == "content_filter":
        return Verdict(None, "refused by the judge", excerpt(completion.text or completion.error or ""))
    if completion.finish_reason == "length":  # what is cut off might have gone on to say something else
        return Verdict(None, "unparsable verdict", excerpt(f"(cut off) {completion.text or completion.error or ''}"))
    if completion.text is None:
        return Verdict(None, "server error", excerpt(completion.error or "there is no text"))
    own = _REASONING.sub("", completion.text, count=1)
    found = [] if _OPEN_REASONING.match(own) else _choices(question, own)
    if len(set(found)) == 1 and found[0] is not None:
        return Verdict(question.scores[found[0]], None, excerpt(own))
    refused = not found and _REFUSAL.match(own)
    return Verdict(None, "refused by the judge" if refused else "unparsable verdict", excerpt(completion.text))


def _choices(question: Question, own: str) -> list[int | str | None]:
    """What each object with the marker chooses; None for one that chooses nothing allowed."""
    answers = [answer for answer in _objects(own) if _text(answer.get("id")) == question.mark]
    if answers:
        return [_allowed(question, answer.get(question.key)) for answer in answers]
    # The last resort: nothing but the marker and a choice, in plain words.
    # No sign, point or slash before or in a number: "-4", "4.5" and "4/10" are none of the answers.
    pattern = rf"""\W*(?:id\W+)?{question.mark}\W+{question.key}[\s:="'*]+(\w+)\W*"""
    if plain := re.fullmatch(pattern, own, re.IGNORECASE):
        return [_allowed(question, int(plain[1]) if re.fullmatch(r"[0-9]{1,3}", plain[1]) else plain[1])]
    return []


def _allowed(question: Question, choice: object) -> int | str | None:
    # JSON's true and 1.0 equal 1, but are none of the answers.
    is_choice = type(choice) in (int, str) and choice in question.scores
    return choice if is_choice else None  # pyright: ignore[reportReturnType] -- an int or str


def _text(value: object) -> str | None:
    return value.strip() if isinstance(value, str) else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects in a text, outermost ones only. One that names a key twice is none: it may say two things."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, strict=False)  # line breaks within strings are common
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):  # also of numbers too long, and of nesting too deep
            end = start + 1
        start = text.find("{", end)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is named twice")
    return found


def excerpt(text: str) -> str:
    """The beginning of a text, without half surrogates, which no file takes."""
    return text.strip()[:EXPLANATION_LIMIT].encode("utf-8", "replace").decode()
