"""Attack harmful prompts, and measure how often the attacks succeed: `sails attack`.

<output_dir>/attacked.jsonl    the attacked prompts: a prompt set, also for `sails eval safety --prompts`
<output_dir>/searches/         the state of each search, from which a rerun resumes
<output_dir>/responses.jsonl, verdicts.jsonl, metrics.json      with and without the attacks, if there is a judge
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import file_hash
from sails_align.core.earlier import check_earlier, write_record
from sails_align.core.errors import InputError
from sails_align.core.files import work_folder, write_json
from sails_align.core.log import LOG_FILE, Stages, log_file, say, show
from sails_align.core.options import all_but
from sails_align.evaluation.attacks import ATTACKS, Setting
from sails_align.evaluation.attacks.options import TransferArguments
from sails_align.evaluation.attacks.parse import AttackArguments
from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.evaluate import evaluate
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.panel import fail_if_unscored, identities
from sails_align.evaluation.metrics import as_numbers, estimates
from sails_align.evaluation.options import NOT_IN_IDENTITY
from sails_align.evaluation.output import METRICS_FILE, cache_file, output_folder, prompt_row, prompts_hash, write_rows
from sails_align.evaluation.prompts import is_of_testbed
from sails_align.evaluation.prompts.load import counted, load_all
from sails_align.evaluation.records import VOTE, Judge, Prompt, Verdict
from sails_align.evaluation.tables import show_attacks
from sails_align.evaluation.tracking import send_numbers
from sails_align.models.spec import ModelSpec

NO_ATTACK = "none"


def run_attack(args: AttackArguments) -> dict[str, Any] | None:
    """Attack, write the prompts; respond, judge and print the rates, if there is a judge.

    Returns:
        The contents of `metrics.json`; None without a judge.

    Raises:
        InputError: for a model, prompts or a judge that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    how, run = args.how, args.run
    folder = output_folder(run, f"attack-{args.method}", how.model)
    opened, stages = log_file(folder, f"sails attack {args.method}"), Stages(("prompts", "attack", "verdicts"))
    with work_folder(folder), opened, stages, closing(Cache(cache_file(run))) as cache:
        say(f"{args.method} attack on {how.model}; output: {folder}/ (all lines: {LOG_FILE})")
        stages.begin("prompts", ", ".join(args.asked.prompts))
        spec, prompts = find_spec(how), _harmful_prompts(args)
        say(f"    {counted(prompts)}")
        is_judged = bool(args.who.judge) or is_of_testbed(prompts)
        judges = make_judges(args.who, prompts) if is_judged else {}  # before the search: not to fail after hours
        identity = _identity(args, spec, prompts, judges)
        check_earlier(folder, identity, METRICS_FILE, overwrite=run.overwrite_output_dir)
        setting = Setting(spec, folder, how.seed, how.batch_size, run.progress)
        stages.begin("attack", args.method)
        attacked = ATTACKS.get(args.method).load()(args.attack, prompts, setting)
        path = folder / "attacked.jsonl"
        write_rows(path, [prompt_row(prompt) for prompt in attacked])
        show(f"attacked  {path} ({len(attacked)} prompts)")
        if not is_judged:
            write_record(folder, identity)
            show(f"judge it  sails eval safety --prompts {path} --model {how.model} --judge ...")
            return None
        stages.begin("verdicts", ", ".join(judges))
        asked = [*prompts, *attacked]
        result = evaluate(
            asked,
            make_backend(how, spec, asked),
            judges,
            tasks=("harm",),
            sampling=how.sampling(asked),
            cache=cache,
            folder=folder,
            provenance={
                "command": identity["command"],
                "model_name": how.model,
                "method": args.method,
                "options": asdict(args.attack) | {"seed": how.seed},
                "prompts": {"sets": args.asked.prompts, "part": args.asked.part},
            },
            retry_failed=run.retry_unscored,
            progress=run.progress,
        )
        votes = result.verdicts["harm"][VOTE]
        metrics = {
            "attacks": by_attack(asked, [votes[place] for place in range(len(asked))], binary=result.binary[VOTE]),
            **{name: result.metrics[name] for name in ("agreement", "unscored", "notes", "provenance")},
        }
        write_json(folder / METRICS_FILE, metrics)
        write_record(folder, identity)
        show_attacks(metrics, how.model, folder)
        numbers: dict[str, float] = {}
        for attack, rates in metrics["attacks"].items():
            numbers |= as_numbers(rates, f"attacks/{attack}/")
        send_numbers(numbers, args.trackers.report_to, folder, {"responses": result})
    fail_if_unscored(metrics["unscored"], run.max_unscored)
    return metrics


def _identity(
    args: AttackArguments, spec: ModelSpec | None, prompts: Sequence[Prompt], judges: Mapping[str, Judge]
) -> dict[str, Any]:
    """Return all that decides the results."""
    suffixes = Path(str(args.attack.suffixes)) if isinstance(args.attack, TransferArguments) else None
    return {
        "command": f"sails attack {args.method}",
        "options": all_but(NOT_IN_IDENTITY, args.how, args.asked, args.who, args.run, args.attack),
        "prompts": prompts_hash(prompts),
        "sampling": asdict(args.how.sampling(prompts)),
        "model": make_backend(args.how, spec, prompts).identity(),
        "judges": identities(judges),
        "suffixes": file_hash(suffixes) if suffixes is not None and suffixes.is_file() else None,
    }


def _harmful_prompts(args: AttackArguments) -> list[Prompt]:
    prompts = load_all(args.asked, args.how.seed, args.how.system_prompt)
    harmful = [prompt for prompt in prompts if prompt.kind == "harmful"]
    if not harmful:
        names = " ".join(args.asked.prompts)
        raise InputError(f"{names} has no harmful prompts to attack; choose another --prompts, or give --kind harmful")
    return harmful


def by_attack(
    prompts: Sequence[Prompt], verdicts: Sequence[Verdict], *, binary: bool = False
) -> dict[str, dict[str, Any]]:
    """Return success rates by attack; `none` is the prompts as they are, and `all` every attack.

    Intervals are over prompts. The attacks on a prompt are not independent: for `all` they are one group.
    """
    scores: dict[str, list[float | None]] = {NO_ATTACK: [], "all": []}
    groups: list[str] = []
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        attack = str(prompt.meta.get("attack", NO_ATTACK))
        scores.setdefault(attack, []).append(verdict.score)
        if attack != NO_ATTACK:
            scores["all"].append(verdict.score)
            groups.append(str(prompt.meta["attacked"]))
    return {
        attack: {
            name: value.to_json()
            for name, value in estimates(
                "harm", of, binary=binary, of_attacks=True, groups=groups if attack == "all" else None
            ).items()
        }
        for attack, of in scores.items()
    }
