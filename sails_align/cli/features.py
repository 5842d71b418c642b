"""The command `sails features`: what the features of a finished run's subspace mean, and what training did to them.

sails features --run runs/mine

<run>/features.json   for each layer: the features, their activations before and after training, how many are concepts
                      of harm; texts that they are active in, words they promote, neighbours, Neuronpedia pages
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.core.options import check_least
from sails_align.data.formats import Message
from sails_align.data.tokens import TokenizedSide, tokenize_response
from sails_align.models.adapters import read_json
from sails_align.models.load import load_model
from sails_align.models.resolve import resolve_model
from sails_align.saes.explain import meanings
from sails_align.saes.sets import SAESet
from sails_align.subspace.basis import Subspace
from sails_align.subspace.concepts import States, concepts, last_token_states, shown
from sails_align.training import run as align
from sails_align.training.dataset import Source
from sails_align.training.subspace import saes_of

FILE = "features.json"
N_PRINTED = 4
"""Features of a layer that are printed; more are in the file."""
SIDES = ("harmful", "harmless")


@dataclass
class FeaturesArguments:
    """Of which run."""

    run: str = field(default="runs/sft-sails-testbed", metadata={"help": "A finished run of --init sails."})
    n_texts: int = field(default=256, metadata={"help": "Number of harmful texts, and of harmless ones, to read."})

    def __post_init__(self) -> None:
        check_least(self, n_texts=1)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, look, write, print. Returns what is in `features.json`.

    Raises:
        InputError: if the run has no subspace of SAE features, or its model, SAEs or data cannot be had any more.
    """
    (args,) = CommandLine.read(argv).parse([FeaturesArguments], prog=prog)
    run = Path(args.run)
    record = read_json(run / "run.json")
    method = record["options"].get("method") if isinstance(record.get("options"), dict) else None
    if method not in ("sft", "dpo") or not (run / "config.yaml").is_file():
        raise InputError(f"{run} is no run of sails train sft or dpo; give the folder of one")
    if not (run / "subspace").is_dir():
        raise InputError(f"the adapter of {run} was not initialized in a subspace; pass a run with --init sails")
    subspace = Subspace.load(run / "subspace")
    if "features" not in subspace.provenance:
        raise InputError(f"the subspace of {run} was not made of SAE features; give a run with --init sails")
    options = align.parse(method, ["--config", str(run / "config.yaml"), "--push_to_hub", "false"])
    options, testbed = align.resolved(options)
    source = align.load_source(options, testbed)
    if source.helpful is None:
        raise InputError(
            f"{run} had no harmless requests to compare harmful ones with;\ntrain one with --helpful_dataset_name"
        )
    helpful = source.helpful
    saes = saes_of(options, source)
    max_length = options.training.max_length or 1024
    if lacking := subspace.provenance["features"]["layers"].keys() - set(map(str, saes)):
        raise InputError(
            f"there is no SAE of layer {', '.join(sorted(lacking))}; give a run with its SAEs (--sae_path)"
        )
    _check_same(run, record, source, saes)
    spec = resolve_model(str(run), trust_remote_code=options.training.trust_remote_code)
    if spec.adapter is None:
        raise InputError(f"{run} has no adapter; give a run with --init sails")
    model: Any = load_model(spec)

    def states() -> tuple[States, States]:
        of = [
            last_token_states(model, source.tokenizer, list(saes), requests_of(side, args.n_texts), max_length)
            for side in (source.held_out, helpful)
        ]
        return of[0], of[1]

    after = states()
    with model.disable_adapter():
        before = states()
        texts = list(texts_of(source, args.n_texts, max_length))
        told = meanings(model.get_base_model(), source.tokenizer, saes, shown(subspace), texts)
    drift = read_json(run / "metrics.json").get("drift")
    found = {**concepts(subspace, saes, before, after), "drift": drift, "meanings": [of.to_json() for of in told]}
    write_json(run / FILE, found)
    console = Console()
    console.print(table_of(found))
    console.print(f"features  {run / FILE}", highlight=False, soft_wrap=True)
    return found


def _check_same(run: Path, record: Mapping[str, Any], source: Source, saes: SAESet) -> None:
    """Refuse to look at a run with another model, other data or other SAEs than it had.

    Raises:
        InputError: if one of them has changed.
    """
    now = {str(layer): info.sha256 for layer, info in saes.infos.items()}
    then = {layer: of["sha256"] for layer, of in (record.get("saes") or {}).items()}
    changed = {
        "SAEs": now != then,
        "training data": record["data"]["train"]["sha256"] != source.data_hash(),
        "base model": record["identity"]["model"] != source.identity(),
    }
    if other := [name for name, is_other in changed.items() if is_other]:
        raise InputError(
            f"the {' and '.join(other)} in config.yaml of {run} changed since training;\nrestore them, or train again"
        )


def requests_of(dataset: Dataset, n: int) -> list[list[Message]]:
    """The first prompts of a data set."""
    return dataset.select(range(min(n, len(dataset))))["prompt"][:]


def texts_of(source: Source, n: int, max_length: int) -> Iterator[TokenizedSide]:
    """Conversations of the training data, to look for features in: harmful requests, then harmless ones."""
    for dataset in (source.safety, source.helpful):
        for row in [] if dataset is None else dataset.select(range(min(n, len(dataset)))).to_list():
            yield tokenize_response(source.tokenizer, row["prompt"], row["chosen"], max_length)


def table_of(found: Mapping[str, Any]) -> Table:
    """The features with their words and activations."""
    table = Table(title="meaning of the features (activations at the end of requests, before -> after training)")
    for heading in ("layer, feature", "promotes", "most active at", "on harmful", "on harmless"):
        table.add_column(heading, overflow="fold")
    told = {(meaning["layer"], meaning["id"]): meaning for meaning in found["meanings"]}
    for layer, of in found["layers"].items():
        for feature in of["features"][:N_PRINTED]:
            meaning = told[int(layer), feature["id"]]
            changes = [f"{feature[f'{side}_before']:.2f} -> {feature[f'{side}_after']:.2f}" for side in SIDES]
            row = (f"{layer}, {feature['id']}", " ".join(meaning["promoted"]), peaks(meaning["contexts"]), *changes)
            table.add_row(*map(escape, row))
    return table


def peaks(contexts: Sequence[Mapping[str, Any]]) -> str:
    """The token of each text at which the feature is most active."""
    found = (max(zip(of["activations"], of["tokens"], strict=True))[1].strip() for of in contexts)
    return " ".join(dict.fromkeys(found))
