"""The command `sails judge-check`: compare a judge's verdicts with labels.

sails judge-check --judge llm --judge_model ... --labels FILE.csv    with the columns prompt, response, label; or as
                                                                     XSTest, Do-Not-Answer and others are published
sails judge-check --judge rules --labels oracle                      responses on the testbed, scored by its oracle
sails judge-check --judge llm --judge_model ... --labels attacks     such responses with attempts to fool the judge

A label is 1 (complete refusal) to 5 (full harmful compliance), or safe or unsafe; or refusal or compliance.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sails_align.core import log
from sails_align.core.artifacts import content_hash
from sails_align.core.command_line import CommandLine
from sails_align.core.earlier import check_earlier, write_record
from sails_align.core.errors import InputError
from sails_align.core.files import work_folder, write_json
from sails_align.core.options import all_but
from sails_align.core.tables import FittedTable
from sails_align.evaluation.judges.options import JudgeArguments, LabelArguments
from sails_align.evaluation.options import NOT_IN_IDENTITY, RunArguments
from sails_align.evaluation.output import METRICS_FILE, cache_file, output_folder, prompt_row, write_rows


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, judge, compare, write. Return the contents of `metrics.json`.

    Raises:
        InputError: for options, labels or a judge that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    known, who, run = CommandLine.read(argv).parse([LabelArguments, JudgeArguments, RunArguments], prog=prog)
    if not who.judge:
        raise InputError("no judge to check is given; give --judge llm, guard or rules")
    from sails_align.evaluation.cache import Cache
    from sails_align.evaluation.judges.make import make_judges
    from sails_align.evaluation.judges.panel import Panel, fail_if_unscored, identities
    from sails_align.evaluation.judges.rule_check import check_rules
    from sails_align.evaluation.judges.rules import RulesJudge
    from sails_align.evaluation.label_files import read_labels
    from sails_align.evaluation.labels import check_judges, fooled
    from sails_align.testbed.judge_attacks import attack_items, oracle_items

    folder = output_folder(run, "judge", f"{'-'.join(who.judge)}-{Path(known.labels).stem}")
    if known.labels in ("oracle", "attacks"):
        labelled = (oracle_items if known.labels == "oracle" else attack_items)(known.n_labels)
    else:
        labelled = read_labels(known.labels, known.label_column, known.on_bad_rows)
    with work_folder(folder), closing(Cache(cache_file(run))) as cache:
        judges = make_judges(who, [item.prompt for item in labelled.items])
        rows = zip(labelled.items, labelled.labels, strict=True)
        labels = [[prompt_row(item.prompt), item.response, label] for item, label in rows]
        identity = {
            "command": "sails judge-check",
            "options": all_but(NOT_IN_IDENTITY, known, who, run),
            "labels": content_hash(labels),
            "judges": identities(judges),
        }
        check_earlier(folder, identity, METRICS_FILE, overwrite=run.overwrite_output_dir)
        panel = Panel(judges, cache, retry_failed=run.retry_unscored, progress=run.progress)
        metrics, rows = check_judges(panel, labelled, known.labels)
        if RulesJudge.name in judges:
            metrics["rules"] = check_rules(labelled)
        metrics["fooled"] = fooled(rows) if known.labels == "attacks" else {}
        write_rows(folder / "verdicts.jsonl", rows)
        write_json(folder / METRICS_FILE, metrics)
        write_record(folder, identity)
        show(metrics, known.labels)
        print(f"metrics   {folder}/metrics.json")
    fail_if_unscored(metrics["unscored"], run.max_unscored)
    return metrics


def show(metrics: Mapping[str, Any], source: str) -> None:
    """Print the confusion matrices, accuracy and kappa of each judge, and how often attacks fooled it."""
    for name, scales in metrics["judges"].items():
        for scale, found in scales.items():
            labels = [_word(label, scale) for label in found["labels"]]
            rows = [[label, *map(str, counts)] for label, counts in zip(labels, found["counts"], strict=True)]
            title = f"{name} against {source}, {'1-5' if scale == 'scale' else scale.replace('_', ' ')}"
            log.show(FittedTable(title, ["label", *labels, "unscored"], rows))
            accuracy, kappa = found["accuracy"], found["cohen_kappa"]
            if accuracy["value"] is not None:
                interval = f"{accuracy['ci_low']:.1%} to {accuracy['ci_high']:.1%}"
                weighted = ", quadratic weights" if scale == "scale" else ""
                log.show(
                    f"right {accuracy['value']:.1%} ({interval}) of {accuracy['n']} scored; "
                    f"Cohen's kappa{weighted} {'undefined' if kappa is None else f'{kappa:.2f}'}"
                )
    if "rules" in metrics:
        _show_rules(metrics["rules"])
    for name, found in metrics["fooled"].items():
        rows = []
        for kind, share in {**found["by_kind"], "all": found["overall"]}.items():
            shown = "unscored" if share["value"] is None else f"{share['value']:.1%}"
            rows.append([kind, shown, str(share["n"]), str(share["n_unscored"])])
        title = f"{name} under attack: share of responses with too low a score"
        log.show(FittedTable(title, ["attack", "fooled (%)", "n", "unscored"], rows))


def _show_rules(found: Mapping[str, Any]) -> None:
    """Print the outcomes by label, and how far each rule can be trusted."""
    outcomes = ("refusal", "partial", "compliance")
    rows = [[label, *(str(counts.get(one, 0)) for one in outcomes)] for label, counts in found["outcomes"].items()]
    log.show(FittedTable("rules: outcomes by label", ["label", *outcomes], rows))
    of_all = found["refusal"]
    rows = [
        [name, str(of["n"]), *("" if of[what] is None else f"{of[what]:.2f}" for what in ("precision", "recall"))]
        for name, of in [("all rules", of_all), *found["by_rule"].items()]
    ]
    log.show(FittedTable("rules: precision and recall of refusals", ["rule", "n", "precision", "recall"], rows))
    if of_all["cohen_kappa"] is not None:
        kappa, low, high = (of_all[name] for name in ("cohen_kappa", "ci_low", "ci_high"))
        log.show(f"kappa of refusals {kappa:.2f} ({low:.2f} to {high:.2f})")


def _word(label: float, scale: str) -> str:
    words = {"safe_or_unsafe": {1.0: "safe", 5.0: "unsafe"}, "answered_or_refused": {0.0: "answered", 1.0: "refused"}}
    return words[scale][label] if scale in words else f"{label:g}"
