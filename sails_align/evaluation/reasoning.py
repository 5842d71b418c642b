"""Separate the reasoning in a response from the answer: judges see the answer alone.

Reasoning stands before the answer, in the form of the model's family (or begins in its chat template, so that only its
end is in the response):

    <think> ... </think>                DeepSeek R1, Qwen 3, GLM, Phi 4; also <thinking>, <thought>, <reasoning>, ...
    <|channel|>analysis<|message|> ...  gpt-oss, up to the channel `final`; without special tokens: analysis...
    <|channel>thought ... <channel|>    Gemma 4
    [THINK] ... [/THINK]                Magistral
    <|START_THINKING|> ...              Command A
    and those below

A response could hide help in such a form. Whoever shows it to people hides it, too.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from sails_align.evaluation.records import Completion, Item, Verdict

VERSION = 1
"""Of what judges are shown; part of the identity of a verdict."""

_NAME = r"(?:\w{1,20}[:_])?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad)"
_ATTRIBUTES = r"(?:\s[^<>\n]*)?"
_FORMS = (
    (rf"<{_NAME}{_ATTRIBUTES}>", rf"</{_NAME}>"),
    (r"(?-i:\[THINK(?:ING)?\])", r"(?-i:\[/THINK(?:ING)?\])"),
    (r"<\|channel>(?:thought|analysis)\b", r"<channel\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|(?:begin_of_)?think(?:ing|_start)?\|>", r"<\|(?:end_of_|/)?think(?:ing|_end)?\|>"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<unused94>thought\b", r"<unused95>"),  # MedGemma
    (r"◁think▷", r"◁/think▷"),  # Kimi
    (r"Here(?:'s|’s| is) my thought process:", r"Here(?:'s|’s| is) my response:"),  # Granite 3
)
_BLOCKS = [
    (re.compile(rf"^[ \t]*(?:{begin})", re.IGNORECASE | re.MULTILINE), re.compile(end, re.IGNORECASE))
    for begin, end in _FORMS
]
_END = re.compile("|".join(f"(?:{end})" for _, end in _FORMS), re.IGNORECASE)
# No model reasons in the tokens of turns: text with them imitates a conversation, to fool a judge.
_TURN = re.compile(r"<[|｜][^<>\n]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
_WRAPPED = re.compile(
    r"\A\s*<(answer|output|response)>(.*?)(?:</\1>\s*)?\Z|\A\s*<\|(?:begin_of_solution|START_RESPONSE)\|>"
    r"(.*?)(?:<\|(?:end_of_solution|END_RESPONSE)\|>\s*)?\Z",
    re.DOTALL | re.IGNORECASE,
)

_BEGINS_AT_THE_END = re.compile(rf"(?:{'|'.join(begin for begin, _ in _FORMS)})\s*\Z", re.IGNORECASE)
# Special tokens: those of the forms, and of those of which only a part is one.
_MARK = re.compile(
    "|".join(f"(?:{mark})" for form in _FORMS for mark in form) + r"|<\|channel>|<unused9[45]>", re.IGNORECASE
)
_CHANNEL_MARKS = frozenset(("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|end|>"))

# gpt-oss: messages in channels; the answer is in `final`. Decoded without special tokens, the names run into the texts.
_CHANNELS = re.compile(r"\A\s*(?:<\|start\|>\s*assistant\s*)?<\|channel\|>")
_FINAL = re.compile(
    r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)"
    r"(?=<\|(?:end|return|start|call|channel)\|>|\Z)",
    re.DOTALL,
)
_BARE_FINAL = "assistantfinal"
_BARE_CHANNELS = re.compile(rf"\A\s*(?:analysis|commentary)(?:(?=[A-Z\"'(*])|(?=\S.*{_BARE_FINAL}))", re.DOTALL)


def marks_of(tokens: Iterable[str]) -> set[str]:
    """Return those of a tokenizer's special tokens that mark reasoning: without them it would pass for the answer."""
    tokens = set(tokens)
    return {token for token in tokens if _MARK.fullmatch(token)} | (
        tokens & _CHANNEL_MARKS if "<|channel|>" in tokens else set()
    )


def opening_of(prompt: str) -> str:
    """Return the beginning of reasoning that a rendered prompt ends with; mostly none."""
    found = _BEGINS_AT_THE_END.search(prompt)
    return found[0] if found else ""


def answer_of(response: str) -> str | None:
    """Return a response without its reasoning, word for word if there is none; None if the reasoning does not end."""
    if _CHANNELS.match(response):
        finals = [found[1].strip() for found in _FINAL.finditer(response)]
        return "\n".join(finals) if finals else None
    if _BARE_CHANNELS.match(response):
        _, final, answer = response.partition(_BARE_FINAL)
        return answer.strip() if final else None
    answer = _without_blocks(response)
    if answer is None or answer == response:
        return answer
    wrapped = _WRAPPED.match(answer)
    return (wrapped[2] or wrapped[3] or "" if wrapped else answer).strip()


def _without_blocks(response: str) -> str | None:
    answer = response
    for begin, end in _BLOCKS:
        while found := begin.search(answer):
            ended = end.search(answer, found.end())
            if ended is None:
                return None
            answer = answer[: found.start()] + answer[ended.end() :]
    if answer == response and (ended := _lone_end(response)):
        return response[ended.end() :]
    return answer


def _lone_end(response: str) -> re.Match[str] | None:
    """Find the end of reasoning that began in the chat template."""
    ended = _END.search(response)
    if ended is None or any(begin.search(response) for begin, _ in _BLOCKS):
        return None
    return None if _TURN.search(response, 0, ended.start()) else ended


def with_opening(completions: Sequence[Completion]) -> list[Completion]:
    """Add the beginning of the reasoning to responses that were cut off within it, if the chat template holds it.

    Such a response would pass for an answer. That the template holds the beginning is known by the other responses:
    most of them have nothing but the end.
    """
    ends = [_lone_end(completion.text or "") is not None for completion in completions]
    n_plain = sum(
        not end and one.text is not None and one.finish_reason != "length"
        for end, one in zip(ends, completions, strict=True)
    )
    if sum(ends) <= n_plain:
        return list(completions)
    return [
        one if end or not one.text or one.finish_reason != "length" else replace(one, text=f"<think>\n{one.text}")
        for end, one in zip(ends, completions, strict=True)
    ]


def answers_of(items: Iterable[Item]) -> Iterator[Item | Verdict]:
    """Yield each item without the reasoning in its responses, or the verdict on one whose reasoning does not end."""
    for item in items:
        response = answer_of(item.response)
        other = None if item.other is None else answer_of(item.other)
        if response is None or (item.other is not None and other is None):
            which = "the response" if response is None else "the other response"
            yield Verdict(None, "unfinished reasoning", f"{which} ends within its reasoning; allow more new tokens")
        else:
            yield replace(item, response=response, other=other)
