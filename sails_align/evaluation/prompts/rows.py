"""Make prompts of the rows of any table with prompts in it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from sails_align.core.errors import InputError
from sails_align.core.suggestions import did_you_mean
from sails_align.data.files import UNREADABLE
from sails_align.data.formats import Format, find_format, parse_prompt
from sails_align.data.messages import ROLES, BadRowError, from_text, user
from sails_align.data.rows import columns_by_lower_name
from sails_align.evaluation.prompts.definitions import Columns, Row, Subset, prompt_id
from sails_align.evaluation.prompts.recognize import suggestion
from sails_align.evaluation.records import Kind, Message, Prompt

KINDS: tuple[Kind, ...] = ("harmful", "benign", "dual_use")


@dataclass(frozen=True)
class Table:
    """Hold rows and their meaning."""

    rows: Iterable[Row]
    names: Sequence[str]
    """Of the columns, in the source's spelling."""
    where: str
    """The name in messages."""
    subset: Subset | None = None
    """Of a known set."""
    category: str | None = None
    """Of all its prompts."""


def table_of(dataset: Dataset, where: str, subset: Subset | None = None, category: str | None = None) -> Table:
    """Make a table of a dataset."""
    names = columns_by_lower_name(dataset)
    rows = ({lower: row[name] for lower, name in names.items()} for row in dataset)  # pyright: ignore
    return Table(rows, dataset.column_names, where, subset, category)


def choose_columns(usual: Columns, asked: Mapping[str, str], tables: Sequence[Table]) -> Columns:
    """Return the usual columns, with those that the user names in their place."""
    unknown = sorted(asked.keys() - usual.keys())
    if unknown:
        raise InputError(f"there is no role {unknown[0]!r} for a column{did_you_mean(unknown[0], usual)}")
    for table in tables:
        names = {name.lower() for name in table.names}
        for role, column in asked.items():
            if column.lower() not in names:
                raise InputError(
                    f"{table.where} has no column {column!r} for the {role}; it has {', '.join(table.names)}"
                )
    return {**usual, **{role: (column.lower(),) for role, column in asked.items()}}


def parse(table: Table, columns: Columns, kind: Kind | None, category: str, dropped: Counter[str]) -> Iterator[Prompt]:
    """Yield the prompts of a table, and count unusable rows in `dropped` by cause."""
    names = [name.lower() for name in table.names]
    of = {role: next((name for name in options if name in names), None) for role, options in columns.items()}
    form = find_format(names)
    if of["prompt"] is None and form is None:
        raise InputError(
            f"{table.where} has the columns {', '.join(table.names)}, none of which is known to hold prompts;\n"
            f"name one {', '.join(columns['prompt'])}, or give its name with --prompt_column (columns= in Python)"
            + suggestion(table.names, table.where)
        )
    for row in table.rows:
        try:
            if row.get(UNREADABLE) is not None:
                raise BadRowError(row[UNREADABLE])
            messages = _messages(row, of["prompt"], of["context"], form)
            of_row = _kind(row, of["kind"], table, kind)
        except BadRowError as bad:
            dropped[str(bad)] += 1
            continue
        found = table.category or _text(row, of["category"]) or category
        prompt = Prompt("", messages, of_row, found, _meta(row, of))
        yield replace(prompt, id=prompt_id(prompt.conversation))


def _messages(row: Row, column: str | None, context: str | None, form: Format | None) -> tuple[Message, ...]:
    if column is None:
        assert form is not None  # responses do not matter
        return tuple(
            Format(None, form.chosen).parse(row)["prompt"] if not form.prompt else parse_prompt(row, form.prompt)
        )
    value = from_text(row[column])
    if isinstance(value, list) and value and isinstance(value[0], str):  # MT-Bench: the user's turns
        row = {**row, column: value[0]}
    if isinstance(value, list) and value and isinstance(value[-1], dict) and _is_answer(value[-1]):
        return tuple(Format(None, column).parse(row)["prompt"])
    messages = parse_prompt(row, column)
    if given := _text(row, context):  # as HarmBench joins them
        asked = [message for message in messages if message["role"] != "system"]
        if len(asked) > 1 or not isinstance(row[column], str):
            raise BadRowError(f"{column} is not a single text, which a context needs")
        return (*messages[:-1], user(f"{given}\n\n---\n\n{asked[-1]['content']}"))
    return tuple(messages)


def _is_answer(message: Mapping[str, Any]) -> bool:
    return ROLES.get(str(message.get("role") or message.get("from")).lower()) == "assistant"


def _text(row: Row, column: str | None) -> str | None:
    value = None if column is None else row[column]
    if isinstance(value, list):  # HarmBench's tags, MT-Bench's references
        value = next((item for item in value if item), None)
    if isinstance(value, dict):  # BeaverTails' flags of kinds of harm
        value = ", ".join(name for name, flag in value.items() if flag is True)
    return None if value is None or not str(value).strip() else str(value)


def _kind(row: Row, column: str | None, table: Table, default: Kind | None) -> Kind:
    if table.subset is not None:
        return table.subset.kind(row) if callable(table.subset.kind) else table.subset.kind
    said = _text(row, column)
    harmful = str(row.get("harmful")).strip().lower()  # as in this package's own datasets; a text in csv files
    if said is None and harmful in ("true", "false"):
        return "harmful" if harmful == "true" else "benign"
    found = default if said is None else said.strip().lower().replace("-", "_").replace(" ", "_")
    if found in KINDS:
        return found
    if said is not None:
        raise InputError(f"{table.where}: {said!r} is no kind of prompt; kinds are {', '.join(KINDS)}")
    raise InputError(
        f"{table.where} does not say which prompts are to be refused; give a column `kind` ({', '.join(KINDS)}),\n"
        "or give the kind of all of them with --kind (kind= in Python)" + suggestion(table.names, table.where)
    )


def _meta(row: Row, of: Mapping[str, str | None]) -> dict[str, Any]:
    # A column `meta` is that of attacked prompts (`sails attack`): the attack, and the testbed's request.
    given = row.get("meta")
    found = dict(given) if isinstance(given, dict) else {}
    columns = {role: of[role] for role in ("target", "reference", "context")} | {"source_id": of["id"]}
    if _text(row, of["context"]) is not None:
        columns["behavior"] = of["prompt"]
    found |= {name: value for name, column in columns.items() if (value := _text(row, column)) is not None}
    return {name: value for name, value in found.items() if value is not None}
