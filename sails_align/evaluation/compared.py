"""Compare the model that is evaluated with another one on the same prompts: `--compare base`, or a model.

<output_dir>/compared/         responses, verdicts and metrics of the other model
<output_dir>/comparison.json   each metric of both, and the difference, paired by prompt
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.make import find_spec
from sails_align.evaluation.options import ResponseArguments
from sails_align.evaluation.output import COMPARED
from sails_align.evaluation.records import InferenceHook
from sails_align.evaluation.result import EvaluationResult
from sails_align.models.resolve import without_adapter
from sails_align.models.spec import ModelSpec

BASE = "base"
"""`--compare base`: the model without its adapter, without steering and without a guard."""


@dataclass(frozen=True)
class Responder:
    """What responds to the prompts of an evaluation."""

    how: ResponseArguments
    spec: ModelSpec | None
    """None: a server runs it."""
    hook: InferenceHook | None = None


def compared_with(name: str, evaluated: Responder) -> Responder:
    """Find the model to compare with. It responds as the evaluated one does, but is neither steered nor guarded.

    Raises `InputError` if there is no such model, or `base` is what is evaluated.
    """
    how, spec = replace(evaluated.how, guard=None, clade_oracle=False), evaluated.spec
    if name != BASE:
        other = replace(how, model=name, base_model=None, revision=None)
        return Responder(other, find_spec(other))
    if spec is None:
        if how.base_model is None:
            raise InputError("compare is base, but base_model is not given; give --base_model, its name on the server")
        return Responder(replace(how, model=how.base_model, base_model=None), None)
    if spec.adapter is not None:
        return Responder(how, without_adapter(spec))
    if evaluated.hook is not None or evaluated.how.guard is not None:
        return Responder(how, spec)
    raise InputError(
        f"compare is base, but {how.model} has neither an adapter nor steering nor a guard to leave out;\n"
        "give --compare the model that it was trained from"
    )


def comparison_of(result: EvaluationResult, other: EvaluationResult) -> dict[str, Any]:
    """Return the metrics of two results on the same prompts, with their differences, for `comparison.json`."""
    return {
        "overall": _rows(result, other, None),
        "by_split": {name: _rows(result, other, places) for name, places in result.places("split").items()},
    }


def _rows(result: EvaluationResult, other: EvaluationResult, places: Sequence[int] | None) -> dict[str, Any]:
    theirs = other.rates(places)
    try:
        differences = result.compare(other, places).metrics
    except InputError:  # all prompts are unscored in one of them
        differences = {}
    return {
        name: {
            "model": estimate.to_json(),
            COMPARED: theirs[name].to_json(),
            "difference": differences[name].to_json() if name in differences else None,
        }
        for name, estimate in result.rates(places).items()
        if name in theirs
    }
