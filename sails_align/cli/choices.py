"""The command `sails list`: what can be chosen, from the code's own registries.

sails list              # the kinds, with the names of each
sails list judges       # the entries of one kind, with what they are
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from sails_align.core.command_line import CommandLine
from sails_align.core.options import check_choices
from sails_align.core.registry import Entry
from sails_align.core.tables import FittedTable

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of things to choose from."""

    summary: str
    """With the option that takes a name."""
    headings: Sequence[str]
    rows: Callable[[], Rows]
    """Imports what it needs."""


def _of(target: str) -> Callable[[], Rows]:
    """Return a function to the names and summaries of a registry, `package.module:REGISTRY`."""

    def rows() -> Rows:
        return [(name, entry.summary) for name, entry in Entry(f"sails_align.{target}", "").load().items()]

    return rows


def _models() -> Rows:
    from sails_align.models import FAMILIES, RESOLVERS

    return [*((name, entry.summary) for name, entry in RESOLVERS.items()), *FAMILIES.items()]


def _saes() -> Rows:
    from sails_align.saes.files import usable_releases

    return [(model, ", ".join(names)) for model, names in usable_releases().items()]


def _formats() -> Rows:
    from sails_align.data.formats import FORMATS

    named: dict[tuple[str, str], list[str]] = {}
    for form in FORMATS:
        beside = ", ".join(name for name in (form.rejected, form.better) if name and name != form.chosen)
        named.setdefault((form.chosen, beside), []).append(form.prompt or f"(in {form.chosen})")
    return [(chosen, ", ".join(prompts), beside) for (chosen, beside), prompts in named.items()]


def _prompt_sets() -> Rows:
    from sails_align.evaluation.prompts import MAKERS
    from sails_align.evaluation.prompts.sets import PROMPT_SETS

    own = [(name, entry.summary, "of this project") for name, entry in MAKERS.items()]
    return own + [
        (name, of.source.citation, of.source.licence + ("; gated" if of.source.gated else ""))
        for name, of in PROMPT_SETS.items()
    ]


def _labelled(target: str) -> Callable[[], Rows]:
    """Return a function to the names and labels of a study's registry."""

    def rows() -> Rows:
        return [(name, entry.label) for name, entry in Entry(f"sails_align.{target}", "").load().items()]

    return rows


ALL = "all"
_ENTRY = ("name", "what it is")
KINDS: Mapping[str, Kind] = {
    "models": Kind("Models: names of this package, and architectures of transformers.", _ENTRY, _models),
    "saes": Kind("SAEs on the hub, for --sae_release. Folders and files: --sae_path.", ("model", "releases"), _saes),
    "data-formats": Kind(
        "Columns of datasets, for --dataset_name.", ("response", "prompt (one of)", "other columns"), _formats
    ),
    "initializers": Kind("Initializations of adapters, for --init.", _ENTRY, _of("initializers:INITIALIZERS")),
    "losses": Kind("Losses in addition to TRL's, for --loss.", _ENTRY, _of("training.losses:LOSSES")),
    "callbacks": Kind("Changes during training, by their options.", _ENTRY, _of("training.callbacks:CALLBACKS")),
    "transforms": Kind("Changes of training data, by their options.", _ENTRY, _of("data.transforms:TRANSFORMS")),
    "edits": Kind("Edits of trained weights: sails edit NAME.", _ENTRY, _of("edits:EDITS")),
    "steering": Kind("Hooks at inference, for --steer.", _ENTRY, _of("steering:HOOKS")),
    "sae-algorithms": Kind(
        "Algorithms of sails train-sae, for --architecture.", _ENTRY, _of("saes.algorithms:ALGORITHMS")
    ),
    "prompts": Kind("Prompt sets, for --prompts.", ("name", "source", "licence"), _prompt_sets),
    "judges": Kind("Judges, for --judge.", _ENTRY, _of("evaluation.judges:JUDGES")),
    "backends": Kind("What runs a model in an evaluation, for --backend.", _ENTRY, _of("evaluation.backends:BACKENDS")),
    "attacks": Kind("Attacks: sails attack NAME.", _ENTRY, _of("evaluation.attacks:ATTACKS")),
    "ablations": Kind(
        "Changes of SAILS in sails compare --study ablations, for --ablations.",
        _ENTRY,
        _labelled("experiments.ablations:ABLATIONS"),
    ),
    "methods": Kind(
        "Methods of sails compare --study methods, for --methods.",
        _ENTRY,
        _labelled("experiments.methods.entries:METHODS"),
    ),
    "defences": Kind(
        "Methods of sails compare --study tampering, for --defences.",
        _ENTRY,
        _labelled("experiments.tampering.defences:DEFENCES"),
    ),
}


@dataclass(frozen=True)
class ListOptions:
    """What to list."""

    kind: str = field(default=ALL, metadata={"help": "What to list. Default: the names of all.", "positional": True})
    markdown: bool = field(default=False, metadata={"help": "Print Markdown."})

    def __post_init__(self) -> None:
        check_choices(self, {"kind": (ALL, *KINDS)})


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print what can be chosen."""
    (options,) = CommandLine.read(argv).parse([ListOptions], prog=prog)
    kinds = KINDS if options.kind == ALL else {options.kind: KINDS[options.kind]}
    if options.markdown:
        print(as_markdown(kinds), end="")
    elif options.kind == ALL:
        names = [(name, ", ".join(dict.fromkeys(row[0] for row in kind.rows()))) for name, kind in kinds.items()]
        Console().print(FittedTable("sails list KIND shows more of one", ("kind", "names"), names, n_texts=2))
    else:
        (kind,) = kinds.values()
        table = FittedTable(kind.summary, kind.headings, kind.rows(), n_texts=len(kind.headings))
        Console().print(table)


def as_markdown(kinds: Mapping[str, Kind]) -> str:
    """Return a section with a table for each kind."""
    return "\n".join(_section(name, kind) for name, kind in kinds.items())


def _section(name: str, kind: Kind) -> str:
    lines: list[Sequence[Any]] = [kind.headings, ["---"] * len(kind.headings)]
    lines += [[f"`{row[0]}`", *row[1:]] for row in kind.rows()]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"## {name}\n\n{kind.summary}\n\n{table}\n"
