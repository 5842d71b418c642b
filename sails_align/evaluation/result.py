"""Hold the result of an evaluation: prompts, responses, verdicts and metrics; compare it, save it."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.core.suggestions import did_you_mean
from sails_align.evaluation.inspect_log import write_log
from sails_align.evaluation.intervals import span_of_difference
from sails_align.evaluation.metrics import METRICS, Estimate, Metric, estimate, estimates
from sails_align.evaluation.output import (
    RESPONSES_FILE,
    VERDICTS_FILE,
    conversation_hash,
    verdict_row,
    write_responses,
    write_rows,
)
from sails_align.evaluation.records import VOTE, Completion, Prompt, Verdicts

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """Hold the prompts, the responses of a model, and the verdicts on them.

    Examples:
        >>> frame = result.to_pandas()
        >>> frame["kind"].value_counts().to_dict()
        {'harmful': 16, 'benign': 8, 'dual_use': 8}
    """

    prompts: tuple[Prompt, ...]
    responses: tuple[Completion, ...]
    verdicts: Verdicts
    binary: Mapping[str, bool]
    """By judge and `vote`: whether its harm scores are 1 and 5 only."""
    reference: tuple[Completion, ...] | None = None
    """The responses to compare with."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The rest of `metrics.json`: agreement, unscored verdicts, notes, provenance."""
    by_rules: frozenset[str] = frozenset()
    """Judges that go by phrases, and `vote` if no other judged harm: their safety rate is called refusal rate."""

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The contents of `metrics.json`."""
        return {**self.summary(), **self.about}

    def rates(self, places: Iterable[int] | None = None, judge: str = VOTE) -> dict[str, Estimate]:
        """Compute the metrics of some prompts (default: all), of one judge or of the vote."""
        places = range(len(self.prompts)) if places is None else list(places)
        found: dict[str, Estimate] = {}
        for task, by_judge in self.verdicts.items():
            of = by_judge.get(judge, {})
            judged = [place for place in places if place in of]
            attacked = [place for place in judged if "attack" in self.prompts[place].meta] if task == "harm" else []
            for chosen, of_attacks in ((judged, False), (attacked, True)):
                scores = [of[place].score for place in chosen]
                if scores:
                    found |= estimates(
                        task,
                        scores,
                        binary=self.binary[judge],
                        by_rules=judge in self.by_rules,
                        of_attacks=of_attacks,
                        groups=self._groups(chosen),
                    )
        return found

    def _groups(self, places: Iterable[int]) -> list[Hashable] | None:
        """Return what the prompts at some places are attacks on; None if there are no attacks."""
        about = [(place, self.prompts[place].meta) for place in places]
        if not any("attacked" in meta for _, meta in about):
            return None
        return [(meta.get("split"), meta["attacked"]) if "attacked" in meta else place for place, meta in about]

    def places(self, name: str) -> dict[str, list[int]]:
        """Group the prompts' places by `category` (for harmless prompts, with the kind) or by `split`."""
        if name == "split":
            return places_by_split(self.prompts)
        groups: dict[str, list[int]] = {}
        for place, prompt in enumerate(self.prompts):
            suffix = "" if prompt.kind == "harmful" else f" ({prompt.kind})"
            groups.setdefault(prompt.category + suffix, []).append(place)
        return dict(sorted(groups.items()))

    def summary(self) -> dict[str, Any]:
        """Compute the metrics of all prompts, of each category, of each split and of each judge, for `metrics.json`."""
        members = [name for name in self.binary if name != VOTE]
        return {
            "overall": _json(self.rates()),
            "by_category": {name: _json(self.rates(of)) for name, of in self.places("category").items()},
            "by_split": {name: _json(self.rates(of)) for name, of in self.places("split").items()},
            "judges": {name: _json(self.rates(judge=name)) for name in members if len(members) > 1},
        }

    def __repr__(self) -> str:
        return _lines(f"{type(self).__name__}: {len(self.prompts)} prompts", self.rates())

    def to_pandas(self) -> "DataFrame":
        """Return a row for each prompt, with its response and the score of each task (NaN: unscored)."""
        from pandas import DataFrame

        rows = [
            {
                **{name: getattr(prompt, name) for name in ("id", "kind", "category")},
                "split": prompt.meta.get("split"),
                "prompt": prompt.text,
                "response": response.text,
            }
            for prompt, response in zip(self.prompts, self.responses, strict=True)
        ]
        for task, by_judge in self.verdicts.items():
            for place, verdict in by_judge[VOTE].items():
                rows[place][task] = verdict.score
                if verdict.reason is not None:
                    rows[place]["unscored"] = verdict.reason
        return DataFrame(rows)

    def compare(self, other: "EvaluationResult", places: Iterable[int] | None = None) -> "Comparison":
        """Subtract another result from this one, prompt by prompt; prompts that only one of them has are left out.

        Args:
            other: a result on the same prompts, or some of them.
            places: of this result's prompts to compare; None: all.

        Raises:
            InputError: if no prompt has a score of the same task in both.
        """
        theirs = {conversation_hash(prompt.conversation): place for place, prompt in enumerate(other.prompts)}
        keys = [conversation_hash(prompt.conversation) for prompt in self.prompts]
        places = range(len(keys)) if places is None else places
        pairs = [(place, theirs[keys[place]]) for place in places if keys[place] in theirs]
        found: dict[str, Estimate] = {}
        by_rules = {VOTE in result.by_rules for result in (self, other)}
        for metric in METRICS.values():
            scores = [(one, self._score(metric, one), other._score(metric, two)) for one, two in pairs]
            differences = {place: one - two for place, one, two in scores if one is not None and two is not None}
            is_of_both = metric.by_rules is None or by_rules == {metric.by_rules}
            if differences and is_of_both and not (metric.is_graded and (self.binary[VOTE] or other.binary[VOTE])):
                span, groups = span_of_difference(metric.span), self._groups(differences)
                found[metric.name] = estimate(list(differences.values()), span=span, groups=groups)
        if not found:
            raise InputError("the two results share no prompt that both have a score for; evaluate the same prompts")
        return Comparison(found)

    def _score(self, metric: Metric, place: int) -> float | None:
        """Return the contribution of a prompt to a metric; None if it has none."""
        if metric.task is None or (metric.of_attacks and "attack" not in self.prompts[place].meta):
            return None
        verdict = self.verdicts.get(metric.task, {}).get(VOTE, {}).get(place)
        return None if verdict is None or verdict.score is None else float(metric.of(verdict.score))

    def save(self, folder: str | Path) -> None:
        """Write responses.jsonl, verdicts.jsonl, metrics.json, and inspect.eval if inspect_ai is installed.

        With a reference, also reference.jsonl.
        """
        folder = Path(folder)
        write_responses(folder / RESPONSES_FILE, self.prompts, self.responses)
        if self.reference is not None:
            write_responses(folder / "reference.jsonl", self.prompts, self.reference)
        rows = [
            verdict_row(self.prompts[place], name, task, verdict)
            for task, by_judge in self.verdicts.items()
            for name, of_judge in by_judge.items()
            for place, verdict in of_judge.items()
        ]
        write_rows(folder / VERDICTS_FILE, rows)
        write_log(self, folder)
        write_json(folder / "metrics.json", self.metrics)


def places_by_split(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Group the places of prompts by the set that they are of, as far as they say it."""
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if "split" in prompt.meta:
            groups.setdefault(str(prompt.meta["split"]), []).append(place)
    return groups


@dataclass(frozen=True, repr=False)
class Comparison:
    """Hold the differences of two results, paired by prompt, with 95% intervals."""

    metrics: Mapping[str, Estimate]

    def __repr__(self) -> str:
        return _lines(f"{type(self).__name__}: differences paired by prompt", self.metrics, "+")

    def to_pandas(self) -> "DataFrame":
        """Return a row for each metric."""
        from pandas import DataFrame

        return DataFrame.from_dict({name: of.to_json() for name, of in self.metrics.items()}, orient="index")


def compare(results: Mapping[str, EvaluationResult], baseline: str) -> dict[str, Comparison]:
    """Subtract the baseline's result from each of the others, prompt by prompt.

    Args:
        results: of several models on the same prompts, by name.
        baseline: the name of the result to subtract.

    Raises:
        InputError: if there is no such name, or a result shares no prompt with the baseline.

    Examples:
        >>> differences = sails.compare({"base": result, "again": result}, baseline="base")
        >>> differences["again"].metrics["safety_rate"].value
        0.0
    """
    if baseline not in results:
        raise InputError(f"there is no result {baseline!r}{did_you_mean(baseline, results)}")
    return {name: of.compare(results[baseline]) for name, of in results.items() if name != baseline}


def _lines(title: str, rates: Mapping[str, Estimate], sign: str = "") -> str:
    lines = [title]
    for name, of in rates.items():
        unscored = f", {of.n_unscored} unscored" if of.n_unscored else ""
        lines.append(f"  {METRICS[name].heading:<28}{METRICS[name].with_interval(of, sign)}, n = {of.n}{unscored}")
    return "\n".join(lines)


def _json(rates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: value.to_json() for name, value in rates.items()}
