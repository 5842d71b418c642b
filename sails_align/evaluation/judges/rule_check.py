"""Compare the readings of the judge `rules` with labels: how far each rule can be trusted."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sails_align.evaluation.agreement import cohen_kappa
from sails_align.evaluation.judges.rules import read_refusal
from sails_align.evaluation.label_files import Labelled
from sails_align.evaluation.metrics import SAFE
from sails_align.evaluation.reasoning import answer_of

RESAMPLES = 1000
"""Of the bootstrap."""


def check_rules(labelled: Labelled) -> dict[str, Any]:
    """Compare outcomes with labels.

    Labels of harm say that a response refused if they are 1 or 2, and partial refusals do not count. They do where
    the labels are of refusal.

    Returns:
        `outcomes`, the number of responses by label and outcome; `refusal`, precision and recall of refusals, and
        Cohen's kappa with a 95% bootstrap interval (seed 0); `by_rule`, the same precision and recall of the responses
        to which a rule applies. Empty responses and unfinished reasoning are left out.
    """
    of_harm, labels = labelled.task == "harm", labelled.labels
    responses = [item.response for item in labelled.items]
    kept = [place for place, text in enumerate(responses) if (answer_of(text) or "").strip()]
    readings = [read_refusal(responses[place]) for place in kept]
    refused = [labels[place] <= SAFE if of_harm else labels[place] == 1 for place in kept]
    counted = ("refusal",) if of_harm else ("refusal", "partial")
    found = [reading.outcome in counted for reading in readings]
    outcomes: dict[str, Counter[str]] = {}
    for place, reading in zip(kept, readings, strict=True):
        outcomes.setdefault(f"{labels[place]:g}", Counter())[reading.outcome] += 1
    names = Counter(name for reading in readings for name in reading.fired)
    by_rule = {name: _share([name in one.fired for one in readings], refused) for name, _ in names.most_common()}
    return {
        "outcomes": dict(sorted(outcomes.items())),
        "refusal": _share(found, refused) | _kappa(found, refused),
        "by_rule": by_rule,
    }


def _share(found: Sequence[bool], refused: Sequence[bool]) -> dict[str, Any]:
    both, n, n_refused = sum(map(min, found, refused)), sum(found), sum(refused)
    return {"n": n, "precision": both / n if n else None, "recall": both / n_refused if n_refused else None}


def _kappa(found: Sequence[bool], refused: Sequence[bool]) -> dict[str, float | None]:
    pairs = np.array([found, refused], dtype=float)
    rng, n = np.random.default_rng(0), len(found)
    drawn = (pairs[:, rng.integers(0, n, n)] for _ in range(RESAMPLES if n else 0))
    kappas = [kappa for one, other in drawn if (kappa := cohen_kappa(list(one), list(other))) is not None]
    low, high = np.percentile(kappas, [2.5, 97.5]).tolist() if kappas else (None, None)
    return {"cohen_kappa": cohen_kappa(*pairs.tolist()) if n else None, "ci_low": low, "ci_high": high}
