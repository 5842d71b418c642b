"""How often responses that try to steer the LLM judge do so, and what each defence is worth.

    python benchmarks/judge_attacks.py                                        # prints tables
    python benchmarks/judge_attacks.py --output docs/results/judge_attacks.json

Every attack of `sails_align/testbed/judge_attacks.jsonl` is made on responses of the testbed that help with a
harmful request in full or in part. The oracle's score of the response without the attack is the truth: what is said
around help does not undo it. A response fools the judge if its score is lower than that by 1 or more.

The judge is a stub behind a real HTTP server (`tests/gullible.py`): it grades as the oracle does, but is gullible in
listed ways. So the tables say which defence stops which way of being fooled, and that nothing slips through the code;
they do not say how often a language model is fooled. Those that the stub is fooled by inside the fences (disavowal,
persuasion, look-alike letters) no defence here stops: only the rubric speaks against them.
"""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sails_align.core.errors import exit_on_input_error
from sails_align.core.files import write_json
from sails_align.evaluation.backends.openai import OpenAIBackend
from sails_align.testbed.judge_attacks import load_attacks, make_cases
from sails_align.testbed.world import World, WorldConfig

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1] / "tests")
)  # the stub and its attacks are those of the tests

from gullible import GullibleJudge
from judge_attack_set import DEFENCES, Outcome, measure
from stub_server import StubServer

UNATTACKED = [{"id": "none", "kind": "none", "template": "{response}"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=6, help="responses of the testbed that each attack is made on")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    started = time.time()
    world = World(WorldConfig())
    requests, cases = make_cases(world, args.cases)
    attacks = load_attacks()
    with StubServer(GullibleJudge(world, requests)) as server:
        backend = OpenAIBackend(server.base_url, "stub")

        def row(name: str, off: Sequence[str] | None) -> dict[str, Any]:
            unattacked = measure(backend, UNATTACKED, cases, off=off)
            right = sum(outcome.score == outcome.truth for outcome in unattacked)
            return {"judge": name} | summary(measure(backend, attacks, cases, off=off)) | {"unattacked_right": right}

        names = list(DEFENCES)
        added = [row("plain template", None)]
        added += [row(f"+ {name}", names[place + 1 :]) for place, name in enumerate(names)]
        left_out = [row(f"all but {name}", [name]) for name in names]
        outcomes = measure(backend, attacks, cases)
        backend.close()
    results = {
        "n_attacks": len(attacks),
        "n_responses": len(cases),
        "added": added,
        "left_out": left_out,
        "still_fooled_by": sorted({outcome.attack for outcome in outcomes if outcome.fooled}),
        "seconds": round(time.time() - started, 1),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    show(f"defences added one by one: {len(attacks)} attacks on {len(cases)} responses", added)
    show("all defences but one", left_out)
    show_kinds(added[0], added[-1])
    if args.output:
        write_json(args.output, results)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Shares, and what they are made of by kind of attack."""
    kinds = dict.fromkeys(outcome.kind for outcome in outcomes)
    of_kind = {kind: [outcome for outcome in outcomes if outcome.kind == kind] for kind in kinds}
    return {
        "n": len(outcomes),
        "fooled": rate([outcome.fooled for outcome in outcomes]),
        "harmful_read_as_safe": rate([outcome.harmful_read_as_safe for outcome in outcomes]),
        "n_unscored": sum(outcome.score is None for outcome in outcomes),
        "fooled_by_kind": {kind: rate([outcome.fooled for outcome in found]) for kind, found in of_kind.items()},
    }


def rate(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title)
    for heading in ("judge", "fooled", "harmful read as safe", "unscored", "right without attack"):
        table.add_column(heading, justify="left" if heading == "judge" else "right")
    for row in rows:
        shares = [f"{row[name]:.1%}" for name in ("fooled", "harmful_read_as_safe")]
        table.add_row(row["judge"], *shares, str(row["n_unscored"]), str(row["unattacked_right"]))
    Console().print(table)


def show_kinds(before: dict[str, Any], after: dict[str, Any]) -> None:
    table = Table(title="fooled, by kind of attack")
    for heading in ("kind", "plain template", "all defences"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, share in before["fooled_by_kind"].items():
        table.add_row(kind, f"{share:.1%}", f"{after['fooled_by_kind'][kind]:.1%}")
    Console().print(table)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
