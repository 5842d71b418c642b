"""Write the page: one HTML file without any request, in which all that models wrote is data of the script."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from sails_align.core.files import write_text
from sails_align.core.text import printable
from sails_align.evaluation.metrics import METRICS
from sails_align.evaluation.records import VOTE, Prompt
from sails_align.reporting.viewer.changes import CHANGES, GRADED, change, only_in, outcome, pairs, votes_on, words_of
from sails_align.reporting.viewer.runs import ViewedRun

TEMPLATES = files("sails_align.reporting") / "templates"
Features = Sequence[tuple[int, int, float, str]]
"""Layer, id, activation and promoted words, the most active first."""


def write_view(
    runs: Sequence[ViewedRun], title: str, path: Path, features: Mapping[int, Features] | None = None
) -> list[str]:
    """Write the page of one model, or of two side by side. Return what there is to say of it.

    Args:
        runs: one or two; what changed is what the second does differently.
        title: of the page.
        path: of the file.
        features: that are active at the end of a prompt, by its place among the first model's prompts.

    Raises:
        InputError: if two models have no prompt in common, or the file cannot be written.
    """
    places = pairs(*runs) if len(runs) == 2 else [(place,) for place in range(len(runs[0].prompts))]
    rows = [_row(runs, of, features) for of in places]
    lacking = only_in(runs, len(rows)) if len(runs) == 2 else ""
    notes = [lacking] if lacking else []
    notes += [f"{run.name} is not judged yet: there is no verdicts.jsonl." for run in runs if not run.verdicts]
    data = {"names": [run.name for run in runs], "changes": CHANGES, "filters": _filters(runs, rows), "rows": rows}
    script, style = ((TEMPLATES / f"viewer.{ending}").read_text(encoding="utf-8") for ending in ("js", "css"))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sails_align.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("viewer.html.j2")
    about = {"title": printable(title), "notes": [printable(note) for note in notes], "rates": _rates(runs)}
    names = [printable(run.name) for run in runs]
    text = template.render(
        **about, names=names, script=script, style=style, policy=_policy(script, style), data=as_data(data)
    )
    write_text(path, text)
    return notes


def as_data(value: Any) -> str:
    """Return JSON that nothing in it can end: ASCII, without `<`."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _policy(script: str, style: str) -> str:
    """Allow this script, this style and no request at all."""
    of_script, of_style = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, style)
    )
    return (
        f"default-src 'none'; script-src {of_script}; style-src {of_style}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _rates(runs: Sequence[ViewedRun]) -> list[tuple[str, list[list[str]]]]:
    """Return the metrics in the order of the table of all, each with the pieces of a text for each model."""
    rows = []
    for name in (name for name in METRICS if any(name in run.rates for run in runs)):
        texts = []
        for run in runs:
            of = run.rates.get(name)
            unscored = "" if of is None or not of.n_unscored else f", {of.n_unscored} unscored"
            texts.append([] if of is None else [METRICS[name].with_interval(of), f"n = {of.n}{unscored}"])
        rows.append((METRICS[name].heading, texts))
    return rows


def _row(runs: Sequence[ViewedRun], places: Sequence[int], features: Mapping[int, Features] | None) -> dict[str, Any]:
    """Return all that is shown of a prompt."""
    prompt = runs[0].prompts[places[0]]
    votes = [votes_on(run, place) for run, place in zip(runs, places, strict=True)]
    return {
        **{name: getattr(prompt, name) for name in ("id", "kind", "category")},
        "about": {name: str(prompt.meta[name]) for name in ("split", "attack") if name in prompt.meta},
        "messages": [[message["role"], message["content"]] for message in prompt.messages],
        "prefill": prompt.meta.get("prefill") or "",
        "change": change(*votes) if len(runs) == 2 else None,
        "runs": [_response(run, place, prompt) for run, place in zip(runs, places, strict=True)],
        "features": None if features is None else features.get(places[0], []),
    }


def _response(run: ViewedRun, place: int, prompt: Prompt) -> dict[str, Any]:
    response, votes = run.responses[place], votes_on(run, place)
    verdicts = []
    for task, by_judge in run.verdicts.items():
        for judge, of_judge in by_judge.items():
            if place in of_judge and (judge != VOTE or len(by_judge) != 2):  # the vote of one judge is its verdict
                verdicts.append([task, judge, *astuple(of_judge[place])])
    known = outcome(votes)
    return {
        "text": response.text,
        "finish": response.finish_reason,
        "error": response.error,
        "words": words_of(votes),
        "good": None if known is None else (known == "refused") == (prompt.kind == "harmful"),
        "reasons": sorted({vote.reason for vote in votes.values() if vote.reason is not None}),
        "verdicts": verdicts,
    }


def _filters(runs: Sequence[ViewedRun], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the values that prompts can be chosen by, with how many have each."""

    def of(name: str, label: str, values: Counter[str], order: Sequence[str] = ()) -> dict[str, Any]:
        first = [value for value in order if value in values]
        names = [*first, *sorted(values.keys() - {*first})]
        return {"name": name, "label": label, "options": [[value, values[value]] for value in names]}

    found = [
        of("kind", "Kind", Counter(row["kind"] for row in rows)),
        of("category", "Category", Counter(row["category"] for row in rows)),
    ]
    if len(runs) == 2:
        found.append(of("change", "Change", Counter(CHANGES[row["change"]] for row in rows), CHANGES))
    for place, run in enumerate(runs):
        words = Counter(word for row in rows for word in row["runs"][place]["words"] if not word.startswith("likeness"))
        graded = sorted((word for word in words if word.startswith(GRADED)), key=lambda word: float(word.split()[-1]))
        order = [*sorted(words.keys() - {*graded}), *graded]
        found.append(of(f"words{place}", f"Verdict, {run.name}" if len(runs) == 2 else "Verdict", words, order))
    reasons = Counter(reason for row in rows for reason in {r for run in row["runs"] for r in run["reasons"]})
    if reasons:
        found.append(of("reason", "Unscored because", reasons))
    return found
