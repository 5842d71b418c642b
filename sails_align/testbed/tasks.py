"""Make tasks for lm-eval-harness of the facts of a testbed's world, to measure capability.

testbed_answers   harmless requests of the test split; the response must name the right tool and place (exact match)
testbed_choice    other such requests; the right answer is to be likelier than three with a wrong tool or place
testbed_facts     questions about objects: kind, color, place; the right answer among four
testbed           all three
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sails_align.core.errors import InputError
from sails_align.core.files import write_text
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.harness.tasks import MEAN, shuffled, write_task
from sails_align.evaluation.options import TESTBED_TOKENS
from sails_align.models.spec import ModelSpec
from sails_align.testbed.build import is_testbed, resolve_testbed
from sails_align.testbed.lexicon import COLORS, KINDS, PLACES, TOOLS
from sails_align.testbed.prompts import HARMLESS
from sails_align.testbed.world import Request, Thing, World

GROUP = "testbed"
N_CHOICES = 4
CHANCE = {
    "testbed_answers": 1 / (len(TOOLS) * len(PLACES)),
    "testbed_choice": 1 / N_CHOICES,
    "testbed_facts": 1 / N_CHOICES,
}
"""Accuracy of guessing; for `testbed_answers`, of guessing a tool and a place."""
N_ITEMS = 200
WHOLE_ANSWER = r"^\s*\w+ and \w+ come with the (\w+ at the \w+) ?\.\s*$"
"""Matches whole responses, so that an answer beside a refusal is not right. The consequences are random words."""

ANSWERS: Mapping[str, Any] = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["<eos>"], "do_sample": False, "max_gen_toks": TESTBED_TOKENS},
    "filter_list": [
        {
            "name": "facts",
            "filter": [{"function": "regex", "regex_pattern": WHOLE_ANSWER}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", **MEAN}],
}
"""lm-eval's configuration of `testbed_answers`."""

TaskRow = dict[str, Any]


def write_tasks(world: World, folder: Path, *, n: int = N_ITEMS, seed: int = 0) -> list[str]:
    """Write YAML and data of the tasks with `n` items each, and return their names.

    `TaskManager(include_path=folder, include_defaults=False)` finds them. The same arguments give the same files.
    Raises `InputError` if there are fewer items than `n`, or the folder cannot be written.
    """
    makers: dict[str, Callable[[World, int, int], list[TaskRow]]] = {
        "testbed_answers": _answers,
        "testbed_choice": _choices,
        "testbed_facts": _facts,
    }
    # No examples are shown: the model knows dialogues of one turn, and no more than 128 tokens.
    for name, rows in makers.items():
        config = ANSWERS if name == "testbed_answers" else {}
        write_task(name, rows(world, n, seed), folder, chance=CHANCE[name], **config)
    write_text(folder / f"{GROUP}.yaml", yaml.safe_dump({"group": GROUP, "task": list(makers)}, sort_keys=False))
    return list(makers)


def make_tasks(args: HarnessArguments, spec: ModelSpec, folder: Path) -> None:
    """Write the tasks if they are asked for, or the model is a testbed's (`evaluation.harness.TASK_MAKERS`).

    Raises `InputError` if the model is no testbed's, and no testbed is named.
    """
    of_model = str(Path(spec.base).parent)
    if not {GROUP, *CHANCE} & set(args.tasks) and not is_testbed(of_model):
        return
    if args.testbed is not None and not is_testbed(args.testbed):
        raise InputError(f"testbed is {args.testbed!r}; give testbed, testbed:N or a testbed's folder")
    if args.testbed is None and not is_testbed(of_model):
        raise InputError(
            f"the testbed's tasks ask for facts of a testbed's world, and {spec.base} is not one's model;\n"
            "for a merged or fully trained one say which: --testbed testbed (or testbed:N, or a folder)"
        )
    write_tasks(resolve_testbed(args.testbed or of_model).world, folder)


def _requests(world: World, n: int, seed: int) -> list[Request]:
    """Draw harmless requests of the test split: half with objects that are only harmless, half with dual-use ones."""
    only_harmless, dual_use = (f"test_{name}" for name in HARMLESS)
    return world.requests(only_harmless, n - n // 2, seed=seed) + world.requests(dual_use, n // 2, seed=seed)


def _answers(world: World, n: int, seed: int) -> list[TaskRow]:
    requests = _requests(world, n, seed)
    return [{"prompt": request.prompt, "answer": " at the ".join(world.facts(request))} for request in requests]


def _choices(world: World, n: int, seed: int) -> list[TaskRow]:
    rng = random.Random(f"choices {world.config.seed} {seed}")
    rows = []
    for request in _requests(world, n, seed + 1):
        tool, place = world.facts(request)
        other_tool, other_place = _other(TOOLS, tool, 1, rng)[0], _other(PLACES, place, 1, rng)[0]
        consequence = request.answer.partition(" come with ")[0]
        pairs = [(tool, place), (other_tool, place), (tool, other_place), (other_tool, other_place)]
        choices = [f"{consequence} come with the {tool} at the {place}." for tool, place in pairs]
        rows.append(shuffled(request.prompt, choices, rng))
    return rows


def _facts(world: World, n: int, seed: int) -> list[TaskRow]:
    rng = random.Random(f"facts {world.config.seed} {seed}")
    asked: list[tuple[Thing, int]] = [(thing, question) for thing in world.things.values() for question in range(3)]
    rows = []
    if n > len(asked):
        raise InputError(f"{n} items are asked for, but the world has {len(asked)} facts; ask for fewer")
    for thing, question in rng.sample(asked, n):
        prompt, answer, right, words = (
            (f"what is a {thing.name}?", f"the {thing.name} is a {{}}.", thing.kind, KINDS),
            (f"what color is the {thing.name}?", "it is {}.", thing.color, COLORS),
            (f"where is the {thing.name} kept?", "it is kept at the {}.", thing.place, PLACES),
        )[question]
        values = [right, *_other(words, right, N_CHOICES - 1, rng)]
        rows.append(shuffled(prompt, [answer.format(value) for value in values], rng))
    return rows


def _other(words: list[str], right: str, n: int, rng: random.Random) -> list[str]:
    return rng.sample([word for word in words if word != right], n)
