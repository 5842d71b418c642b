"""Say in words how a response was judged, match the prompts of two models, and say what changed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from sails_align.core.errors import InputError
from sails_align.evaluation.metrics import SAFE
from sails_align.evaluation.output import conversation_hash
from sails_align.evaluation.records import VOTE, Prompt, Verdict
from sails_align.reporting.viewer.runs import ViewedRun

REFUSED, ANSWERED, UNSCORED, NOT_JUDGED = "refused", "answered", "unscored", "not judged"
CHANGES = ("refused → answered", "answered → refused", "other scores", "same scores")
"""In the order in which they are shown."""
GRADED = ("harm", "helpfulness", "likeness")
"""Tasks whose scores are shown as numbers."""
IN_WORDS = {
    "refusal": {1.0: REFUSED, 0.0: ANSWERED},
    "correctness": {1.0: "correct", 0.0: "wrong"},
    "preference": {1.0: "better than the reference", 0.5: "as good as the reference", 0.0: "worse than the reference"},
}


def votes_on(run: ViewedRun, place: int) -> dict[str, Verdict]:
    """Return what all judges together say of a response, by task."""
    return {task: by_judge[VOTE][place] for task, by_judge in run.verdicts.items() if place in by_judge[VOTE]}


def outcome(votes: dict[str, Verdict]) -> Literal["refused", "answered"] | None:
    """Return whether a prompt was refused: a harmful one is if its score is one that is safe. None: it is not known."""
    if (harm := votes.get("harm")) is not None and harm.score is not None:
        return REFUSED if harm.score <= SAFE else ANSWERED
    if (refusal := votes.get("refusal")) is not None and refusal.score is not None:
        return REFUSED if refusal.score else ANSWERED
    return None


def words_of(votes: dict[str, Verdict]) -> list[str]:
    """Return what is said of a response: `refused`, `harm 2`, `correct`, `unscored`, ..."""
    if not votes:
        return [NOT_JUDGED]
    known = outcome(votes)
    words = [] if known is None else [known]
    for task, vote in votes.items():
        if vote.score is None:
            words.append(UNSCORED)
        elif task in GRADED:
            words.append(f"{task} {vote.score:.3g}")
        else:
            words.append(IN_WORDS[task].get(vote.score, f"{task} {vote.score:.3g}"))
    return list(dict.fromkeys(words))


def change(first: dict[str, Verdict], second: dict[str, Verdict]) -> int:
    """Return the place in `CHANGES` of what two models' votes on a prompt differ in."""
    if (one := outcome(first)) is not None and (two := outcome(second)) is not None and one != two:
        return CHANGES.index(f"{one} → {two}")
    is_same = {task: vote.score for task, vote in first.items()} == {task: vote.score for task, vote in second.items()}
    return CHANGES.index("same scores" if is_same else "other scores")


def pairs(first: ViewedRun, second: ViewedRun) -> list[tuple[int, int]]:
    """Return the places of the prompts that two models have in common, by their conversations: what changed first.

    Raises `InputError` if there are none.
    """
    theirs = {key: place for place, key in enumerate(_keys(second.prompts))}
    common = [(place, theirs[key]) for place, key in enumerate(_keys(first.prompts)) if key in theirs]
    if not common:
        raise InputError(
            f"{first.name} and {second.name} have no prompt in common, so there is nothing to compare;\n"
            "evaluate both on the same prompts (sails eval safety --compare does)"
        )
    return sorted(common, key=lambda pair: change(votes_on(first, pair[0]), votes_on(second, pair[1])))


def _keys(prompts: Iterable[Prompt]) -> list[tuple[str, int]]:
    """Return the hash of each conversation, and how often it came before."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        key = conversation_hash(prompt.conversation)
        keys.append((key, seen[key]))
        seen[key] += 1
    return keys


def only_in(runs: Sequence[ViewedRun], n_common: int) -> str:
    """Return a sentence on the prompts that only one of two models has; empty if there are none."""
    lacking = [f"{len(run.prompts) - n_common} only of {run.name}" for run in runs if len(run.prompts) > n_common]
    return f"Left out are prompts that one of them alone has: {', '.join(lacking)}." if lacking else ""
