"""The commands `sails guard`: fit a guard of prompts on a model, calibrate it, check or select prompts with it.

sails guard fit runs/mine --output runs/guard
sails guard calibrate runs/guard --prompts testbed
sails guard check runs/guard --prompts testbed --output_dir runs/checked
sails guard select runs/guard --dataset_name pairs.jsonl --output harmful.jsonl

<output_dir>/prompts.jsonl   (check) each prompt with its score, p-value and verdict
<output_dir>/metrics.json    (check) error rates on prompts that the guard has not seen, against what was certified
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.cli.edit import EditFolders
from sails_align.core.command_line import CommandLine
from sails_align.core.options import OVERWRITE, OutputOptions, all_but, option
from sails_align.evaluation.options import PromptArguments
from sails_align.guards.options import CalibrationOptions, GuardFitOptions, GuardFolder, SelectOptions

if TYPE_CHECKING:
    from sails_align.evaluation.records import Prompt
    from sails_align.guards.guard import Guard, LoadedModel, ScoredPrompts

Argv = Sequence[str] | None


@dataclass(frozen=True)
class CalibrationPrompts(PromptArguments):
    """Prompts."""

    part: str = option(
        "validation",
        "Part of a set that comes with the package: validation, test, or train (which guards are fitted on).",
    )


@dataclass(frozen=True)
class CheckOutput:
    """Output."""

    output_dir: str | None = option(None, "Output folder; default: runs/guard-check-..., named after the guard.")
    overwrite_output_dir: bool = option(False, OVERWRITE)


def fit(argv: Argv = None, prog: str | None = None) -> dict[str, Any]:
    """Fit a guard, and say how well it tells validation prompts apart. Return what its JSON file says."""
    folders, options = CommandLine.read(argv).parse([EditFolders, GuardFitOptions], prog=prog)
    from sails_align.core.log import show
    from sails_align.guards.fit import fit_guard

    about = fit_guard(folders.run, folders.output, options, overwrite=folders.overwrite_output_dir)
    best = about["auc"][str(about["layer"])]
    show(f"layer {about['layer']}: AUC {best:.3f} on validation prompts ({about['source']})")
    show(f"guard     {folders.output} ({about['n_parameters']:,} parameters)")
    show(f"next      sails guard calibrate {folders.output}")
    return about


def calibrate(argv: Argv = None, prog: str | None = None) -> dict[str, Any]:
    """Choose the threshold of a guard, and say what it is certified for. Return what its JSON file says."""
    classes = (GuardFolder, CalibrationPrompts, CalibrationOptions, OutputOptions)
    of, asked, options, output = CommandLine.read(argv).parse(classes, prog=prog)
    from sails_align.core.log import show
    from sails_align.guards.calibrate import calibrate_guard
    from sails_align.guards.guard import Guard

    guard = Guard.load(of.guard)
    _, scored = _scored(guard, of, asked)
    about = calibrate_guard(guard, scored, options, overwrite=output.overwrite_output_dir).about
    if about["threshold"] is None:
        show(f"nothing is certified, and every prompt is refused: {about['reason']}")
    else:
        show(
            f"with probability {1 - about['delta']:g} each, at most {about['max_pass']:.1%} of harmful prompts pass "
            f"({about['passed']} of {about['n_harmful']} did), and at most {about['over_refusal_bound']:.1%} of "
            f"harmless prompts are refused ({about['refused']} of {about['n_harmless']} were)"
        )
        show(f"threshold {about['threshold']:.3f}")
    show(f"holds for {about['holds_for']}")
    return dict(about)


def check(argv: Argv = None, prog: str | None = None) -> dict[str, Any]:
    """Score prompts, and compare the error rates with what was certified. Return the contents of `metrics.json`."""
    of, asked, output = CommandLine.read(argv).parse([GuardFolder, PromptArguments, CheckOutput], prog=prog)
    from sails_align.core.earlier import check_earlier, write_record
    from sails_align.core.files import refuse_trained, work_folder, write_json
    from sails_align.evaluation.output import METRICS_FILE, prompts_hash, write_rows
    from sails_align.guards.check import check_rates, check_rows
    from sails_align.guards.guard import Guard

    folder = refuse_trained(Path(output.output_dir or f"runs/guard-check-{of.guard.name}"))
    guard = Guard.load(of.guard)
    certified = guard.identity()
    prompts, scored = _scored(guard, of, asked)
    identity = {
        "command": "sails guard check",
        "options": all_but((), asked),
        "prompts": prompts_hash(prompts),
        "guard": certified,
    }
    with work_folder(folder):
        check_earlier(folder, identity, METRICS_FILE, overwrite=output.overwrite_output_dir)
        seen = {*guard.about["prompt_hashes"], *guard.calibrated.about["prompt_hashes"]}
        unseen = scored.chosen(place for place, prompt in enumerate(scored.hashes) if prompt not in seen)
        rates = list(check_rates(unseen, guard.calibrated))
        verdicts = check_rows(scored, guard.calibrated)
        rows = [_row(*pair) for pair in zip(prompts, verdicts, strict=True)]
        metrics = {
            "rates": [{**asdict(rate), "verdict": rate.verdict} for rate in rates],
            "n": len(prompts),
            "n_unscored": scored.scores.count(None),
            "n_seen": len(prompts) - len(unseen.hashes),
            "guard": certified,
        }
        write_rows(folder / "prompts.jsonl", rows)
        write_json(folder / METRICS_FILE, metrics)
        write_record(folder, identity)
        _show(metrics, f"{of.guard} on {', '.join(asked.prompts)}", folder)
    return metrics


def select(argv: Argv = None, prog: str | None = None) -> tuple[int, int]:
    """Keep the rows of a dataset whose prompts the guard refuses. Return their number and that of all rows."""
    of, options = CommandLine.read(argv).parse([GuardFolder, SelectOptions], prog=prog)
    from sails_align.core.log import show
    from sails_align.guards.guard import Guard
    from sails_align.guards.select import select_rows

    guard = Guard.load(of.guard)
    kept, n = select_rows(guard, _model_of(guard, of), options)
    show(f"{options.output}: {kept} of {n} rows, whose prompts the guard {options.keep}")
    return kept, n


def _model_of(guard: "Guard", of: GuardFolder) -> "LoadedModel":
    """Load the guard's model; raise `InputError` if it is not the one that the guard was fitted on."""
    from sails_align.guards.guard import LoadedModel

    name = of.model or guard.about["model"]
    base = of.base_model or guard.about["base_model"]
    model = LoadedModel.open(name, base, of.device, guard.about.get("chat_template"))
    guard.check_model(model.spec)
    return model


def _scored(guard: "Guard", of: GuardFolder, asked: PromptArguments) -> "tuple[list[Prompt], ScoredPrompts]":
    """Load prompts and score them."""
    from sails_align.core.progress import progress_bar
    from sails_align.evaluation.prompts.load import load_all
    from sails_align.guards.guard import ScoredPrompts

    prompts, model = load_all(asked, seed=0), _model_of(guard, of)
    with progress_bar(shown=True) as bar:
        bar.add_task("scoring prompts", total=None)
        asked_of = [(prompt.messages, prompt.kind == "harmful", prompt.category) for prompt in prompts]
        scored = ScoredPrompts.of(guard, model, asked_of)
    return prompts, scored


def _row(prompt: "Prompt", verdict: dict[str, Any]) -> dict[str, Any]:
    about = {"id": prompt.id, "kind": prompt.kind, "category": prompt.category, "messages": list(prompt.messages)}
    return about | verdict


def _show(metrics: dict[str, Any], title: str, folder: Path) -> None:
    """Print the rates against their bounds, what they leave out, and where the files are."""
    from sails_align.core.log import show
    from sails_align.core.tables import FittedTable

    level = 1 - metrics["guard"]["delta"]
    headings = ("", "errors", "n", "rate", f"bounds ({level:.0%} each)", "certified", "")
    table = FittedTable(title, headings)
    names = {"pass": "passed", "over-refusal": "over-refusal"}
    for rate in metrics["rates"]:
        group = "" if rate["group"] == "all" else f", {rate['group']}"
        certified = "" if rate["bound"] is None else f"{rate['bound']:.1%}"
        shares = (f"{rate['count'] / rate['n']:.1%}", f"{rate['low']:.1%} to {rate['high']:.1%}", certified)
        table.add_row(names[rate["kind"]] + group, str(rate["count"]), str(rate["n"]), *shares, rate["verdict"])
    show(table)
    if metrics["n_seen"]:
        show(f"left out  {metrics['n_seen']} of {metrics['n']} prompts: the guard was fitted or calibrated on them")
    if metrics["n_unscored"]:
        show(f"unscored  {metrics['n_unscored']} of {metrics['n']} prompts: the chat template refuses them")
    show(f"prompts   {folder / 'prompts.jsonl'}", f"metrics   {folder / 'metrics.json'}")
