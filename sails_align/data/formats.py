"""Parse rows of the supported data formats into a prompt, a chosen response and, if there is one, a rejected response.

Every format is read in the same way: its columns are joined to whole conversations that must end in an assistant turn,
and that turn is the response.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`"""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
SPEAKERS = re.compile(r"\n\n(Human|Assistant):")
OPEN_TURN = re.compile(r"\n\nAssistant:\s*\Z")
PROMPT_COLUMNS = ("goal", "forbidden_prompt", "prompt", "instruction")
"""Columns that hold a prompt of their own. The first two occur in sets of prompts without responses to learn from:
the `target` beside `goal` (AdvBench, JailbreakBench) is the compliance an attacker wants, so it is never `chosen`."""


class BadRowError(Exception):
    """An unusable row. The text is the cause; rows with the same cause share it, so they can be counted."""


@dataclass(frozen=True)
class Format:
    """A data format, identified by its columns (in lower case)."""

    prompt: str | None
    """Column of the prompt; None: the conversation in `chosen` begins with it."""
    chosen: str
    rejected: str | None = None
    """If it is `chosen`, that column is a list of two responses, the better one first."""
    better: str | None = None
    """Column with the number of the better response: 0 for `chosen`, 1 for `rejected`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that a dataset of this format must have."""
        asked = (self.prompt, self.chosen, self.rejected, self.better)
        return tuple(dict.fromkeys(column for column in asked if column))

    @property
    def reads(self) -> tuple[str, ...]:
        """Return all columns that it uses: those it must have, and those it may have."""
        numbered = NUMBERED if self.better else ()
        return (*self.columns, *(["input", "context"] if self.prompt == "instruction" else []), *numbered)

    @property
    def paired(self) -> bool:
        """Return whether there are rejected responses."""
        return self.rejected is not None

    def parse(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return `prompt` (messages that end with a user turn), `chosen` (text), and `rejected` if there is one."""
        row = _flattened(row)
        if self.prompt == "instruction" and _is_empty(row.get("input")):
            row = {**row, "input": row.get("context")}  # Dolly
        prompt = parse_prompt(row, self.prompt) if self.prompt else None
        answer = "output" if self.chosen == "instances" else self.chosen
        if self.rejected is None:
            chosen_prompt, chosen = _split(_conversation(row[answer], prompt, answer), answer)
            return {"prompt": chosen_prompt, "chosen": chosen}
        (answer, better), (other, worse) = self._ordered(row)
        chosen_prompt, chosen = _split(_conversation(better, prompt, answer), answer)
        rejected_prompt, rejected = _split(_conversation(worse, prompt, other), other)
        if chosen_prompt != rejected_prompt:
            raise BadRowError("chosen and rejected have no common prompt")
        if chosen == rejected:
            raise BadRowError("chosen and rejected are equal")
        return {"prompt": chosen_prompt, "chosen": chosen, "rejected": rejected}

    def _ordered(self, row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Return the better and the worse response, each with its column."""
        assert self.rejected is not None
        if self.rejected == self.chosen:
            answers = row[self.chosen]
            if not isinstance(answers, list) or len(answers) != 2:
                raise BadRowError(f"{self.chosen} is not a list of two responses, the better one first")
            return [(self.chosen, answer) for answer in answers]
        columns = [self.chosen, self.rejected]
        if self.better is not None:
            number = str(row[self.better]).removesuffix(".0")
            if number not in ("0", "1"):
                raise BadRowError(f"{self.better} is neither 0 nor 1")
            columns = columns if number == "0" else columns[::-1]
        return [(column, row[column]) for column in columns]

    def safety_column(self, row: Mapping[str, Any]) -> str | None:
        """Return the column that says whether the chosen response of a row is safe, if there is one (PKU-SafeRLHF)."""
        column = f"is_{self._ordered(row)[0][0]}_safe" if self.better else None
        return column if column in row else None

    @property
    def safety_columns(self) -> tuple[str, ...]:
        """Return the columns that `safety_column` may return."""
        return (f"is_{self.chosen}_safe", f"is_{self.rejected}_safe") if self.better else ()


NUMBERED = ("is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id")
"""Columns of PKU-SafeRLHF beside its responses."""
FORMATS = (
    Format("prompt", "response_0", "response_1", "safer_response_id"),  # PKU-SafeRLHF
    Format("prompt", "response_0", "response_1", "better_response_id"),
    Format("conversations", "chosen", "rejected"),  # LLaMA-Factory's ShareGPT preferences
    Format("prompt", "chosen", "rejected"),  # TRL, explicit prompt; strings or messages
    Format("instruction", "chosen", "rejected"),  # LLaMA-Factory's alpaca preferences
    Format("question", "chosen", "rejected"),
    Format("question", "response_j", "response_k"),  # StackExchange, paired
    Format(None, "chosen", "rejected"),  # HH-RLHF transcripts, or TRL messages with an implicit prompt
    Format(None, "messages"),
    Format(None, "conversations"),  # ShareGPT
    Format("prompt", "completion"),  # TRL
    Format("prompt", "response"),  # CoCoNot
    Format("instruction", "output"),  # alpaca, with or without `input`
    Format("instruction", "response"),  # Dolly, with or without `context`
    Format("instruction", "instances"),  # self-instruct
    Format("question", "answer"),
    Format("question", "response"),
)


def find_format(columns: Iterable[str]) -> Format | None:
    """Return the first format whose columns are all present; the richest comes first."""
    present = set(columns)
    return next((form for form in FORMATS if present.issuperset(form.columns)), None)


NO_LABEL = "none"
"""What the user names as the label's column where there is none."""


@dataclass(frozen=True)
class Columns:
    """Columns that the user names, where a dataset does not use a common name."""

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    """The column that says whether a response is good, or `NO_LABEL`."""
    good_labels: tuple[str, ...] | None = None
    """Its values for good responses."""


def named_format(present: Iterable[str], asked: Columns) -> Format | None:
    """Return the format with the columns that the user names in their place, all in lower case."""
    prompt, chosen, rejected = (
        None if name is None else name.lower() for name in (asked.prompt, asked.chosen, asked.rejected)
    )
    columns = set(present)
    if chosen is not None:
        usual = next((column for column in (*PROMPT_COLUMNS, "question") if column in columns), None)
        return Format(prompt or usual, chosen, rejected)
    if prompt is None:
        return find_format(columns)
    with_prompt = (replace(form, prompt=prompt) for form in FORMATS if form.prompt is not None)
    return next((form for form in with_prompt if columns.issuperset(form.columns)), None)


def parse_prompt(row: Mapping[str, Any], column: str) -> list[Message]:
    """Parse the prompt in a column: messages, one user turn, or a transcript that ends in "Assistant:".

    An `instruction` is followed, after a blank line, by the row's `input` where there is one. Raises `BadRowError`.
    """
    value = _from_json(row[column])
    if isinstance(value, list):
        return _checked_prompt(_messages(value, column))
    text = _text(value, column)
    if column == "instruction":
        given = _flattened(row).get("input")
        return [user(text if _is_empty(given) else f"{text}\n\n{_text(given, 'input')}")]
    if SPEAKERS.match(text):
        return _checked_prompt(_transcript(OPEN_TURN.sub("", text), column))
    return [user(text)]


def user(content: str) -> Message:
    """Create a user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Create an assistant turn."""
    return {"role": "assistant", "content": content}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(value: Any, field: str) -> str:
    if _is_empty(value):
        raise BadRowError(f"{field} is empty")
    if not isinstance(value, str):
        raise BadRowError(f"{field} is not a string")
    return value


def _messages(value: Any, field: str) -> list[Message]:
    """Messages of the forms {role, content} and {from, value}; an empty system message says nothing and is left out."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRowError(f"{field} is neither a string nor a list of messages")
    messages = []
    for message in value:
        role, content = ("role", "content") if message.get("role") is not None else ("from", "value")
        if str(message.get(role)) not in ROLES:
            raise BadRowError(f"{field} has a message whose role is none of {', '.join(ROLES)}")
        if ROLES[message[role]] == "system" and _is_empty(message.get(content)):
            continue
        messages.append({"role": ROLES[message[role]], "content": _text(message.get(content), f"a message in {field}")})
    if not messages:
        raise BadRowError(f"{field} is empty")
    return one_system_turn(messages)


def one_system_turn(messages: Iterable[Message]) -> list[Message]:
    """Join system turns that follow each other to one of several paragraphs: chat templates refuse two."""
    joined: list[Message] = []
    for message in messages:
        if joined and message["role"] == joined[-1]["role"] == "system":
            joined[-1] = {**message, "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined


def _from_json(value: Any) -> Any:
    """Return the messages that a text holds as JSON, as in csv files, else the value as it is."""
    if not isinstance(value, str) or not re.match(r"\s*(\[\s*)?\{", value):
        return value
    try:
        loaded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    messages = loaded if isinstance(loaded, list) else [loaded]
    keys = ({"role", "content"}, {"from", "value"})
    are_messages = all(
        isinstance(message, dict) and any(each <= message.keys() for each in keys) for message in messages
    )
    return loaded if are_messages else value


def _transcript(text: str, field: str) -> list[Message]:
    r"""Turns of an HH-RLHF transcript, "\n\nHuman: ...\n\nAssistant: ...".

    White space around a turn is layout, not content. Where one speaker has two turns running, as happens in HH-RLHF,
    they are one turn of two paragraphs, because chat templates want the roles to alternate; but not at the end, where
    a response that follows another one is a sign of a broken transcript (HH-RLHF: an inline "Human:" before it).
    """
    head, *pieces = SPEAKERS.split(text)
    if head.strip() or not pieces:
        raise BadRowError(f"{field} is not a transcript of Human: and Assistant: turns")
    turns: list[Message] = []
    for i, (speaker, content) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
        role = ROLES[speaker.lower()]
        is_response = role == "assistant" and 2 * (i + 1) == len(pieces)
        if turns and turns[-1]["role"] == role and not is_response:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content.strip()}".strip()
        else:
            turns.append({"role": role, "content": content.strip()})
    return [{**turn, "content": _text(turn["content"], f"a turn in {field}")} for turn in turns]


def _conversation(value: Any, prompt: list[Message] | None, field: str) -> list[Message]:
    """The whole conversation: the column's own, if it begins with its prompt, else prompt + response."""
    value = _from_json(value)
    if isinstance(value, list | dict):
        turns = _messages([value] if isinstance(value, dict) else value, field)
        return prompt + turns if prompt and turns[0]["role"] == "assistant" else turns
    if field in ("messages", "conversations"):
        raise BadRowError(f"{field} is neither a list of messages nor one as JSON")
    text = _text(value, field)
    if prompt is None or text.startswith("\n\nHuman:"):
        return _transcript(text, field)
    return [*prompt, assistant(text)]


def _split(turns: list[Message], field: str) -> tuple[list[Message], str]:
    if turns[-1]["role"] != "assistant":
        raise BadRowError(f"{field} does not end in an assistant turn")
    return _checked_prompt(turns[:-1]), turns[-1]["content"]


def _checked_prompt(turns: list[Message]) -> list[Message]:
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not spoken or spoken[0] != "user" or spoken[-1] != "user":
        raise BadRowError("the prompt does not begin and end with a user turn")
    return turns


def _flattened(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with `input` and `output` of its one instance (self-instruct) as columns of its own."""
    if "instances" not in row:
        return row
    instances = row["instances"]
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        raise BadRowError("instances is not a list of one instance")
    return {**row, **instances[0]}
