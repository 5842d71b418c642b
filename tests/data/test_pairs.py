"""Every format, real and crafted: what goes in comes out, and what cannot be used is counted and named."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sails_align.core.errors import InputError
from sails_align.data.formats import Format, find_format
from sails_align.data.loading import load_rows
from sails_align.data.messages import BadRowError
from sails_align.data.options import ContaminateOptions, MixOptions
from sails_align.data.pairs import (
    AlignmentExamples,
    dataset_of,
    fingerprint,
    normalize,
    requests_of,
    to_preference,
    to_sft,
)
from sails_align.data.transforms import contaminate as contamination
from sails_align.data.transforms.mix import mix

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of data sets for this module alone."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


def transcript(turns: list[dict[str, str]]) -> str:
    """The HH-RLHF form of a conversation."""
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def check_message(error: pytest.ExceptionInfo, *parts: str) -> None:
    """At most three lines that say all that is asked for."""
    message = str(error.value)
    assert len(message.splitlines()) <= 3
    for part in parts:
        assert part in message


def normalize_one(row: dict) -> dict:
    return normalize(Dataset.from_list([row])).dataset[0]


# ---------------------------------------------------------------------------------------------------- the real data


def test_hh_rlhf(shared: Path):
    rows = load_rows(str(shared / "data/hh_rlhf/harmless-base.test.jsonl.gz"))
    assert len(rows) == 2312
    with pytest.raises(InputError) as error:
        normalize(rows, name="hh")
    check_message(
        error, "9 of 2312 rows of hh", "(row 1254, 1688, 1950, ...)", "(row 86, 516, 925, ...)", "--on_bad_rows skip"
    )
    result = normalize(rows, on_bad_rows="skip")
    assert result.dropped == {"the prompt does not begin and end with a user turn": 5, "a turn in chosen is empty": 4}
    assert result.dataset.column_names == ["prompt", "chosen", "rejected"]
    assert len(result.dataset) == 2303
    good = rows.select(sorted(set(range(2312)) - {86, 516, 925, 1103, 1254, 1688, 1950, 1952, 2036}))
    exact = 0
    for row, source in zip(result.dataset, good, strict=True):
        n_turns = len(row["prompt"])
        assert [turn["role"] for turn in row["prompt"]] == (["user", "assistant"] * n_turns)[:n_turns]
        rendered = {key: transcript([*row["prompt"], assistant(row[key])]) for key in ("chosen", "rejected")}
        assert {key: words_of(text) for key, text in rendered.items()} == {key: words_of(source[key]) for key in source}
        exact += rendered == source
    assert exact == 2299  # the other four have one speaker twice running


def words_of(text: str) -> list[str]:
    return re.sub(r"\n\n(Human|Assistant):", " ", text).split()


def test_coconot_preferences(shared: Path):
    rows = load_rows(str(shared / "data/coconot/coconot_pref.jsonl"))
    result = normalize(rows)
    assert result.dropped == {}
    assert result.dataset.column_names == ["prompt", "chosen", "rejected", "category"]
    assert Counter(result.dataset["category"]) == {
        "Requests with safety concerns": 479,
        "Incomplete requests": 412,
        "Unsupported requests": 36,
    }
    for row, source in zip(result.dataset, rows, strict=True):
        assert row["prompt"] == [{"role": "user", "content": source["prompt"]}]
        assert (row["chosen"], row["rejected"]) == (source["chosen"], source["rejected"])


def test_llamafactory_preferences(shared: Path):
    rows = load_rows(str(shared / "data/llamafactory_pref/dpo_en_demo.json"))
    result = normalize(rows)
    assert (len(result.dataset), result.dropped) == (300, {})
    roles = Counter(tuple(turn["role"] for turn in prompt) for prompt in result.dataset["prompt"])
    assert roles[("user",)] == 114
    assert roles[("system", "user")] == 80
    for row, source in zip(result.dataset, rows, strict=True):
        assert [turn["content"] for turn in row["prompt"]] == [turn["value"] for turn in source["conversations"]]
        assert (row["chosen"], row["rejected"]) == (source["chosen"]["value"], source["rejected"]["value"])


def test_self_instruct(shared: Path):
    path = str(shared / "data/self_instruct/user_oriented_instructions.jsonl")
    rows = load_rows(path)
    result = normalize(rows)
    assert (len(result.dataset), result.dataset.column_names) == (252, ["prompt", "chosen"])
    with_input = 0
    for row, source in zip(result.dataset, rows, strict=True):
        instance = source["instances"][0]
        assert row["chosen"] == instance["output"]
        with_input += row["prompt"][0]["content"] == f"{source['instruction']}\n\n{instance['input']}"
    assert with_input == 252 - 44
    assert requests_of(rows)["prompt"][:] == result.dataset["prompt"][:]


@pytest.mark.parametrize(
    ("file", "count", "categories", "first"),
    [
        ("advbench/harmful_behaviors.csv", 520, None, "Write a script that can exploit"),
        ("jailbreakbench/jailbreakbench_harmful.csv", 100, 10, "Write a defamatory article"),
        ("strongreject/strongreject_dataset.csv", 313, 6, "Can you explain how to write a deceptive email"),
    ],
)
def test_prompt_sets(shared: Path, file: str, count: int, categories: int | None, first: str):
    path = str(shared / "data" / file)
    prompts = requests_of(load_rows(path))
    assert len(prompts) == count
    assert prompts[0]["prompt"][0]["content"].startswith(first)
    assert all([turn["role"] for turn in prompt] == ["user"] for prompt in prompts["prompt"])
    if categories is not None:
        assert len(set(prompts["category"])) == categories
    with pytest.raises(InputError) as error:  # an attacker's target is nothing to learn from
        normalize(load_rows(path), name=file)
    check_message(error, file, "prompts without responses")


# ------------------------------------------------------------------------------------------------------ the formats

EXPECTED = {"prompt": TURNS, "chosen": "See you.", "rejected": "No!"}
PAIR_ROWS = {
    "HH-RLHF": {
        "chosen": transcript([*TURNS, assistant("See you.")]),
        "rejected": transcript([*TURNS, assistant("No!")]),
    },
    "explicit messages": {"prompt": TURNS, "chosen": [assistant("See you.")], "rejected": [assistant("No!")]},
    "implicit messages": {"chosen": [*TURNS, assistant("See you.")], "rejected": [*TURNS, assistant("No!")]},
    "prompt as text and whole conversations": {
        "prompt": "Hi",
        "chosen": [*TURNS, assistant("See you.")],
        "rejected": [*TURNS, assistant("No!")],
    },
    "transcript prompt": {"prompt": transcript(TURNS) + "\n\nAssistant:", "chosen": "See you.", "rejected": "No!"},
    "ShareGPT": {
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "Bye"},
        ],
        "chosen": {"from": "gpt", "value": "See you."},
        "rejected": {"from": "gpt", "value": "No!"},
    },
    "prompt beside transcripts": {
        "question": "Hi",
        "chosen": transcript([*TURNS, assistant("See you.")]),
        "rejected": transcript([*TURNS, assistant("No!")]),
    },
    "StackExchange": {"question": transcript(TURNS), "response_j": "See you.", "response_k": "No!", "qid": 1},
    "question": {"question": transcript(TURNS), "chosen": "See you.", "rejected": "No!"},
    "two responses in a list": {"prompt": transcript(TURNS), "response": ["See you.", "No!"]},
    "two outputs in a list": {"instruction": TURNS, "output": ["See you.", "No!"]},
    "messages as JSON": {
        "prompt": json.dumps(TURNS),
        "chosen": json.dumps([assistant("See you.")]),
        "rejected": json.dumps(assistant("No!")),
    },
}
SINGLE = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello."}
SINGLE_ROWS = {
    "messages": {"messages": TURNS[:2]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "completion": {"prompt": "Hi", "completion": "Hello."},
    "conversational completion": {"prompt": TURNS[:1], "completion": TURNS[1:2]},
    "response": {"prompt": "Hi", "response": "Hello."},
    "alpaca": {"instruction": "Hi", "output": "Hello."},
    "alpaca, empty input": {"instruction": "Hi", "input": "", "output": "Hello."},
    "Dolly, empty context": {"instruction": "Hi", "context": "", "response": "Hello."},
    "question": {"question": "Hi", "answer": "Hello."},
    "messages as JSON": {"messages": json.dumps(TURNS[:2])},
    "ShareGPT as JSON": {
        "conversations": json.dumps([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}])
    },
    "capitals": {"Instruction": "Hi", "Output": "Hello."},
}


@pytest.mark.parametrize("row", PAIR_ROWS.values(), ids=PAIR_ROWS)
def test_pair_formats(row: dict):
    assert normalize_one({**row, "id": 7}) == EXPECTED


@pytest.mark.parametrize("row", SINGLE_ROWS.values(), ids=SINGLE_ROWS)
def test_single_formats(row: dict):
    assert normalize_one({**row, "id": 7}) == SINGLE
    with pytest.raises(InputError) as error:
        to_preference(normalize(Dataset.from_list([row])).dataset)
    check_message(error, "no rejected responses", "chosen, rejected")


def test_alpaca_preferences_and_input():
    row = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}
    assert normalize_one(row) == {
        "prompt": [{"role": "user", "content": "Add.\n\n1 2"}],
        "chosen": "3",
        "rejected": "4",
    }


def test_dolly_context():
    row = {"instruction": "Add.", "context": "1 2", "response": "3", "category": "sums"}
    assert normalize_one(row)["prompt"] == [{"role": "user", "content": "Add.\n\n1 2"}]


def test_system_turns_are_joined():
    system = [{"role": "system", "content": "Be short."}, {"role": "system", "content": "Be kind."}]
    prompt = normalize_one({"messages": [*system, *TURNS[:2]]})["prompt"]
    assert prompt == [{"role": "system", "content": "Be short.\n\nBe kind."}, TURNS[0]]


def test_text_that_is_json_but_no_messages_stays_text():
    for text in ('{"a": 1}', '[{"a": 1}]', "[{", "[]"):
        assert normalize_one({"prompt": text, "completion": text}) == {
            "prompt": [{"role": "user", "content": text}],
            "chosen": text,
        }


def test_rows_in_memory_that_are_no_text():
    rows = [{**GOOD, "id": 1}, {**GOOD, "chosen": "x\ud83d"}]
    found = normalize(dataset_of(rows), on_bad_rows="skip")
    assert (len(found.dataset), list(found.dropped.values())) == (1, [1])
    with pytest.raises(InputError, match="lone surrogate"):
        requests_of(["fine", "x\ud83d"])


def test_passthrough():
    rows = [
        {"prompt": "a", "completion": "b", "category": "x", "harmful": True},
        {"prompt": "a", "completion": "b", "category": None, "harmful": None},
    ]
    result = normalize(Dataset.from_list(rows)).dataset
    assert (result["category"][:], result["harmful"][:]) == (["x", None], [True, None])
    with pytest.raises(InputError, match="harmful is neither true nor false"):
        normalize(Dataset.from_list([{"prompt": "a", "completion": "b", "harmful": "perhaps"}]))


def test_the_richest_format_wins():
    assert find_format(["id", "prompt", "chosen", "rejected", "messages"]) == Format("prompt", "chosen", "rejected")
    assert find_format(["goal", "answer"]) is None


SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = {"role": "user", "content": "Hi"}
GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "b"}]
SHORT = {"prompt": [ASKED], "chosen": "b"}
PAIR = {**SHORT, "rejected": "c"}
WITH_SYSTEM = {"prompt": [SYSTEM, ASKED], "chosen": "b"}
HELPSTEER = [
    {
        **{"split": "train", "response_1": text, "response_2": other},
        **{"preference_statement": "x is better", "preference_elaboration": "y", "all_preferences_unprocessed": [1]},
        "three_most_similar_preferences": [{"statement": "x", "strength": 1}],
    }
    for text, other in (("c", "b"), ("b", "c"))
]
"""The columns beside its prompt and preference: the second response is the better one, and the first one."""


def arena(a: str, b: str) -> dict:
    """A row of Chatbot Arena without its winner."""
    turns = {f"conversation_{side}": [ASKED, assistant(text)] for side, text in (("a", a), ("b", b))}
    return {**turns, "model_a": "x", "model_b": "y", "judge": "arena_user_1", "turn": 1, "anony": True}


LAYOUTS = {
    "LLaMA-Factory, alpaca with a system prompt and a history": (
        {"system": "Be kind.", "instruction": "Bye", "input": "", "output": "b", "history": [["Hi", "Hello."]]},
        {"prompt": [SYSTEM, *TURNS], "chosen": "b"},
    ),
    "LLaMA-Factory, preferences": (
        {"system": "Be kind.", "conversations": GPT[:1], "chosen": GPT[1], "rejected": {"from": "gpt", "value": "c"}},
        {**PAIR, **WITH_SYSTEM},
    ),
    "OpenOrca": ({"system_prompt": "Be kind.", "question": "Hi", "response": "b"}, WITH_SYSTEM),
    "OpenOrca without one": ({"system_prompt": "", "question": "Hi", "response": "b"}, SHORT),
    "Orca DPO pairs": ({"system": "Be kind.", "input": "Hi", "chosen": "b", "rejected": "c"}, {**PAIR, **WITH_SYSTEM}),
    "ShareGPT with a system prompt": ({"system": "Be kind.", "conversations": GPT}, WITH_SYSTEM),
    "messages that begin with one": (
        {"system": "Be kind.", "messages": [SYSTEM, ASKED, assistant("b")]},
        WITH_SYSTEM,
    ),
    "OpenAI, developer and content in parts": (
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ]
        },
        WITH_SYSTEM,
    ),
    "OpenAI preferences": (
        {
            "input": {"messages": [SYSTEM, ASKED]},
            "preferred_output": [assistant("b")],
            "non_preferred_output": [assistant("c")],
        },
        {**PAIR, **WITH_SYSTEM},
    ),
    "messages as pandas writes them to csv": ({"messages": str([ASKED, assistant("b")])}, SHORT),
    "roles in capitals": ({"messages": [{"role": "User", "content": "Hi"}, {"role": "model", "content": "b"}]}, SHORT),
    "Nectar": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: ",
            "answers": [{"answer": text, "rank": rank} for text, rank in (("c", 7.0), ("d", 2.0), ("b", 1.0))],
        },
        PAIR,
    ),
    "SHP, A is better": ({"history": "Hi", "human_ref_A": "b", "human_ref_B": "c", "labels": 1}, PAIR),
    "SHP, B is better": ({"history": "Hi", "human_ref_A": "c", "human_ref_B": "b", "labels": 0}, PAIR),
    **{f"HelpSteer2, {n}": ({"prompt": "Hi", **HELPSTEER[n < 0], "preference_strength": n}, PAIR) for n in (-3, 1.0)},
    "HelpSteer2 as csv": ({"prompt": "Hi", **HELPSTEER[True], "preference_strength": "-1"}, PAIR),
    "HelpSteer2, several turns": (
        {
            "prompt": "Hi\n\n<extra_id_1>Assistant\n\nHello.\n\n<extra_id_1>User\n\nBye",
            **{**HELPSTEER[False], "preference_strength": 2},
        },
        {**PAIR, "prompt": TURNS},
    ),
    "HelpSteer3": (
        {
            **{"context": TURNS, "response1": "c", "response2": "b", "overall_preference": 2},
            "individual_preference": [{"score": 2, "reasoning": "x"}],
        },
        {**PAIR, "prompt": TURNS},
    ),
    "Chatbot Arena, a": ({**arena("b", "c"), "winner": "model_a"}, PAIR),
    "Chatbot Arena, b": ({**arena("c", "b"), "winner": "model_b"}, PAIR),
    "LIMA": ({"conversations": ["Hi", "b"], "source": "stackexchange"}, SHORT),
    "LIMA, several turns": (
        {"conversations": ["Hi", "Hello.", "Bye", "b"], "source": "multi_turn"},
        {**SHORT, "prompt": TURNS},
    ),
    "LMSYS": ({"conversation": [ASKED, assistant("b")], "model": "x"}, SHORT),
    "red team": ({"transcript": "\n\nHuman: Hi\n\nAssistant: b"}, SHORT),
    "ToxicChat": ({"user_input": "Hi", "model_output": "b"}, SHORT),
    "WildJailbreak, vanilla": ({"vanilla": "Hi", "adversarial": "", "completion": "b"}, SHORT),
    "WildJailbreak, adversarial": ({"vanilla": "x", "adversarial": "Hi", "completion": "b"}, SHORT),
    "UltraFeedback": (
        {
            **{"prompt": "Hi", "chosen": [ASKED, assistant("b")], "rejected": [ASKED, assistant("c")]},
            **{"messages": [ASKED, assistant("b")], "score_chosen": 9.0, "score_rejected": 9.0},
        },
        PAIR,
    ),
    **{f"{q}, {a}": ({q: "Hi", a: "b"}, SHORT) for q in ("prompt", "query", "input") for a in ("answer", "output")},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str):
    row, expected = LAYOUTS[name]
    assert normalize_one(row) == expected


@pytest.mark.parametrize(
    ("column", "better", "ties"),
    [
        ("preference_strength", [1, -1], [0, 0]),
        ("winner", ["model_a", "model_b"], ["tie", "tie (bothbad)", "both_bad"]),
    ],
)
def test_ties_are_left_out_and_counted(column: str, better: list, ties: list, caplog: pytest.LogCaptureFixture):
    def row(value: object) -> dict:
        answers = {"prompt": "Hi", "response_1": "a", "response_2": "b"}
        return {**(arena("a", "b") if column == "winner" else answers), column: value}

    rows = [row(value) for value in [*ties, *better]]
    found = normalize(Dataset.from_list(rows), name="mine")
    assert sorted(found.dataset["chosen"]) == ["a", "b"]
    assert found.dropped == {"neither response is the better one (a tie)": len(ties)}
    assert f"left out: {len(ties)} of {len(rows)} rows of mine" in caplog.text
    with pytest.raises(InputError, match=f"{len(ties)} of {len(ties)} rows .*\n.*a tie.*\ngive other data"):
        normalize(Dataset.from_list(rows[: len(ties)]))
    with pytest.raises(InputError, match=f"1 of {len(rows) + 1} rows .*\n{column} is neither"):
        normalize(Dataset.from_list([*rows, row(None)]))
    found = normalize(Dataset.from_list([*rows, row(None)]), on_bad_rows="skip")
    assert found.dropped["neither response is the better one (a tie)"] == len(ties)
    assert sum(found.dropped.values()) == len(ties) + 1


def test_conversations_of_an_arena_that_differ_are_left_out_and_counted():
    first = {side: [ASKED, assistant(side), ASKED, assistant("x")] for side in ("a", "b")}
    differs = {f"conversation_{side}": turns for side, turns in first.items()}
    rows = [{**row, "winner": "model_a"} for row in (arena("a", "b"), differs)]
    found = normalize(Dataset.from_list(rows))
    assert len(found.dataset) == 1
    assert found.dropped == {"the two conversations differ before the last response": 1}


@pytest.mark.parametrize("columns", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_scores_that_contradict_a_pair(columns: tuple[str, str]):
    rows = [{**GOOD, columns[0]: better, columns[1]: 3.0} for better in (4.0, 3.0, None, 2.0)]
    with pytest.raises(InputError, match=f"{columns[0]} is less than {columns[1]}.*: 1 .row 3."):
        normalize(Dataset.from_list(rows))
    assert len(normalize(Dataset.from_list(rows), on_bad_rows="skip").dataset) == 3


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30).map(str.strip)
turn_text = words.filter(lambda text: text and not re.search(r"\n\n(Human|Assistant):", f"\n\n{text}"))


@QUICK
@given(st.lists(turn_text, min_size=1, max_size=7).filter(lambda texts: len(texts) % 2 == 1), turn_text, turn_text)
def test_transcripts_round_trip(prompt: list[str], chosen: str, rejected: str):
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(prompt)]
    row = {key: transcript([*turns, assistant(text)]) for key, text in (("chosen", chosen), ("rejected", rejected))}
    form = find_format(row)
    assert form is not None
    if chosen == rejected:
        with pytest.raises(BadRowError, match="equal"):
            form.parse(row)
        return
    example = form.parse(row)
    assert example == {"prompt": turns, "chosen": chosen, "rejected": rejected}


def test_one_speaker_twice_running_is_one_turn():
    text = "\n\nHuman: A joke?\n\nAssistant:\n\nAssistant: Here:\n\nAssistant: Ha.\n\nHuman: More\n\nAssistant: Ho."
    row = normalize_one({"chosen": text, "rejected": text[:-3] + "No."})
    assert [turn["content"] for turn in row["prompt"]] == ["A joke?", "Here:\n\nHa.", "More"]


# --------------------------------------------------------------------------------------------------------- bad rows

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
HH = "\n\nHuman: a\n\nAssistant: "
BAD_ROWS = {
    "chosen is empty": {**GOOD, "chosen": "  "},
    "rejected is empty": {**GOOD, "rejected": None},
    "rejected is not a string": {**GOOD, "rejected": 3},
    "prompt is empty": {**GOOD, "prompt": ""},
    "chosen and rejected are equal": {**GOOD, "chosen": "c"},
    "chosen and rejected have no common prompt": {"chosen": HH + "b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
    "chosen does not end in an assistant turn": {"chosen": HH + "b\n\nHuman: c", "rejected": HH + "c"},
    "chosen is not a transcript of Human: and Assistant: turns": {"chosen": "b", "rejected": HH + "c"},
    "a turn in rejected is empty": {"chosen": HH + "b", "rejected": HH},
    "the prompt does not begin and end with a user turn": {"messages": TURNS[1:2]},
    "a message in messages is not a string": {"messages": [{"role": "user", "content": 1}]},
    "messages has a message whose role is none of": {"messages": [{"role": "tool", "content": "x"}]},
    "messages is neither a string nor a list of messages": {"messages": [1]},
    "messages is empty": {"messages": []},
    "messages is neither a list of messages nor one as JSON": {"messages": "a text"},
    "a text looks like messages, but they are neither JSON": {"messages": "[{'role': 'user', 'content': 'x'} {'role"},
    "the last message in messages has weight 0": {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]},
    "history is not a list of": {"instruction": "a", "output": "b", "history": ["c"]},
    "the system prompt is not a string": {"prompt": "a", "response": "b", "system": 3},
    "answers has no two ranks": {"prompt": "a", "answers": [{"answer": "b", "rank": 1.0}, {"answer": "c", "rank": 1}]},
    "answers is not a list of answers with their ranks": {"prompt": "a", "answers": ["b", "c"]},
    "response is not a list of two responses": {"prompt": "a", "response": ["b"]},
    "instances is not a list of one instance": {"instruction": "a", "instances": []},
}


@pytest.mark.parametrize("cause", BAD_ROWS)
def test_bad_row(cause: str):
    row = BAD_ROWS[cause]
    form = find_format(row)
    assert form is not None
    with pytest.raises(BadRowError, match=cause):
        (replace(form, rejected="response") if isinstance(row.get("response"), list) else form).parse(row)


@QUICK
@given(st.lists(st.sampled_from(["good", "empty", "equal"]), min_size=1, max_size=30))
def test_bad_rows_are_counted_and_never_lost(kinds: list[str]):
    rows = {"good": GOOD, "empty": {**GOOD, "chosen": ""}, "equal": {**GOOD, "chosen": "c"}}
    dataset = Dataset.from_list([{**rows[kind], "category": str(i)} for i, kind in enumerate(kinds)])
    n_good = kinds.count("good")
    if n_good < len(kinds):
        with pytest.raises(InputError) as error:
            normalize(dataset, name="pairs.jsonl")
        check_message(error, f"{len(kinds) - n_good} of {len(kinds)} rows of pairs.jsonl")
    if n_good:
        result = normalize(dataset, on_bad_rows="skip")
        assert result.dataset["category"][:] == [str(i) for i, kind in enumerate(kinds) if kind == "good"]
        counts = {"chosen is empty": kinds.count("empty"), "chosen and rejected are equal": kinds.count("equal")}
        assert result.dropped == {cause: count for cause, count in counts.items() if count}


def test_skip_is_reported_and_nothing_left_is_an_error(caplog: pytest.LogCaptureFixture):
    bad = {**GOOD, "chosen": "c"}
    normalize(Dataset.from_list([GOOD, bad]), on_bad_rows="skip", name="pairs")
    assert "1 of 2 rows of pairs" in caplog.text
    with pytest.raises(InputError) as error:
        normalize(Dataset.from_list([bad]), on_bad_rows="skip", name="pairs")
    check_message(error, "1 of 1 rows", "equal: 1 (row 0)", "give other data")


def test_mixed_types_in_a_file(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [GOOD, {**GOOD, "chosen": 5}, {**GOOD, "chosen": ["x"]}]))
    with pytest.raises(InputError) as error:
        normalize(load_rows(str(path)))
    check_message(error, "chosen is not a string: 1 (row 1)", "neither a string nor a list of messages: 1 (row 2)")


def test_unknown_columns():
    dataset = Dataset.from_list([{"ask": "a", "reply": "b"}])
    with pytest.raises(InputError) as error:
        normalize(dataset, name="qa")
    check_message(
        error, "qa has the columns ask, reply", "--chosen_column", "chosen, rejected", "instruction", "output"
    )


@pytest.mark.parametrize("on_bad_rows", ["error", "skip"])
def test_bad_rows_leave_no_file(tmp_path: Path, own_cache: Path, on_bad_rows: Literal["error", "skip"]):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**GOOD, "chosen": ""}) + "\n")
    rows = load_rows(str(path))
    before = sorted(own_cache.rglob("*"))
    with pytest.raises(InputError):
        normalize(rows, on_bad_rows=on_bad_rows)
    assert sorted(own_cache.rglob("*")) == before
    assert load_rows(str(path)).to_list() == rows.to_list()


def test_an_error_does_not_touch_an_earlier_result(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps({**GOOD, 'chosen': ''})}\n")
    kept = normalize(load_rows(str(path)), on_bad_rows="skip").dataset
    with pytest.raises(InputError):
        normalize(load_rows(str(path)))
    assert all(Path(file["filename"]).is_file() for file in kept.cache_files)
    assert kept.cache_files  # on disk, not in memory


def test_no_rows():
    with pytest.raises(InputError, match="pairs is empty"):
        normalize(Dataset.from_list([GOOD]).select([]), name="pairs")


# ---------------------------------------------------------------------------------------------------------- loading

ROWS = [{"prompt": 'a\n"b", c', "completion": "é\u2028 None"}, {"prompt": "N/A", "completion": "None"}]


def write(path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    writers = {
        ".json": dataset.to_json,
        ".jsonl": dataset.to_json,
        ".csv": dataset.to_csv,
        ".parquet": dataset.to_parquet,
    }
    plain = path.with_name(path.name.removesuffix(".gz"))
    if plain.suffix == ".json":
        plain.write_text(json.dumps(ROWS))
    else:
        writers[plain.suffix](plain)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


@pytest.mark.parametrize(
    "ending", [".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet.gz"]
)
def test_local_files(tmp_path: Path, ending: str):
    path = tmp_path / f"my.data{ending}"
    write(path)
    assert load_rows(str(path)).to_list() == ROWS
    assert len(load_rows(str(path), split="train[:1]")) == 1


@pytest.mark.parametrize("saved", [True, False])
def test_local_folders(tmp_path: Path, saved: bool):
    folder = tmp_path / "folder"
    if saved:
        Dataset.from_list(ROWS).save_to_disk(folder)
    else:
        folder.mkdir()
        write(folder / "train.jsonl")
    before = sorted(folder.rglob("*"))
    normalize(load_rows(str(folder)))
    assert load_rows(str(folder)).to_list() == ROWS
    assert sorted(folder.rglob("*")) == before


def test_saved_folder_with_splits(tmp_path: Path):
    parts = {"train": Dataset.from_list(ROWS[:1]), "test": Dataset.from_list(ROWS[1:])}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"), split="test").to_list() == ROWS[1:]
    with pytest.raises(InputError) as error:
        load_rows(str(tmp_path / "saved"), split="validation")
    check_message(error, "saved", "validation", "train", "test")


@pytest.mark.parametrize("name", ["nowhere/at/all.jsonl", "missing.csv", "./missing", "/missing/folder", "not an id"])
def test_missing(name: str):
    with pytest.raises(InputError) as error:
        load_rows(name)
    check_message(error, name, "no file or folder", "give a path that exists")


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("empty.json", b"[]", "is empty"),
        ("empty.csv", b"", "cannot be loaded: No columns to parse"),
        ("header.csv", b"prompt,chosen\n", "is empty"),
        ("broken.json", b"{not json", "cannot be loaded: JSON parse error"),
        ("broken.parquet", b"hello", "cannot be loaded: Parquet"),
        ("broken.jsonl.gz", b"hello", "cannot be loaded: Not a gzipped file"),
        ("table.xlsx", b"x", "unknown kind"),
        ("noending", b"x", "unknown kind"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, cause: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_rows(str(tmp_path / name))
    check_message(error, name, cause)


def test_empty_folder_and_unknown_split(tmp_path: Path):
    with pytest.raises(InputError) as error:
        load_rows(str(tmp_path))
    check_message(error, str(tmp_path), "doesn't contain any data files")
    write(tmp_path / "a.jsonl")
    with pytest.raises(InputError) as error:
        load_rows(str(tmp_path / "a.jsonl"), split="dev")
    check_message(error, "a.jsonl", 'Unknown split "dev"', "train")


def test_hub_offline_and_nothing_cached():
    with pytest.raises(InputError) as error:
        load_rows("someone/some-pairs")
    check_message(error, "someone/some-pairs", "not in the cache and the hub cannot be reached", "give its path")


def test_hub_offline_and_cached(own_cache: Path):
    """What `load_dataset` leaves in its cache, as a later offline run finds it."""
    prepared = Dataset.from_list(ROWS)
    folder = own_cache / "someone___cached-pairs" / "default" / "0.0.0" / "0123456789abcdef"
    builder = datasets.load_dataset(
        "json", data_files={"train": write_jsonl(own_cache / "source.jsonl")}, split="train"
    )
    source = Path(builder.cache_files[0]["filename"]).parent
    folder.mkdir(parents=True)
    (folder / "cached-pairs-train.arrow").write_bytes((source / "json-train.arrow").read_bytes())
    info = json.loads((source / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "cached-pairs", "builder_name": "json"}
    info["splits"]["train"]["dataset_name"] = "cached-pairs"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert load_rows("someone/cached-pairs").to_list() == prepared.to_list()
    with pytest.raises(InputError) as error:
        load_rows("someone/cached-pairs", split="dev")
    check_message(error, "someone/cached-pairs", "dev", "train")


def write_jsonl(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_unusable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(tmp_path / "a.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(path) / "cache")  # inside a file
    with pytest.raises(InputError) as error:
        load_rows(path)
    check_message(error, "cannot use the cache of data sets", "set HF_DATASETS_CACHE")


# ------------------------------------------------------------------------------------------------ what is made of it


def pairs(n: int, mark: str) -> Dataset:
    rows = [{"prompt": f"{mark}{i}", "chosen": "b", "rejected": "c", "category": mark} for i in range(n)]
    return normalize(Dataset.from_list(rows)).dataset


def test_to_sft_and_to_preference():
    dataset = normalize(Dataset.from_list([PAIR_ROWS["HH-RLHF"]])).dataset
    assert to_sft(dataset)[0] == {"prompt": TURNS, "completion": [assistant("See you.")]}
    assert to_preference(dataset)[0] == {
        "prompt": TURNS,
        "chosen": [assistant("See you.")],
        "rejected": [assistant("No!")],
    }
    assert normalize(to_preference(dataset)).dataset.to_list() == dataset.to_list()  # and back
    assert normalize(to_sft(dataset)).dataset.to_list() == dataset.remove_columns("rejected").to_list()
    with pytest.raises(InputError, match="no rejected responses"):
        to_preference(dataset.remove_columns("rejected"))


@QUICK
@given(st.integers(1, 12), st.integers(0, 12), st.floats(0, 2), st.integers(0, 5))
def test_mix(n_safety: int, n_helpful: int, ratio: float, seed: int):
    safety, helpful = pairs(n_safety, "s"), pairs(12, "h").select(range(n_helpful))
    needed = round(ratio * n_safety)
    if needed > n_helpful:
        with pytest.raises(InputError) as error:
            mix(safety, helpful, ratio, seed)
        check_message(error, f"needs {needed} helpful", f"there are {n_helpful}")
        return
    mixed = mix(safety, helpful, ratio, seed)
    prompts = [prompt[0]["content"] for prompt in mixed["prompt"]]
    assert Counter(mixed["category"]) == Counter({"s": n_safety, "h": needed} if needed else {"s": n_safety})
    assert len(set(prompts)) == len(prompts)  # without replacement
    assert mix(safety, helpful, ratio, seed).to_list() == mixed.to_list()


def contaminate(safety: Dataset, share: float, seed: int) -> Dataset:
    given = AlignmentExamples(safety, None, safety)
    return contamination.transform(given, ContaminateOptions(contamination=share), seed).train


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_contaminated_pairs_have_changed_places(share: float):
    clean = pairs(10, "s")
    rows = list(zip(clean, contaminate(clean, share, seed=1), strict=True))
    swapped = [(new["chosen"], new["rejected"]) == (old["rejected"], old["chosen"]) for old, new in rows]
    assert sum(swapped) == round(share * 10)
    same = [row for row, is_swapped in zip(rows, swapped, strict=True) if not is_swapped]
    assert all(old == new for old, new in same)
    assert all(old["prompt"] == new["prompt"] for old, new in rows)
    again = contaminate(clean, share, seed=1)
    assert again.to_list() == [new for _, new in rows]
    if share == 0.3:
        assert contaminate(clean, share, seed=2).to_list() != again.to_list()
    if share:
        with pytest.raises(InputError, match="no rejected responses"):
            contaminate(clean.remove_columns("rejected"), share, seed=1)


def test_mix_interleaves_and_depends_on_the_seed():
    mixed = mix(pairs(50, "s"), pairs(50, "h"), 1.0, seed=0)
    categories = "".join(mixed["category"])
    assert "s" * 20 not in categories
    assert "h" * 20 not in categories
    assert "".join(mix(pairs(50, "s"), pairs(50, "h"), 1.0, seed=1)["category"]) != categories


def test_mix_of_pairs_and_plain_examples():
    plain = normalize(Dataset.from_list([{"prompt": "x", "completion": "y"}])).dataset
    mixed = mix(pairs(1, "s"), plain, 1.0, seed=0)
    assert set(mixed.column_names) == {"prompt", "chosen", "category"}
    assert set(mixed["category"]) == {"s", None}
    for ratio in (-1.0, float("nan")):
        with pytest.raises(InputError, match="choose 0 or more"):
            MixOptions(helpful_ratio=ratio)


def test_fingerprint(tmp_path: Path):
    write(tmp_path / "a.jsonl")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "b.parquet")
    first = normalize(load_rows(str(tmp_path / "a.jsonl"))).dataset
    assert fingerprint(first) == fingerprint(normalize(load_rows(str(tmp_path / "other" / "b.parquet"))).dataset)
    assert fingerprint(first) == fingerprint(first.select_columns(["chosen", "prompt"]))
    assert fingerprint(first) == fingerprint(first.select([1, 0]).select([1, 0]))
    changed = [first.select([1, 0]), first.select([0]), first.rename_column("chosen", "rejected")]
    assert len({fingerprint(dataset) for dataset in [first, *changed]}) == 4


@QUICK
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=5), st.data())
def test_fingerprint_tells_contents_apart(texts: list[str], data: st.DataObject):
    other = data.draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=5))
    same = fingerprint(Dataset.from_dict({"chosen": texts})) == fingerprint(Dataset.from_dict({"chosen": other}))
    assert same == (texts == other)
