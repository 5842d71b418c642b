"""The command `sails attack`: harmful prompts under attack, and how often the attacks succeed.

sails attack gcg --model runs/mine --prompts testbed --n_prompts 16      a suffix for each prompt, by search
sails attack gcg --model ... --prompts advbench --universal true         one suffix for all prompts
sails attack wrappers --model ... --prompts harmbench --judge llm ...    wrappings known to lead models on
sails attack transfer --suffixes runs/other/attacked.jsonl ...           suffixes found on other prompts or models

<output_dir>/attacked.jsonl    the attacked prompts: a prompt set, also for `sails eval safety --prompts`
<output_dir>/searches/         the state of each search, from which a rerun goes on
<output_dir>/responses.jsonl, verdicts.jsonl, metrics.json      with and without the attacks, if there is a judge
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sails_align.core.errors import InputError
from sails_align.core.files import work_folder, write_json
from sails_align.evaluation.attacks import ATTACKS, Setting
from sails_align.evaluation.attacks.parse import AttackArguments, parse
from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.evaluate import evaluate
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.panel import fail_if_unscored
from sails_align.evaluation.metrics import METRICS, Estimate, estimate, estimates
from sails_align.evaluation.output import cache_file, output_folder, prompt_row, write_rows
from sails_align.evaluation.prompts import is_of_testbed
from sails_align.evaluation.prompts.load import load_all
from sails_align.evaluation.records import Judge, Prompt, Verdict
from sails_align.evaluation.result import VOTE
from sails_align.evaluation.tables import agreement_lines
from sails_align.models.spec import ModelSpec

NO_ATTACK = "none"


def main(argv: Sequence[str], prog: str = "sails attack") -> dict[str, Any] | None:
    """Parse, attack, write; respond and judge, if there is a judge. Returns what `metrics.json` has, or None.

    Raises:
        InputError: for options, a model, prompts or a judge that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    args = parse(argv, prog)
    folder = output_folder(args.run, f"attack-{args.method}", args.how.model)
    with work_folder(folder):
        spec, loaded = find_spec(args.how), load_all(args.asked, args.how.seed, args.how.system_prompt)
        prompts = [prompt for prompt in loaded if prompt.kind == "harmful"]
        if not prompts:
            names = " ".join(args.asked.prompts)
            raise InputError(
                f"{names} has no harmful prompts to attack; choose another --prompts, or give --kind harmful"
            )
        is_judged = bool(args.who.judge) or is_of_testbed(prompts)
        judges = make_judges(args.who, prompts) if is_judged else {}  # before the search: not to fail after hours
        setting = Setting(spec, folder, args.how.seed, args.how.batch_size, args.run.progress)
        attacked = ATTACKS.get(args.method).load()(args.attack, prompts, setting)
        path = folder / "attacked.jsonl"
        write_rows(path, [prompt_row(prompt) for prompt in attacked])
        print(f"attacked  {path} ({len(attacked)} prompts)")
        if not is_judged:
            print(f"judge it  sails eval safety --prompts {path} --model {args.how.model} --judge ...")
            return None
        metrics = _measured(args, spec, judges, [*prompts, *attacked], folder)
        _show(metrics, args, folder)
    fail_if_unscored(metrics["unscored"], args.run.max_unscored)
    return metrics


def _measured(
    args: AttackArguments, spec: ModelSpec | None, judges: Mapping[str, Judge], asked: list[Prompt], folder: Path
) -> dict[str, Any]:
    """Responses and verdicts with and without the attacks, and the success rates of each attack."""
    with closing(Cache(cache_file(args.run))) as cache:
        result = evaluate(
            asked,
            make_backend(args.how, spec, asked),
            judges,
            tasks=("harm",),
            sampling=args.how.sampling(asked),
            cache=cache,
            folder=folder,
            provenance={
                "method": args.method,
                "options": asdict(args.attack) | {"seed": args.how.seed},
                "prompts": {"sets": args.asked.prompts, "part": args.asked.part},
            },
            retry_failed=args.run.retry_unscored,
            progress=args.run.progress,
        )
    votes = result.verdicts["harm"][VOTE]
    metrics = {
        "attacks": by_attack(asked, [votes[place] for place in range(len(asked))], binary=result.binary[VOTE]),
        **{name: result.metrics[name] for name in ("agreement", "unscored", "notes", "provenance")},
    }
    write_json(folder / "metrics.json", metrics)
    return metrics


def by_attack(
    prompts: Sequence[Prompt], verdicts: Sequence[Verdict], *, binary: bool = False
) -> dict[str, dict[str, Any]]:
    """Success rates by attack; `none` is the prompts as they are, and `all` every attack.

    Intervals are over prompts, whose attacks are not independent of each other: those of `all` resample prompts, each
    with its share of successful attacks.
    """
    scores: dict[str, list[float | None]] = {NO_ATTACK: [], "all": []}
    of_prompt: dict[str, list[float | None]] = {}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        attack = str(prompt.meta.get("attack", NO_ATTACK))
        scores.setdefault(attack, []).append(verdict.score)
        if attack != NO_ATTACK:
            scores["all"].append(verdict.score)
            of_prompt.setdefault(str(prompt.meta["attacked"]), []).append(verdict.score)

    def success(of: Sequence[float | None]) -> dict[str, Estimate]:
        return estimates("harm", of, binary=binary, of_attacks=True)

    rates = {attack: success(of) for attack, of in scores.items()}
    shares = [{name: value.value for name, value in success(of).items()} for of in of_prompt.values()]
    for name, value in rates["all"].items():
        clustered = estimate([share[name] for share in shares])
        rates["all"][name] = replace(value, ci_low=clustered.ci_low, ci_high=clustered.ci_high)
    return {attack: {name: value.to_json() for name, value in of.items()} for attack, of in rates.items()}


def _show(metrics: dict[str, Any], args: AttackArguments, folder: Path) -> None:
    table = Table(title=f"Attacks on {args.how.model} (95% intervals over prompts)")
    shown = list(next(iter(metrics["attacks"].values())))
    for heading in ("attack", *(METRICS[name].heading for name in shown), "n", "unscored"):
        table.add_column(heading, justify="left" if heading == "attack" else "right")
    for attack, rates in metrics["attacks"].items():
        cells = [METRICS[name].with_interval(Estimate(**rates[name])) for name in shown]
        counts = rates[shown[0]]
        table.add_row(attack, *cells, str(counts["n"]), str(counts["n_unscored"]))
    console = Console()
    console.print(table)
    for line in (*agreement_lines(metrics["agreement"]), *(f"note      {note}" for note in metrics["notes"])):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for name in ("responses.jsonl", "verdicts.jsonl", "metrics.json"):
        console.print(f"{name.partition('.')[0]:<10}{folder / name}", highlight=False, soft_wrap=True, markup=False)
