"""Convert datasets to preference pairs, SFT examples and prompts, each a `datasets.Dataset` on disk.

rows = load_rows("data/pairs.jsonl.gz")            # a hub id, a folder, or a json, jsonl, csv, tsv or parquet file
pairs = normalize(rows).dataset                    # prompt, chosen, rejected; perhaps category and harmful
train = to_sft(pairs)                              # TRL's form; to_preference(pairs) for DPO
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from datasets import Dataset, Features, List, Value
from torch import Tensor

from sails_align.core.errors import InputError, first_line
from sails_align.data.files import UNREADABLE, cause_in
from sails_align.data.formats import (
    ANSWERS,
    BESIDE_PROMPTS,
    PAIRS,
    PROMPT_COLUMNS,
    Columns,
    Format,
    find_format,
    named_format,
    parse_prompt,
)
from sails_align.data.labels import GOOD, MEANINGS, Label, check_scores, find_labels, score_columns, use_labels
from sails_align.data.loading import cache_errors, with_class_names
from sails_align.data.messages import Message, assistant
from sails_align.data.rows import (
    EXTRAS,
    MESSAGES,
    Normalized,
    OnBadRows,
    columns_by_lower_name,
    read_rows,
)

NO_COLUMNS = Columns()


class Reader(Protocol):
    """What transforms may ask of a model and of a judge, which are in folders above this one."""

    def is_refusal(self, response: str) -> bool:
        """Return whether a response refuses and does not help with any of what was asked."""
        ...

    def embed(self, prompts: Sequence[list[Message]], tokens: Literal["all", "last"]) -> Tensor:
        """Return a hidden state of the frozen base model for each prompt, (N, D), float64 on the CPU.

        It is the mean over the tokens of the last message, or that of the last token before an answer.
        """
        ...


@dataclass(frozen=True)
class AlignmentExamples:
    """Normalized examples of one training."""

    safety: Dataset
    """Pairs of harmful requests: the response contrast, and the harmful side of the prompt contrast."""
    helpful: Dataset | None
    """Examples of harmless requests: the harmless side of the prompt contrast."""
    train: Dataset
    """What is trained on: the safety pairs, until transforms change it."""
    reader: Reader | None = None
    """Of a training; loads nothing before it is used."""


def normalize(
    dataset: Dataset,
    *,
    name: str = "the data set",
    on_bad_rows: OnBadRows = "error",
    columns: Columns = NO_COLUMNS,
    pair: bool = False,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Normalized:
    """Convert a dataset of any format in `formats.FORMATS` to one common form; `name` is for messages.

    With "error", unusable rows are an error that counts them by cause; with "skip", they are left out and counted.
    Rows whose response is labelled bad are left out and counted, or with `pair` their responses become rejected ones
    (`labels.use_labels`). Raises `InputError` if the dataset is empty, its columns are not understood, or no good rows
    are left.

    Args:
        dataset: of rows in a known format.
        name: for messages.
        on_bad_rows: "error" or "skip".
        columns: names of columns that are not the usual ones.
        pair: pair responses labelled bad with those labelled good.
        check: raises `BadRowError` for a normalized row that cannot be used (`tokens.TemplateCheck`).
    """
    dataset = with_class_names(dataset)
    by_lower = columns_by_lower_name(dataset)
    form = _format_of(dataset, by_lower, columns, name)
    labels = find_labels(dataset, by_lower, form, name, columns)
    scores = score_columns(by_lower) if form.paired and columns.label is None else None
    has_label = bool(labels) or (form.better is not None and any(column in by_lower for column in form.safety_columns))

    def parse(row: Mapping[str, Any]) -> dict[str, Any]:
        parsed = form.parse(row)
        if check is not None:
            check(parsed)
        check_scores(row, scores)
        own = form.safety_column(row)
        of_row = [*labels, Label(own, MEANINGS["is_safe"])] if own and columns.label is None else labels
        return {**parsed, GOOD: all([label.is_good(row) for label in of_row])}

    kept = ["prompt", "chosen", *(["rejected"] if form.paired else []), *_extras_in(by_lower)]
    read = [*form.reads, *(label.column for label in labels), *(scores or ())]
    found = read_rows(dataset, read, [*kept, *([GOOD] if has_label else [])], parse, name, on_bad_rows)
    if not has_label:
        return found
    rows, left_out, n_paired = use_labels(found.dataset, pair, name)
    return Normalized(rows, {**found.dropped, **left_out}, n_paired)


def _format_of(dataset: Dataset, by_lower: Mapping[str, str], columns: Columns, name: str) -> Format:
    for role in ("prompt", "chosen", "rejected"):
        named = getattr(columns, role)
        if named is not None and named.lower() not in by_lower:
            raise InputError(
                f"{name} has no column {named!r} for the {role}; it has {', '.join(dataset.column_names)}.\n"
                f"Correct --{columns.prefix}{role}_column"
            )
    form = named_format(by_lower, columns)
    if form is None:
        raise InputError(_not_understood(dataset, by_lower, name))
    answers = dataset.features[by_lower[form.chosen]]
    if not form.paired and form.prompt is not None and isinstance(answers, List) and answers.feature == Value("string"):
        return replace(form, rejected=form.chosen)
    return form


def dataset_of(rows: Sequence[Mapping[str, Any]], name: str = "the data set") -> Dataset:
    """Make a dataset of rows in memory, in which rows that cannot be used are marked, as `load_rows` does."""
    causes = [cause_in(row) for row in rows]
    marked = [dict(row) if cause is None else {UNREADABLE: cause} for row, cause in zip(rows, causes, strict=True)]
    columns = dict.fromkeys(column for row in marked for column in row)
    try:
        return Dataset.from_list([{column: row.get(column) for column in columns} for row in marked])
    except (TypeError, ValueError) as error:  # pyarrow's errors
        raise InputError(
            f"the rows of {name} cannot be put into one table: {first_line(error)};\ncorrect them"
        ) from error


def requests_of(
    given: Dataset | Sequence[Any],
    *,
    name: str = "the data set",
    on_bad_rows: OnBadRows = "error",
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Dataset:
    """Read requests that are in memory, with their responses where they have some.

    They are texts, conversations (lists of messages), rows of any format, things with `messages`; or a dataset. The
    result has columns `prompt` (messages), and `chosen` if there are responses. See `normalize` for the rest.
    """
    dataset = with_class_names(
        given if isinstance(given, Dataset) else dataset_of([_row_of(one) for one in given], name)
    )
    columns = columns_by_lower_name(dataset)
    if find_format(columns) is not None:
        return normalize(dataset, name=name, on_bad_rows=on_bad_rows, check=check).dataset
    column = next((column for column in PROMPT_COLUMNS if column in columns), None)
    if column is None:
        raise InputError(_not_understood(dataset, columns, name))

    def parse(row: Mapping[str, Any]) -> dict[str, Any]:
        parsed = {"prompt": parse_prompt(row, column)}
        if check is not None:
            check(parsed)
        return parsed

    kept = ["prompt", *_extras_in(columns)]
    return read_rows(dataset, [column, "instances", *BESIDE_PROMPTS], kept, parse, name, on_bad_rows).dataset


def _row_of(one: Any) -> dict[str, Any]:
    if isinstance(one, Mapping):
        return dict(one)
    return {"prompt": [dict(message) for message in getattr(one, "messages", one)] if not isinstance(one, str) else one}


def _extras_in(columns: Mapping[str, str]) -> list[str]:
    return [column for column in EXTRAS if column in columns]


def _not_understood(dataset: Dataset, columns: Mapping[str, str], name: str) -> str:
    found = f"{name} has the columns {', '.join(dataset.column_names)}"
    if any(column in columns for column in PROMPT_COLUMNS):
        return (
            f"{found}: prompts without responses to learn from, or under a name that is not known;\nname them with "
            "--chosen_column (and --rejected_column), give it where prompts are asked for, or give other data"
        )
    return (
        f"{found}, which are not understood;\nname them with --prompt_column, --chosen_column (and --rejected_column), "
        f"or rename them to messages, conversations, or one of {', '.join(PROMPT_COLUMNS)} with one of "
        f"{', '.join(ANSWERS)}, or with two of {' | '.join(', '.join(pair) for pair in PAIRS[:3])}"
    )


def to_sft(dataset: Dataset) -> Dataset:
    """Convert normalized rows to TRL's conversational prompt-completion form; only the completion is trained on."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["prompt"], "completion": [assistant(row["chosen"])]}

    return _convert(dataset, convert, ("prompt", "completion"))


def to_preference(dataset: Dataset) -> Dataset:
    """Convert normalized rows to TRL's conversational preference form, with explicit prompts."""
    if "rejected" not in dataset.column_names:
        raise InputError(
            f"the data has no rejected responses (columns {', '.join(dataset.column_names)}), and pairs are needed;\n"
            "give a dataset with the columns chosen, rejected, and perhaps prompt; or labelled rows with "
            "--bad_responses pair"
        )

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"chosen": [assistant(row["chosen"])], "rejected": [assistant(row["rejected"])]}

    return _convert(dataset, convert, ("prompt", "chosen", "rejected"))


def _convert(dataset: Dataset, convert: Callable[[dict[str, Any]], dict[str, Any]], columns: Iterable[str]) -> Dataset:
    features = Features({column: MESSAGES for column in columns})
    others = [column for column in dataset.column_names if column not in features]
    with cache_errors():
        return dataset.map(convert, remove_columns=others, features=features, desc="Converting rows")


def fingerprint(dataset: Dataset) -> str:
    """Return the SHA-256 (hex) of JSON-able rows in order, independent of the order of columns."""
    digest = hashlib.sha256()
    for batch in dataset.iter(batch_size=1000):
        columns = sorted(batch)
        for values in zip(*(batch[column] for column in columns), strict=True):
            row = json.dumps(dict(zip(columns, values, strict=True)), sort_keys=True)
            digest.update(f"{row}\n".encode())
    return digest.hexdigest()
