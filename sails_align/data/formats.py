"""Parse rows of the supported data formats into a prompt, a chosen response and, if there is one, a rejected response.

Every format is read in the same way: its columns are joined to whole conversations that must end in an assistant turn,
and that turn is the response.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sails_align.data.messages import (
    OPEN_TURN,
    SPEAKERS,
    SYSTEM_COLUMNS,
    BadRowError,
    LeftOutRowError,
    Message,
    assistant,
    checked_prompt,
    conversation,
    from_text,
    is_empty,
    messages_of,
    nemo_turns,
    split_response,
    text_of,
    transcript,
    user,
    with_system,
)

QUESTIONS = ("prompt", "instruction", "question", "query", "input", "user_input", "vanilla")
"""Columns of prompts beside their responses."""
ANSWERS = ("completion", "response", "output", "answer", "model_output")
PAIRS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),  # OpenAI
    ("response_j", "response_k"),  # StackExchange, paired
    ("answers", "answers"),  # Nectar
)
PROMPT_COLUMNS = ("goal", "forbidden_prompt", *QUESTIONS)
"""Columns that hold a prompt of their own. The first two occur in sets of prompts without responses to learn from:
the `target` beside `goal` (AdvBench, JailbreakBench) is the compliance an attacker wants, so it is never `chosen`."""
BESIDE_PROMPTS = ("input", "context", "history", "adversarial", *SYSTEM_COLUMNS)
"""Columns that `parse_prompt` may read beside the prompt's."""


@dataclass(frozen=True)
class Format:
    """A data format, identified by its columns (in lower case)."""

    prompt: str | None
    """Column of the prompt; None: the conversation in `chosen` begins with it."""
    chosen: str
    rejected: str | None = None
    """If it is `chosen`, that column is a list of responses: two, the better one first, or some with ranks."""
    better: str | None = None
    """Column that says which response is the better one (`_is_second_better`), `chosen` being the first."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that a dataset of this format must have."""
        asked = (self.prompt, self.chosen, self.rejected, self.better)
        return tuple(dict.fromkeys(column for column in asked if column))

    @property
    def reads(self) -> tuple[str, ...]:
        """Return all columns that it uses: those it must have, and those it may have."""
        numbered = BESIDE_PAIRS if self.better else ()
        return (*self.columns, *BESIDE_PROMPTS, *numbered)

    @property
    def paired(self) -> bool:
        """Return whether there are rejected responses."""
        return self.rejected is not None

    def parse(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return `prompt` (messages that end with a user turn), `chosen` (text), and `rejected` if there is one."""
        row = _flattened(row)
        prompt = parse_prompt(row, self.prompt) if self.prompt else None
        answer = "output" if self.chosen == "instances" else self.chosen
        if self.rejected is None:
            chosen_prompt, chosen = split_response(conversation(row[answer], prompt, answer), answer)
            return {"prompt": with_system(row, chosen_prompt), "chosen": chosen}
        (answer, better), (other, worse) = self._ordered(row)
        chosen_prompt, chosen = split_response(conversation(better, prompt, answer), answer)
        rejected_prompt, rejected = split_response(conversation(worse, prompt, other), other)
        if chosen_prompt != rejected_prompt:
            if self.chosen == "conversation_a":  # two models that each went on with its own answer
                raise LeftOutRowError("the two conversations differ before the last response")
            raise BadRowError("chosen and rejected have no common prompt")
        if chosen == rejected:
            raise BadRowError("chosen and rejected are equal")
        return {"prompt": with_system(row, chosen_prompt), "chosen": chosen, "rejected": rejected}

    def _ordered(self, row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Return the better and the worse response, each with its column."""
        assert self.rejected is not None
        if self.rejected == self.chosen:
            return [(self.chosen, answer) for answer in _best_and_worst(row[self.chosen], self.chosen)]
        columns = [self.chosen, self.rejected]
        if self.better is not None:
            columns = columns[::-1] if _is_second_better(self.better, row[self.better]) else columns
        return [(column, row[column]) for column in columns]

    def safety_column(self, row: Mapping[str, Any]) -> str | None:
        """Return the column that says whether the chosen response of a row is safe, if there is one (PKU-SafeRLHF)."""
        column = f"is_{self._ordered(row)[0][0]}_safe" if self.better else None
        return column if column in row else None

    @property
    def safety_columns(self) -> tuple[str, ...]:
        """Return the columns that `safety_column` may return."""
        return (f"is_{self.chosen}_safe", f"is_{self.rejected}_safe") if self.better else ()


_NUMBERS = {"0": -1, "1": 1}
_WINNERS = {"model_a": -1, "model_b": 1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}


def _is_second_better(column: str, value: Any) -> bool:
    """Return whether a column says that the second of two responses is the better one.

    Raises:
        LeftOutRowError: if neither is better.
        BadRowError: if it says nothing.
    """
    if column in ("preference_strength", "overall_preference"):
        try:
            strength = float(value)
        except (TypeError, ValueError):
            strength = math.nan
        says = None if math.isnan(strength) else (strength > 0) - (strength < 0)
        known = "positive, negative nor 0"
    else:
        scale = _WINNERS if column == "winner" else _NUMBERS
        says = scale.get(str(value).strip().lower().removesuffix(".0"))
        known = " nor ".join(scale)
    if says is None:
        raise BadRowError(f"{column} is neither {known}")
    if says == 0:
        raise LeftOutRowError("neither response is the better one (a tie)")
    return says > 0


def _best_and_worst(answers: Any, field: str) -> tuple[Any, Any]:
    """Return the best and the worst of some responses: two in this order, or some with `answer` and `rank` (Nectar)."""
    if not isinstance(answers, list) or len(answers) < 2:
        raise BadRowError(f"{field} is not a list of two responses, the better one first")
    if all(isinstance(answer, dict) and {"answer", "rank"} <= answer.keys() for answer in answers):
        ranks = [answer["rank"] for answer in answers]
        if not all(isinstance(rank, int | float) for rank in ranks) or len(set(ranks)) < 2:
            raise BadRowError(f"{field} has no two ranks")
        ranked = sorted(answers, key=lambda answer: answer["rank"])
        return ranked[0]["answer"], ranked[-1]["answer"]
    if len(answers) != 2 or field == "answers":
        wanted = "answers with their ranks" if field == "answers" else "two responses, the better one first"
        raise BadRowError(f"{field} is not a list of {wanted}")
    return answers[0], answers[1]


BESIDE_PAIRS = (
    *("is_response_0_safe", "is_response_1_safe", "better_response_id", "safer_response_id"),  # PKU-SafeRLHF
    *("preference_statement", "preference_elaboration"),  # HelpSteer2
    "individual_preference",  # HelpSteer3
)
"""Columns beside two responses and what says which is the better one."""
FORMATS = tuple(
    dict.fromkeys(
        [
            Format("prompt", "response_0", "response_1", "safer_response_id"),  # PKU-SafeRLHF
            Format("prompt", "response_0", "response_1", "better_response_id"),
            Format("prompt", "response_1", "response_2", "preference_strength"),  # HelpSteer2
            Format("context", "response1", "response2", "overall_preference"),  # HelpSteer3
            Format(None, "conversation_a", "conversation_b", "winner"),  # Chatbot Arena
            Format("history", "human_ref_b", "human_ref_a", "labels"),  # SHP: 1 if A is better
            Format("conversations", "chosen", "rejected"),  # LLaMA-Factory's ShareGPT preferences
            *(Format(prompt, *pair) for prompt in QUESTIONS for pair in PAIRS),  # TRL, with an explicit prompt
            Format(None, "chosen", "rejected"),  # HH-RLHF transcripts, or TRL messages with an implicit prompt
            Format(None, "messages"),
            Format(None, "conversations"),  # ShareGPT
            Format(None, "conversation"),  # LMSYS, WildChat
            Format(None, "transcript"),  # Anthropic's red team
            Format("prompt", "completion"),  # TRL
            Format("prompt", "response"),  # CoCoNot
            Format("instruction", "output"),  # alpaca, with or without `input`
            Format("instruction", "response"),  # Dolly, with or without `context`
            Format("instruction", "instances"),  # self-instruct
            *(Format(prompt, answer) for prompt in QUESTIONS for answer in ANSWERS),
        ]
    )
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
    prefix: str = ""
    """What the names of the options of these columns begin with, for messages."""


def named_format(present: Iterable[str], asked: Columns) -> Format | None:
    """Return the format with the columns that the user names in their place, all in lower case."""
    prompt, chosen, rejected = (
        None if name is None else name.lower() for name in (asked.prompt, asked.chosen, asked.rejected)
    )
    columns = set(present)
    if chosen is not None:
        usual = next((column for column in PROMPT_COLUMNS if column in columns), None)
        return Format(prompt or usual, chosen, rejected)
    if prompt is None:
        return find_format(columns)
    with_prompt = (replace(form, prompt=prompt) for form in FORMATS if form.prompt is not None)
    return next((form for form in with_prompt if columns.issuperset(form.columns)), None)


def parse_prompt(row: Mapping[str, Any], column: str) -> list[Message]:
    """Parse the prompt in a column: messages, one user turn, or a transcript that ends in "Assistant:".

    Before it come the row's system prompt and the turns of its `history` (LLaMA-Factory), and after an `instruction`,
    after a blank line, its `input` (alpaca) or `context` (Dolly), where there are such. Raises `BadRowError`.
    """
    column = "adversarial" if column == "vanilla" and not is_empty(row.get("adversarial")) else column  # WildJailbreak
    value = from_text(row[column])
    if isinstance(value, dict) and "messages" in value:  # OpenAI's preferences
        value = value["messages"]
    return with_system(row, [*_history(row, column), *_prompt_turns(row, column, value)])


def _prompt_turns(row: Mapping[str, Any], column: str, value: Any) -> list[Message]:
    if isinstance(value, list):
        return checked_prompt(messages_of(value, column))
    text = text_of(value, column)
    if column == "instruction":
        row = _flattened(row)
        beside = next((name for name in ("input", "context") if not is_empty(row.get(name))), None)
        return [user(text if beside is None else f"{text}\n\n{text_of(row[beside], beside)}")]
    if SPEAKERS.match(text):
        return checked_prompt(transcript(OPEN_TURN.sub("", text), column))
    return checked_prompt(nemo_turns(text))


def _history(row: Mapping[str, Any], column: str) -> list[Message]:
    """Return the turns before an alpaca instruction: a list of [question, answer]."""
    turns = row.get("history")
    if column == "history" or not isinstance(turns, list):
        return []
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise BadRowError("history is not a list of [question, answer]")
    pairs = [(text_of(question, "history"), text_of(answer, "history")) for question, answer in turns]
    return [message for question, answer in pairs for message in (user(question), assistant(answer))]


def _flattened(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with `input` and `output` of its one instance (self-instruct) as columns of its own."""
    if "instances" not in row:
        return row
    instances = row["instances"]
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        raise BadRowError("instances is not a list of one instance")
    return {**row, **instances[0]}
