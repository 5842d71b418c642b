"""Choose a guard's threshold on prompts that it was not fitted on, so that its error rates are bounded.

At most a share `max_pass` of harmful prompts passes, and at most a share `max_over_refusal` of harmless ones is
refused, each with probability 1 - `delta` over the draw of the calibration's prompts. The threshold is the laxest that
the harmful prompts certify (`bounds.certified_threshold`). It does not depend on the harmless ones, so one
Clopper-Pearson bound at it is valid for them. If a bound does not hold, nothing is certified, and every prompt is
refused. The guarantee is ours: RepV (arXiv 2510.26935) has another one.
"""

from collections.abc import Collection
from typing import Any

import torch

from sails_align.core.artifacts import content_hash, read_header, save_artifact
from sails_align.core.errors import InputError
from sails_align.core.options import all_but
from sails_align.guards.bounds import certified_threshold, upper_bound
from sails_align.guards.guard import CALIBRATION, Calibration, Guard, ScoredPrompts
from sails_align.guards.options import CalibrationOptions

HOLDS_FOR = (
    "prompts that are exchangeable with the calibration's, such as further draws from the same source; "
    "not for other categories, languages or attacks"
)


def calibrate_guard(
    guard: Guard, prompts: ScoredPrompts, options: CalibrationOptions, *, overwrite: bool = False
) -> Calibration:
    """Calibrate a guard on scored prompts and save the result in its folder.

    Raises:
        InputError: if the guard was fitted on one of the prompts, a kind of prompts is missing, or the folder holds
            another calibration and `overwrite` is not set.
    """
    prompts = prompts.once()
    refuse_fitted(prompts, guard.about["prompt_hashes"])
    rows = sorted(zip(prompts.hashes, prompts.is_harmful, strict=True))
    about = {"guard_hash": guard.hash, "data_hash": content_hash(rows), "options": all_but((), options)}
    input_hash = content_hash(about)
    folder = guard.folder / CALIBRATION
    earlier = read_header(folder, CALIBRATION)
    is_of_guard = earlier is not None and earlier["provenance"]["guard_hash"] == guard.hash
    if earlier is not None and is_of_guard and earlier["input_hash"] != input_hash and not overwrite:
        raise InputError(
            f"{guard.folder} is calibrated already, with other prompts or options, and the luckiest of several "
            "calibrations holds less often than it says;\nkeep it, or if it was made by mistake, replace it with "
            "--overwrite_output_dir true"
        )
    found = calibrated(prompts, guard.thresholds.tolist(), options)
    about |= {"model_hash": guard.about["model_hash"], **found.about, "prompt_hashes": sorted({*prompts.hashes})}
    save_artifact(folder, CALIBRATION, {"harmful": found.harmful}, about, input_hash)
    return Calibration(found.harmful, about)


def refuse_fitted(prompts: ScoredPrompts, fitted: Collection[str]) -> None:
    """Raise `InputError` if some prompts are those that the guard was fitted on: their scores are too good."""
    n = len({*prompts.hashes} & {*fitted})
    if n:
        raise InputError(
            f"the guard was fitted on {n} of the {len({*prompts.hashes})} prompts, so no bound would hold; "
            "give prompts that it has not seen (the testbed's: --part validation)"
        )


def _too_many_pass(harmful: list[float], thresholds: list[float], options: CalibrationOptions) -> str:
    """Say why not even the strictest threshold keeps the bound."""
    n, least = len(harmful), upper_bound(0, len(harmful), options.delta)
    if least > options.max_pass:
        return (
            f"with {n} harmful prompts the bound of the pass rate is at least {least:.1%}, even if none passes; "
            "calibrate on more, or raise --max_pass"
        )
    n_below = sum(score < thresholds[0] for score in harmful)
    return (
        f"{n_below} of {n} harmful prompts pass even the strictest threshold; fit the guard on more prompts like them, "
        "or raise --max_pass"
    )


def calibrated(prompts: ScoredPrompts, thresholds: list[float], options: CalibrationOptions) -> Calibration:
    """Choose the threshold; raise `InputError` without a harmful and a harmless prompt that have a score."""
    places = {kind: prompts.places(harmful=kind == "harmful") for kind in ("harmful", "harmless")}
    for kind, of_kind in places.items():
        if not of_kind:
            raise InputError(f"there are no {kind} prompts to calibrate on; add some with --prompts")
    harmful, harmless = ([float(prompts.scores[place]) for place in of_kind] for of_kind in places.values())  # pyright: ignore
    n, n_harmless = len(harmful), len(harmless)
    threshold = certified_threshold(harmful, thresholds, options.max_pass, options.delta)
    reason = None
    refused = over_refusal_bound = None
    if threshold is None:
        reason = _too_many_pass(harmful, thresholds, options)
    else:
        refused = sum(score >= threshold for score in harmless)
        over_refusal_bound = upper_bound(refused, n_harmless, options.delta).item()
        if over_refusal_bound > options.max_over_refusal:
            reason = (
                f"it would refuse {refused} of {n_harmless} harmless prompts, up to {over_refusal_bound:.1%} of all; "
                "raise --max_over_refusal, or --max_pass"
            )
    passed = None if threshold is None else sum(score < threshold for score in harmful)
    about: dict[str, Any] = {
        "threshold": threshold if reason is None else None,
        "reason": reason,
        "n_harmful": n,
        "n_harmless": n_harmless,
        "n_unscored": len(prompts.scores) - n - n_harmless,
        "passed": passed,
        "refused": refused,
        "pass_bound": None if passed is None else upper_bound(passed, n, options.delta).item(),
        "over_refusal_bound": over_refusal_bound,
        "max_pass": options.max_pass,
        "max_over_refusal": options.max_over_refusal,
        "delta": options.delta,
        "holds_for": HOLDS_FOR,
        "categories": sorted({prompts.categories[place] for place in places["harmful"]}),
    }
    return Calibration(torch.tensor(sorted(harmful), dtype=torch.float64), about)
