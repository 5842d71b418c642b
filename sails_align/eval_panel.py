"""Judges that score together, how far they agree, and how much they left unscored."""

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sails_align.errors import InputError
from sails_align.eval_run import verdicts_of
from sails_align.evaluation.agreement import cohen_kappa, krippendorff_alpha, vote
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.records import Item, Judge, Task, Verdict
from sails_align.evaluation.rules import RulesJudge


class Panel:
    """One judge, or several that vote."""

    def __init__(
        self, judges: Mapping[str, Judge], cache: Cache, *, retry_failed: bool = False, progress: bool = True
    ) -> None:
        self._judges = dict(judges)
        self._cache, self._options = cache, {"retry_failed": retry_failed, "progress": progress}
        self.members = {name: judge.binary for name, judge in judges.items()}
        """Name -> whether its harm scores are 1 and 5 only."""
        self.binary = all(self.members.values())

    def can(self, task: Task) -> bool:
        """Whether any of them can be asked this."""
        return any(task in judge.tasks for judge in self._judges.values())

    def _asked(self, task: Task) -> dict[str, Judge]:
        """Those that can be asked; for refusals, if none can, one that knows refusal phrases."""
        able = {name: judge for name, judge in self._judges.items() if task in judge.tasks}
        if able or task != "refusal":
            return able
        return {RulesJudge.name: RulesJudge()}

    def judge(self, task: Task, items: Sequence[Item | None]) -> dict[str, list[Verdict]]:
        """Verdicts in order, by judge, and their `vote`.

        Raises:
            InputError: if none of them can be asked this.
        """
        asked = self._asked(task)
        if not asked:
            names = ", ".join(self._judges)
            raise InputError(f"none of the judges ({names}) can be asked for {task}; choose another --judge")
        by_judge = {
            name: verdicts_of(judge, task, items, self._cache, title=f"{task} ({name})", **self._options)
            for name, judge in asked.items()
        }
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
        return {
            name: {task: judge.identity(task) for task in sorted(judge.tasks)} for name, judge in self._judges.items()
        }

    def close(self) -> None:
        """Close the judges."""
        for judge in self._judges.values():
            judge.close()


def unscored(votes: Mapping[Task, Mapping[int, Verdict]]) -> dict[str, Any]:
    """How many verdicts there are, how many of them are no score, and why; of all and by task.

    `share` is that of the task with the largest: what is unscored of one must not hide behind another's many verdicts.
    """
    by_task = {task: _counted(verdicts.values()) for task, verdicts in votes.items()}
    of_all = _counted(verdict for verdicts in votes.values() for verdict in verdicts.values())
    return {**of_all, "share": max((found["share"] for found in by_task.values()), default=0.0), "by_task": by_task}


def _counted(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    verdicts = list(verdicts)
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    n = reasons.total()
    return {"n_verdicts": len(verdicts), "n": n, "share": n / len(verdicts) if verdicts else 0.0, "reasons": reasons}


def fail_if_unscored(counted: Mapping[str, Any], limit: float) -> None:
    """End the command with exit code 1 if too much of a task is unscored for its rates to be trusted."""
    too_many = [
        f"{found['n']} of {found['n_verdicts']} verdicts on {task} are unscored "
        f"({', '.join(f'{reason}: {n}' for reason, n in found['reasons'].items())})"
        for task, found in counted["by_task"].items()
        if found["share"] > limit
    ]
    if not too_many:
        return
    print(
        f"{'; '.join(too_many)}, more than max_unscored ({limit:.1%});\n"
        "the rates leave them out: see their bounds. --retry_unscored asks for these alone again",
        file=sys.stderr,
    )
    raise SystemExit(1)
