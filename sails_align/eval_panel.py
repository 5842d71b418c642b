"""Judges that score together, how far they agree, and how much they left unscored."""

import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sails_align.errors import InputError
from sails_align.eval_run import verdicts_of
from sails_align.evaluation.agreement import cohen_kappa, krippendorff_alpha, vote
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.records import Item, Judge, Task, Verdict
from sails_align.evaluation.rules import RulesJudge


class Panel:
    """One judge, or several that vote."""

    def __init__(self, judges: Sequence[Judge], cache: Cache, *, retry_failed: bool = False, progress: bool = True):
        self._judges = list(judges)
        self._cache, self._options = cache, {"retry_failed": retry_failed, "progress": progress}
        self.members = {judge.name: judge.binary for judge in judges}
        """Name -> whether its harm scores are 1 and 5 only."""
        self.binary = all(judge.binary for judge in judges)

    def can(self, task: Task) -> bool:
        """Whether any of them can be asked this."""
        return any(task in judge.tasks for judge in self._judges)

    def _asked(self, task: Task) -> list[Judge]:
        """Those that can be asked; for refusals, if none can, one that knows refusal phrases."""
        able = [judge for judge in self._judges if task in judge.tasks]
        if able or task != "refusal":
            return able
        return [RulesJudge()]

    def judge(self, task: Task, items: Sequence[Item | None]) -> dict[str, list[Verdict]]:
        """Verdicts in order, by judge, and their `vote`.

        Raises:
            InputError: if none of them can be asked this.
        """
        asked = self._asked(task)
        if not asked:
            names = ", ".join(judge.name for judge in self._judges)
            raise InputError(f"none of the judges ({names}) can be asked for {task}; choose another --judge")
        by_judge = {judge.name: verdicts_of(judge, task, items, self._cache, **self._options) for judge in asked}
        worse = task in ("helpfulness", "correctness", "preference")
        votes = [
            together[0] if len(together) == 1 else vote(together, lower_is_worse=worse)
            for together in zip(*by_judge.values(), strict=True)
        ]
        return {**by_judge, "vote": votes}

    def agreement(self, verdicts: Mapping[Task, Mapping[str, Mapping[int, Verdict]]]) -> dict[str, Any]:
        """Cohen's kappa of each pair of judges (over what both scored; harm by squared distance) and Krippendorff's
        alpha of all, by task."""
        result: dict[str, Any] = {}
        for task, by_judge in verdicts.items():
            scores = {
                name: [of[index].score for index in sorted(of)] for name, of in by_judge.items() if name != "vote"
            }
            if len(scores) < 2:
                continue
            graded = task in ("harm", "helpfulness") and not self.binary
            result[task] = {
                "cohen_kappa": {
                    f"{one}, {other}": cohen_kappa(scores[one], scores[other], weights="quadratic" if graded else None)
                    for one, other in itertools.combinations(scores, 2)
                },
                "krippendorff_alpha": krippendorff_alpha(
                    list(scores.values()), level="ordinal" if graded else "nominal"
                ),
            }
        return result

    def notes(self, verdicts: Mapping[Task, Mapping[str, Mapping[int, Verdict]]]) -> list[str]:
        """What a reader of the rates must know about the judges."""
        weak = [task for task, by_judge in verdicts.items() if "rules" in by_judge]
        if not weak:
            return []
        return [f"{', '.join(weak)}: the judge `rules` looks for refusal phrases only, which is weak evidence"]

    def identities(self) -> dict[str, Any]:
        """What decides each judge's verdicts."""
        return {judge.name: {task: judge.identity(task) for task in sorted(judge.tasks)} for judge in self._judges}

    def close(self) -> None:
        """Close the judges."""
        for judge in self._judges:
            judge.close()


def unscored(votes: Mapping[Task, Mapping[int, Verdict]]) -> dict[str, Any]:
    """How many verdicts there are, how many of them are no score, and why."""
    verdicts = [verdict for of_task in votes.values() for verdict in of_task.values()]
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    n = reasons.total()
    return {"n_verdicts": len(verdicts), "n": n, "share": n / len(verdicts) if verdicts else 0.0, "reasons": reasons}


def fail_if_unscored(counted: Mapping[str, Any], limit: float) -> None:
    """End the command with exit code 1 if too much is unscored for the rates to be trusted."""
    if counted["share"] <= limit:
        return
    causes = ", ".join(f"{reason}: {n}" for reason, n in counted["reasons"].items())
    print(
        f"{counted['n']} of {counted['n_verdicts']} verdicts are unscored ({causes}), more than max_unscored "
        f"({limit:.1%});\nthe rates leave them out: see their bounds. --retry_unscored asks for these alone again",
        file=sys.stderr,
    )
    raise SystemExit(1)
