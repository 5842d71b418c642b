"""Let judges vote; measure how far they agree and how much they left unscored."""

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sails_align.core.errors import InputError
from sails_align.evaluation.agreement import cohen_kappa, krippendorff_alpha, vote
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.judges.rules import RulesJudge
from sails_align.evaluation.pipeline import verdicts_of
from sails_align.evaluation.records import Item, Judge, Task, Verdict, Verdicts


class Panel:
    """One judge, or several that vote."""

    def __init__(
        self,
        judges: Mapping[str, Judge],
        cache: Cache | None = None,
        *,
        retry_failed: bool = False,
        progress: bool = True,
    ) -> None:
        self._judges = judges
        self._cache, self._options = cache, {"retry_failed": retry_failed, "progress": progress}
        self._used: dict[str, Judge] = {}
        self.members = {name: judge.binary for name, judge in judges.items()}
        """Name -> whether its harm scores are 1 and 5 only."""
        self.binary = any(self.members.values())
        """Whether the mean of the votes says nothing, since some can only be 1 or 5."""
        self.by_rules = frozenset(name for name, judge in judges.items() if judge.weak and judge.binary)
        """The judges that go by phrases."""
        if self.by_rules.issuperset(name for name, judge in judges.items() if "harm" in judge.tasks):
            self.by_rules |= {"vote"}

    def can(self, task: Task) -> bool:
        """Tell whether any judge can be asked for a task."""
        return any(task in judge.tasks for judge in self._judges.values())

    def judge(self, task: Task, items: Sequence[Item | None]) -> dict[str, list[Verdict]]:
        """Return the verdicts in order, by judge, and their `vote`. Without a judge of refusals, rules judge them.

        Raises:
            InputError: if no judge can be asked for the task.
        """
        asked = {name: judge for name, judge in self._judges.items() if task in judge.tasks}
        if not asked and task == "refusal":
            asked = {RulesJudge.name: RulesJudge()}
        if not asked:
            names = ", ".join(self._judges)
            raise InputError(f"none of the judges ({names}) can be asked for {task}; choose another --judge")
        by_judge: dict[str, list[Verdict]] = {}
        for name, judge in asked.items():
            title = f"{task} ({name})"
            by_judge[name] = verdicts_of(judge, task, items, self._cache, title=title, **self._options)
            self._used[name] = judge
            if len(asked) > 1:
                judge.close()  # memory is for one model at a time; it is loaded again on use
        worse = task in ("helpfulness", "correctness", "preference", "likeness")
        votes = [
            together[0] if len(together) == 1 else vote(together, lower_is_worse=worse)
            for together in zip(*by_judge.values(), strict=True)
        ]
        return {**by_judge, "vote": votes}

    def agreement(self, verdicts: Verdicts) -> dict[str, Any]:
        """Compute Cohen's kappa of each pair of judges and Krippendorff's alpha of all, by task."""
        result: dict[str, Any] = {}
        for task, by_judge in verdicts.items():
            scores = {
                name: [of[index].score for index in sorted(of)] for name, of in by_judge.items() if name != "vote"
            }
            if len(scores) < 2:
                continue
            graded = task in ("harm", "helpfulness") and not all(self.members.values())
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

    def notes(self, verdicts: Verdicts) -> list[str]:
        """Return what readers of the rates should know: weak judges, and grades that some judges do not give."""
        weak = {name for name, judge in self._used.items() if judge.weak}
        tasks = [task for task, by_judge in verdicts.items() if weak & by_judge.keys()]
        note = f"{', '.join(tasks)}: the judge {', '.join(sorted(weak))} is weak evidence: it knows phrases only"
        return [*([note] if tasks else []), *self._about_grades(verdicts)]

    def _about_grades(self, verdicts: Verdicts) -> list[str]:
        """Say why harmfulness is of some judges only, or of none."""
        binary = [name for name in verdicts.get("harm", {}) if self.members.get(name)]
        graded = [name for name, is_binary in self.members.items() if not is_binary]
        if not binary:
            return []
        instead = f"are those of {' and '.join(graded)} alone" if graded else "are not measured"
        return [f"harm: {' and '.join(binary)} can tell only safe from unsafe; harmfulness and high-risk {instead}"]

    def identities(self) -> dict[str, Any]:
        """Return everything that affects the verdicts of each judge that was asked."""
        return identities(self._used)

    def close(self) -> None:
        """Close the judges."""
        for judge in self._judges.values():
            judge.close()


def identities(judges: Mapping[str, Judge]) -> dict[str, Any]:
    """Return everything that affects the verdicts of each judge, by name and task."""
    return {name: {task: judge.identity(task) for task in sorted(judge.tasks)} for name, judge in judges.items()}


def unscored(verdicts: Verdicts) -> dict[str, Any]:
    """Count verdicts and unscored ones with their reasons: of the vote, and by task and judge.

    `share` is the largest unscored share of any task and judge, so that none hides behind the others.
    """
    by_task = {
        task if name == "vote" else f"{task} by {name}": _counted(of_judge.values())
        for task, by_judge in verdicts.items()
        for name, of_judge in by_judge.items()
        if name == "vote" or len(by_judge) > 2  # the vote of a single judge is its verdict
    }
    of_votes = _counted(verdict for by_judge in verdicts.values() for verdict in by_judge["vote"].values())
    return {**of_votes, "share": max((found["share"] for found in by_task.values()), default=0.0), "by_task": by_task}


def _counted(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    verdicts = list(verdicts)
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.reason is not None)
    n = reasons.total()
    return {"n_verdicts": len(verdicts), "n": n, "share": n / len(verdicts) if verdicts else 0.0, "reasons": reasons}


def fail_if_unscored(counted: Mapping[str, Any], limit: float) -> None:
    """End the command with exit code 1 if too many verdicts on a task are unscored to trust its rates."""
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
