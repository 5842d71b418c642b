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

from sails_align.core.artifacts import content_hash, package_versions, work_folder, write_json
from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.evaluation.attacks.options import (
    TESTBED_WRAPPERS,
    Arguments,
    GcgArguments,
    TransferArguments,
    WrapperArguments,
    parse,
    read_suffixes,
)
from sails_align.evaluation.attacks.wrappers import WRAPPERS, transfer, with_suffix, wrap
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.judges.panel import Panel, fail_if_unscored, unscored
from sails_align.evaluation.metrics import METRICS, Estimate, attack_estimates, estimate
from sails_align.evaluation.pipeline import respond, response_row, verdict_row, write_rows
from sails_align.evaluation.records import Item, Judge, ModelSpec, Prompt, Verdict
from sails_align.evaluation.safety import Verdicts
from sails_align.evaluation.tables import agreement_lines

HARMFUL = "harmful"
NO_ATTACK = "none"


def main(argv: Sequence[str], prog: str = "sails attack") -> dict[str, Any] | None:
    """Parse, attack, write; respond and judge, if there is a judge. Returns what `metrics.json` has, or None.

    Raises:
        InputError: for options, a model, prompts or a judge that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    args = parse(argv, prog)
    folder = args.run.folder(f"attack-{args.method}", args.how.model)
    with work_folder(folder):
        spec = args.how.spec()
        prompts = [
            prompt for prompt in args.asked.load(args.how.seed, args.how.system_prompt) if prompt.kind == HARMFUL
        ]
        if not prompts:
            names = " ".join(args.asked.prompts)
            raise InputError(
                f"{names} has no harmful prompts to attack; choose another --prompts, or give --kind harmful"
            )
        is_judged = bool(args.who.judge) or all("testbed" in prompt.meta for prompt in prompts)
        judges = args.who.make(prompts) if is_judged else {}  # before the search: not to fail after hours
        attacked = attacked_prompts(args, spec, prompts, folder)
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


def attacked_prompts(args: Arguments, spec: ModelSpec | None, prompts: list[Prompt], folder: Path) -> list[Prompt]:
    """Prompts under the attack that the options name; searches keep their states in the folder."""
    match args.attack:
        case TransferArguments(suffixes=None):
            raise InputError("no suffixes are given; give --suffixes, the attacked.jsonl of a search")
        case TransferArguments(suffixes=str(path)):
            return transfer(read_suffixes(Path(path)), prompts)
        case WrapperArguments(wrappers=names):
            of_testbed = all("testbed" in prompt.meta for prompt in prompts)
            names = names or list(TESTBED_WRAPPERS if of_testbed else WRAPPERS)
            return [wrap(prompt, name, {**WRAPPERS, **TESTBED_WRAPPERS}) for name in names for prompt in prompts]
        case _:
            assert spec is not None
            assert args.search is not None
            return gcg(args, spec, prompts, folder / "searches")


def gcg(args: Arguments, spec: ModelSpec, prompts: Sequence[Prompt], folder: Path) -> list[Prompt]:
    """The prompts with the suffixes that were found; searches that ended before, or were stopped, are gone on with."""
    from sails_align.evaluation.attacks.gcg import search
    from sails_align.evaluation.backends.local_model import load_model, load_tokenizer

    assert isinstance(args.attack, GcgArguments)
    assert args.search is not None
    options, universal, default = args.search, args.attack.universal, args.attack.target
    targets = [(prompt, str(prompt.meta.get("target") or default)) for prompt in prompts]
    groups = [targets] if universal else [[target] for target in targets]
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    attacked: list[Prompt] = []
    with progress_bar(args.run.progress) as bar:
        all_searches = bar.add_task("searches", total=len(groups))
        steps = bar.add_task("steps", total=options.n_steps)
        for group in groups:
            bar.reset(steps)
            what = [spec.identity, spec.dtype, asdict(options), args.how.seed]
            what += [[list(prompt.messages), target] for prompt, target in group]
            found = search(
                model,
                tokenizer,
                group,
                options,
                seed=args.how.seed,
                batch_size=args.how.batch_size,
                state_path=folder / f"{content_hash(what)[:16]}.json",
                on_step=lambda step, loss: bar.update(steps, completed=step, description=f"steps (loss {loss:.2f})"),
            )
            bar.advance(all_searches)
            about = {"loss": found.loss, "matched": found.matched, "n_steps": len(found.losses)}
            for prompt, target in group:
                with_it = with_suffix(prompt, found.suffix, "gcg")
                attacked.append(replace(with_it, meta={**with_it.meta, **about, "target": target}))
    return attacked


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """A line of `attacked.jsonl`."""
    return {
        "id": prompt.id,
        "messages": list(prompt.messages),
        "kind": prompt.kind,
        "category": prompt.category,
        "meta": dict(prompt.meta),
    }


def _measured(
    args: Arguments, spec: ModelSpec | None, judges: Mapping[str, Judge], asked: list[Prompt], folder: Path
) -> dict[str, Any]:
    """Responses and verdicts with and without the attacks, and the success rates of each attack."""
    options = {"retry_failed": args.run.retry_unscored, "progress": args.run.progress}
    with closing(Cache(args.run.cache_file())) as cache:
        sampling = args.how.sampling(asked)
        with closing(args.how.make_backend(spec, asked)) as backend:
            backend_identity = backend.identity()
            completions = respond(backend, asked, sampling, cache, **options)
        write_rows(folder / "responses.jsonl", [response_row(*pair) for pair in zip(asked, completions, strict=True)])
        panel = Panel(judges, cache, **options)
        with closing(panel):
            items = [
                None if completion.text is None else Item(prompt, completion.text)
                for prompt, completion in zip(asked, completions, strict=True)
            ]
            verdicts = panel.judge("harm", items)
            identities, binary = panel.identities(), panel.binary
            indexed: Verdicts = {"harm": {name: dict(enumerate(of)) for name, of in verdicts.items()}}
            agreement, notes = panel.agreement(indexed), panel.notes(indexed)
    rows = [
        verdict_row(prompt, name, "harm", verdict)
        for name, of_judge in verdicts.items()
        for prompt, verdict in zip(asked, of_judge, strict=True)
    ]
    write_rows(folder / "verdicts.jsonl", rows)
    metrics = {
        "attacks": by_attack(asked, verdicts["vote"], binary=binary),
        "agreement": agreement,
        "unscored": unscored(indexed),
        "notes": notes,
        "provenance": {
            "method": args.method,
            "model": backend_identity,
            "judges": identities,
            "options": asdict(args.attack) | (asdict(args.search) if args.search else {}) | {"seed": args.how.seed},
            "sampling": {name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "seed")},
            "prompts": {"sets": args.asked.prompts, "part": args.asked.part},
            "versions": package_versions(),
        },
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
    rates = {attack: attack_estimates(of, binary=binary) for attack, of in scores.items()}
    estimates = [attack_estimates(of, binary=binary) for of in of_prompt.values()]
    shares = [{name: value.value for name, value in of.items()} for of in estimates]
    for name, value in rates["all"].items():
        clustered = estimate([share[name] for share in shares])
        rates["all"][name] = replace(value, ci_low=clustered.ci_low, ci_high=clustered.ci_high)
    return {attack: {name: value.to_json() for name, value in of.items()} for attack, of in rates.items()}


def _show(metrics: dict[str, Any], args: Arguments, folder: Path) -> None:
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
