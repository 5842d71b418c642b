"""Read conversations as they stand in data files: lists of messages, the same as JSON, and transcripts."""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`"""

ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user", "prompter": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
}
"""What a role is called in data, in lower case -> what templates call it."""
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
SPEAKERS = re.compile(r"\n\n(Human|Assistant):")
_NEMO_TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\s*")
CONVERSATIONS = ("messages", "conversations", "conversation", "conversation_a", "conversation_b")
"""Columns that hold whole conversations, and never a text."""
OPEN_TURN = re.compile(r"\n\nAssistant:\s*\Z")
_KEYS = ({"role", "content"}, {"from", "value"})
_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class BadRowError(Exception):
    """An unusable row. The text is the cause; rows with the same cause share it, so they can be counted."""


class LeftOutRowError(BadRowError):
    """A row that is as it should be, but has nothing to learn from, such as a tie. It is counted, and no error."""


def user(content: str) -> Message:
    """Create a user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Create an assistant turn."""
    return {"role": "assistant", "content": content}


def is_empty(value: Any) -> bool:
    """Return whether a cell holds nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def text_of(value: Any, field: str) -> str:
    """Return a text; raise `BadRowError` for an empty one and for anything else."""
    if is_empty(value):
        raise BadRowError(f"{field} is empty")
    if not isinstance(value, str):
        raise BadRowError(f"{field} is not a string")
    return value


def messages_of(value: Any, field: str) -> list[Message]:
    """Messages of the forms {role, content} and {from, value}; an empty system message says nothing and is left out."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRowError(f"{field} is neither a string nor a list of messages")
    messages = []
    for message in value:
        role, content = ("role", "content") if message.get("role") is not None else ("from", "value")
        name = ROLES.get(str(message.get(role)).lower())
        if name is None:
            raise BadRowError(f"{field} has a message whose role is none of {', '.join(ROLES)}")
        if name == "system" and is_empty(message.get(content)):
            continue
        messages.append({"role": name, "content": text_of(_joined(message.get(content)), f"a message in {field}")})
    if not messages:
        raise BadRowError(f"{field} is empty")
    if _has_no_weight(value[-1]):
        raise BadRowError(f"the last message in {field} has weight 0, so it is not to be learnt from")
    return one_system_turn(messages)


def _has_no_weight(message: Mapping[str, Any]) -> bool:
    """Whether OpenAI's fine-tuning would leave a message out."""
    weight = message.get("weight")
    return isinstance(weight, int | float) and weight == 0


def _joined(content: Any) -> Any:
    """Return the text of a content in parts, `{"type": "text", "text": ...}`; anything else as it is."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return content if None in parts else "".join(map(str, parts))


def one_system_turn(messages: Iterable[Message]) -> list[Message]:
    """Join system turns that follow each other to one of several paragraphs: chat templates refuse two."""
    joined: list[Message] = []
    for message in messages:
        if joined and message["role"] == joined[-1]["role"] == "system":
            joined[-1] = {**message, "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined


def with_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Put the system prompt that a row has in a column of its own before its turns, unless they begin with one."""
    given = next((row[column] for column in SYSTEM_COLUMNS if not is_empty(row.get(column))), None)
    if given is None or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": text_of(given, "the system prompt")}, *turns]


def from_text(value: Any) -> Any:
    """Return the messages that a text holds as JSON, or as Python writes them, as in csv files; else the value."""
    if not isinstance(value, str) or not re.match(r"\s*(\[\s*)?\{", value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            loaded = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        messages = loaded if isinstance(loaded, list) else [loaded]
        if all(isinstance(message, dict) and any(keys <= message.keys() for keys in _KEYS) for message in messages):
            return loaded
    if _LIKE_MESSAGES.match(value):
        raise BadRowError("a text looks like messages, but they are neither JSON nor as Python writes them")
    return value


def transcript(text: str, field: str) -> list[Message]:
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
    return [{**turn, "content": text_of(turn["content"], f"a turn in {field}")} for turn in turns]


def nemo_turns(text: str) -> list[Message]:
    """Return the turns of a text in which all but the first begin with the speaker's mark (HelpSteer2)."""
    first, *others = _NEMO_TURN.split(text)
    turns = [user(first)]
    for speaker, content in zip(others[::2], others[1::2], strict=True):
        turns.append({"role": ROLES[speaker.lower()], "content": text_of(content, "a turn of the prompt")})
    return turns


def conversation(value: Any, prompt: list[Message] | None, field: str) -> list[Message]:
    """The whole conversation: the column's own, if it begins with its prompt, else prompt + response."""
    value = from_text(value)
    if field in CONVERSATIONS and isinstance(value, list) and all(isinstance(text, str) for text in value):  # LIMA
        value = [(assistant if i % 2 else user)(text) for i, text in enumerate(value)]
    if isinstance(value, list | dict):
        turns = messages_of([value] if isinstance(value, dict) else value, field)
        return prompt + turns if prompt and turns[0]["role"] == "assistant" else turns
    if field in CONVERSATIONS:
        raise BadRowError(f"{field} is neither a list of messages nor one as JSON")
    text = text_of(value, field)
    if prompt is None or text.startswith("\n\nHuman:"):
        return transcript(text, field)
    return [*prompt, assistant(text)]


def split_response(turns: list[Message], field: str) -> tuple[list[Message], str]:
    """Return the prompt and the response of a conversation."""
    if turns[-1]["role"] != "assistant":
        raise BadRowError(f"{field} does not end in an assistant turn")
    return checked_prompt(turns[:-1]), turns[-1]["content"]


def checked_prompt(turns: list[Message]) -> list[Message]:
    """Return a prompt as it is; raise `BadRowError` if it does not begin and end with the user."""
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not spoken or spoken[0] != "user" or spoken[-1] != "user":
        raise BadRowError("the prompt does not begin and end with a user turn")
    return turns
