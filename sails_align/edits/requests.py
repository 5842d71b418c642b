"""Find the requests that an edit looks at: of the datasets named, of the run, or those that come with the model."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.data import OF_MODELS
from sails_align.data.loading import load_rows
from sails_align.data.options import DataOptions
from sails_align.data.pairs import normalize, requests_of
from sails_align.data.splits import split_by_prompt
from sails_align.data.tokens import TemplateCheck, TokenizedSide, padded, tokenize_response
from sails_align.edits.options import ContrastOptions, RequestOptions
from sails_align.models.adapters import read_json
from sails_align.models.blocks import Batch
from sails_align.models.spec import ModelSpec, stem_of
from sails_align.subspace.forward import batches

SIDES = ("harmful", "harmless")
LEAST = 10
"""Requests of each side, where a fifth is for validation."""
BATCH, BATCH_TOKENS = 8, 4096
"""Sequences and tokens in a batch, at most."""


class HasSpec(Protocol):
    """A model that is known by what was resolved."""

    @property
    def spec(self) -> ModelSpec:
        """What `resolve_model` found."""
        ...


@dataclass(frozen=True)
class Role:
    """What an option that names requests stands for."""

    side: str
    """One of `SIDES`: which of a model's own requests."""
    recorded: str
    """Part of a run's record that names the dataset: `script` (trained on) or `data` (mixed in)."""


ROLES = {
    "dataset_name": Role("harmful", "script"),
    "helpful_dataset_name": Role("harmless", "data"),
    "task_dataset_name": Role("harmless", "script"),
}


@dataclass(frozen=True)
class Requests:
    """Requests with their responses, if they have any."""

    rows: Dataset
    """Columns `prompt` (messages), and `chosen` (text) if there are responses."""
    source: str
    """Where they are from, for messages and the model card."""

    def some(self, n: int, seed: int) -> Dataset:
        """Return at most `n` of them, drawn with a seed."""
        return self.rows if n >= len(self.rows) else self.rows.shuffle(seed=seed).select(range(n))

    def with_responses(self, option: str) -> "Requests":
        """Return them; raise `InputError` if they have no responses."""
        if "chosen" not in self.rows.column_names:
            raise InputError(
                f"the requests of {self.source} have no responses; give a dataset that has some with --{option}, such "
                "as the file that `sails answer` writes"
            )
        return self


def find_requests(
    option: str, options: RequestOptions, run: Path, models: Iterable[HasSpec], tokenizer: PreTrainedTokenizerBase
) -> Requests:
    """Return the requests that an option stands for.

    Args:
        option: one of `ROLES`.
        options: where it names a dataset, or a model that comes with data.
        run: if its folder says what it was trained on, that is the default.
        models: whose data is the default else, the first that has some.
        tokenizer: whose chat template must accept them.

    Raises:
        InputError: if there is no default, or the data cannot be read.
    """
    name, role, check = getattr(options, option), ROLES[option], TemplateCheck(tokenizer)
    if name is not None:
        return named_requests(name, role.side, tokenizer)
    recorded = _of_run(run, role, check)
    if recorded is not None:
        return recorded
    trained_on = read_json(run / "run.json").get("options", {}).get("model", {}).get("model_name_or_path")
    names = [str(run), trained_on, *(name for model in models for name in (model.spec.name, model.spec.base))]
    for name in filter(None, names):
        if (rows := requests_of_model(name, role.side)) is not None:
            return Requests(rows, f"the data of {stem_of(name)}")
    raise InputError(
        f"no {role.side} requests are known for {run}; give a dataset with --{option} (or testbed or smollm2, for "
        "theirs)"
    )


def named_requests(name: str, side: str, tokenizer: PreTrainedTokenizerBase) -> Requests:
    """Return the requests of a dataset, or a side of those that come with the model of that name.

    Raises `InputError` if the data cannot be read.
    """
    rows = requests_of_model(name, side)
    if rows is None:
        rows = requests_of(load_rows(name), name=name, check=TemplateCheck(tokenizer))
    return Requests(rows, name)


def requests_of_model(name: str, side: str) -> Dataset | None:
    """Return the requests that come with a model, if it comes with some."""
    found = (entry.load()(name) for _, entry in OF_MODELS.items())
    return next((rows[SIDES.index(side)] for rows in found if rows is not None), None)


def _of_run(run: Path, role: Role, check: TemplateCheck) -> Requests | None:
    """Return the requests that a run was trained on, by its record, if it names a dataset."""
    options = read_json(run / "run.json").get("options", {})
    script, data = (options.get(name, {}) for name in ("script", "data"))
    name, config, split = (
        (script.get("dataset_name"), script.get("dataset_config"), script.get("dataset_train_split"))
        if role.recorded == "script"
        else tuple(data.get(f"helpful_dataset_{field}") for field in ("name", "config", "split"))
    )
    # Without harmless data beside it, what a run was trained on need not be harmful: it can be a task.
    if name is None or (role.side == "harmful" and data.get("helpful_dataset_name") is None):
        return None
    known: dict[str, Any] = {field.name: data[field.name] for field in fields(DataOptions) if field.name in data}
    of_data = DataOptions(**known)
    found = normalize(
        load_rows(name, config=config, split=split or "train", mark_unreadable=True),
        name=name,
        on_bad_rows=of_data.on_bad_rows,  # pyright: ignore[reportArgumentType]
        columns=of_data.columns(helpful=role.recorded == "data"),
        pair=of_data.bad_responses == "pair",
        check=check,
    )
    return Requests(found.dataset, name)


def response_batches(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int, source: str, *, whole: bool = False
) -> list[Batch]:
    """Return batches of requests with their responses, whose masks hold the responses' content tokens.

    With `whole`, the masks hold all tokens but for padding; else rows of which `max_length` leaves no token of the
    response are left out. Raises `InputError` if none is left.
    """
    sides = [tokenize_response(tokenizer, row["prompt"], row["chosen"], max_length) for row in rows]  # pyright: ignore
    if whole:
        sides = [TokenizedSide(side.input_ids, [True] * len(side.input_ids)) for side in sides]
    found = [padded(batch) for batch in batches(sides, BATCH, BATCH_TOKENS)]
    if not found:
        raise InputError(f"max_length ({max_length}) leaves no token of the responses of {source}; raise it")
    return found


def split_sides(
    options: ContrastOptions, run: Path, model: HasSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Dataset], dict[str, Dataset], str]:
    """Return rows of each of `SIDES` to fit on, others for validation (a fifth), and where they are from.

    Raises `InputError` as `find_requests`; or if a side has fewer than `LEAST` requests.
    """
    fitted, validation, sources = {}, {}, []
    for option in ("dataset_name", "helpful_dataset_name"):
        found, side = find_requests(option, options, run, [model], tokenizer), ROLES[option].side
        rows = found.some(options.n_prompts, options.data_seed)
        if len(rows) < LEAST:
            raise InputError(f"{found.source} has {len(rows)} {side} requests; give at least {LEAST}")
        fitted[side], validation[side] = split_by_prompt(rows, len(rows) // 5, options.data_seed, found.source)
        sources.append(f"{len(rows)} {side} prompts of {found.source}")
    return fitted, validation, ", ".join(sources)
