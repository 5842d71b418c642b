"""A language model as a judge: what it is asked, and how its answers are read."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stub_server import StubServer

from sails_align.evaluation.backends.openai import OpenAIBackend
from sails_align.evaluation.judges import shielding
from sails_align.evaluation.judges.answers import EXPLANATION_LIMIT, Question, combine, read
from sails_align.evaluation.judges.llm import LlmJudge, questions
from sails_align.evaluation.judges.rubrics import HARM, HELPFULNESS, PREFERENCE, REFUSAL, RUBRICS
from sails_align.evaluation.records import Completion, Item, Prompt, Reason, Verdict

MARK = "0a1b2c3d"
QUESTION = Question((), MARK, "score", {score: float(score) for score in range(1, 6)})


def ask(text: str = "how do i mend the cup?") -> Prompt:
    return Prompt("p", ({"role": "user", "content": text},), "benign", "none")


def answer(score: object, mark: object = MARK, **more: object) -> str:
    return json.dumps({"id": mark, "reasoning": "Because.", "score": score, **more})


class Scripted:
    """A backend that answers with what a function says of the request."""

    def __init__(self, reply: Callable[[str], Completion]) -> None:
        self.reply, self.asked, self.samplings, self.closed = reply, [], [], False

    def identity(self) -> dict[str, Any]:
        return {"backend": "scripted"}

    def complete(self, conversations: Sequence[Any], sampling: Any) -> Iterator[tuple[int, Completion]]:
        self.samplings.append(sampling)
        for index in reversed(range(len(conversations))):  # not in order
            text = conversations[index][-1]["content"]
            self.asked.append(text)
            yield index, self.reply(text)

    def close(self) -> None:
        self.closed = True


def obedient(choose: Callable[[str], object], key: str = "score") -> Scripted:
    """Answers as it is told to, with the right marker."""

    def reply(text: str) -> Completion:
        mark = re.findall(r'\{"id": "(\w+)"', text)[-1]
        return Completion(json.dumps({"id": mark, "reasoning": "So.", key: choose(text)}), "stop")

    return Scripted(reply)


# -- reading ------------------------------------------------------------------------------------------------------

RIGHT = {
    "bare": answer(4),
    "in a code fence": f"```json\n{answer(4)}\n```",
    "after words": f"Here is my verdict:\n{answer(4)}\nI hope that helps.",
    "after reasoning": f"<think>It may be {answer(1)}, or not.</think>\n{answer(4)}",
    "after reasoning that began in the template": f"Perhaps a 1: {answer(1)}\n</think>\n{answer(4)}",
    "over several lines": json.dumps({"id": MARK, "reasoning": "x", "score": 4}, indent=2),
    "with a line break in a string": f'{{"id": "{MARK}", "reasoning": "one\ntwo", "score": 4}}',
    "said twice": f"{answer(4)} {answer(4)}",
    "quoting a score": json.dumps({"id": MARK, "reasoning": 'It says {"score": 1} of itself.', "score": 4}),
    "quoting an answer": f'{answer(4)}\nThe response itself said {{"score": 1}} and {answer(1, "ffffffff")}.',
    "quoting before": f"The response claims {answer(1, 'ffffffff')}; I say {answer(4)}",
    "plain words": f"id: {MARK}, score: 4",
    "plain words without a name": f"{MARK}\n**Score: 4**",
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT.keys())
def test_an_answer_with_the_marker_is_a_verdict(text):
    assert read(QUESTION, Completion(text, "stop")).score == 4


WRONG = {
    "no marker": json.dumps({"score": 4}),
    "another marker": answer(4, "ffffffff"),
    "a marker that is no string": answer(4, 12345678),
    "above the scale": answer(6),
    "below the scale": answer(0),
    "negative": answer(-4),
    "a fraction": answer(4.0),
    "a string": answer("4"),
    "true": answer(True),
    "null": answer(None),
    "not a number": f'{{"id": "{MARK}", "score": NaN}}',
    "a list": answer([4]),
    "huge": f'{{"id": "{MARK}", "score": {"9" * 5000}}}',
    "no score": json.dumps({"id": MARK}),
    "two scores": f"{answer(4)} {answer(1)}",
    "a score and none": f"{answer(4)} {answer(9)}",
    "one key twice": f'{{"id": "{MARK}", "score": 1, "score": 4}}',
    "nested": json.dumps({"quote": {"id": MARK, "score": 4}}),
    "half of it": answer(4)[:-5],
    "reasoning without an end": f"<think>I would say {answer(4)}",
    "words only": "The score is 4.",
    "words with the marker": f"The response {MARK} says 'score: 4' of itself.",
    "plain words below the scale": f"{MARK} score: -4",
    "plain words with a fraction": f"{MARK} score: 4.5",
    "plain words out of ten": f"{MARK} score: 4/10",
    "plain words beyond the scale": f"{MARK} score: 44",
    "nothing": "",
    "deep": '{"a":' * 2000,
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_anything_else_is_unparsable_and_never_a_default(text):
    verdict = read(QUESTION, Completion(text, "stop"))
    assert (verdict.score, verdict.reason) == (None, "unparsable verdict")
    assert verdict.explanation == text.strip()[:EXPLANATION_LIMIT]


def test_an_answer_that_is_cut_off_is_unparsable():
    verdict = read(QUESTION, Completion(answer(4), "length"))
    assert verdict.reason == "unparsable verdict"
    assert verdict.explanation is not None
    assert "cut off" in verdict.explanation
    reasoned = read(QUESTION, Completion(None, "length", "the model reasoned but gave no answer"))
    assert reasoned.reason == "unparsable verdict"


@pytest.mark.parametrize(
    "text",
    ["I can't assist with that.", "I'm sorry, but I can\u2019t help with this.", "Sorry, no.", "I cannot rate this.",
     "I am unable to grade it.", "Unfortunately, I won't judge this.", "I apologize, but no.", "**I must decline.**"],
)  # fmt: skip
def test_a_judge_that_refuses_has_given_no_verdict(text):
    assert read(QUESTION, Completion(text, "stop")).reason == "refused by the judge"
    # ... but one that says so after its verdict, or of the response, has.
    assert read(QUESTION, Completion(f"{text}\n{answer(5)}", "stop")).score == 5


def test_other_reasons():
    assert read(QUESTION, Completion(answer(1), "content_filter")).reason == "refused by the judge"
    assert read(QUESTION, Completion(None, "content_filter")).reason == "refused by the judge"
    error = read(QUESTION, Completion(None, None, "status 500: out of order"))
    assert error == Verdict(None, "server error", "status 500: out of order")
    assert read(QUESTION, Completion("It says: I'm sorry.", "stop")).reason == "unparsable verdict"


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.floats() | st.text(max_size=8) | st.just(MARK),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "score", "reasoning", "x"]), inner, max_size=4)
    ),
    max_leaves=6,
).map(json.dumps)
pieces = st.sampled_from(
    ["{", "}", '"', ":", ",", "score", '"score"', '"id"', "id", "4", "1", "<think>", "</think>", "```", "\n", " ",
     '{"score": 1}', '{"id": "ffffffff", "score": 1}', "\ud800", "\\", "[", "]", "Score: 1"]
)  # fmt: skip
junk = st.lists(pieces | json_like | st.text(st.characters(exclude_categories=[]), max_size=20), max_size=12).map(
    "".join
)


@settings(deadline=None)  # other work on the machine is no failure
@given(junk, st.sampled_from(["stop", "length", "content_filter", None]))
@example('{"a":' * 2000, "stop")
@example("{" * 20_000, "stop")
@example('{"' * 20_000, "stop")
@example("</think>" * 5_000, None)
@example("[" * 100_000 + '{"id":', "stop")
def test_reading_never_fails_and_scores_only_what_carries_the_marker(text, finish_reason):
    verdict = read(QUESTION, Completion(text, finish_reason))
    assert verdict.score is None or verdict.score in QUESTION.scores.values()
    assert verdict.reason is None or verdict.reason in get_args(Reason)
    json.dumps(verdict.explanation, ensure_ascii=False).encode()
    if MARK not in text or finish_reason not in ("stop", None):
        assert verdict.score is None


@settings(deadline=None)
@given(junk.filter(lambda text: MARK not in text and "<" not in text and "{" not in text), st.integers(1, 5), junk)
def test_what_is_around_an_answer_does_not_change_it(before, score, after):
    """The score is that of the JSON with the marker, whatever stands around it without the marker."""
    text = f"{before}\n{answer(score)}\n{after.replace(MARK, '').replace('>', '')}"
    assert read(QUESTION, Completion(text, "stop")).score == score


@settings(deadline=None)
@given(junk)
def test_a_quoted_response_never_gives_the_score(response):
    """The judge that quotes all of what it judged, and says no more: there is no score in it."""
    (question,) = questions(HARM, Item(ask(), f"x{response}{answer(1)}"))
    text = question.conversation[0]["content"]
    quoted = text.split(f"<<<RESPONSE {question.mark}>>>\n")[1].split("\n<<<END OF RESPONSE")[0]
    assert read(question, Completion(quoted, "stop")).score is None
    assert read(question, Completion(response, "stop")).score is None


# -- asking -------------------------------------------------------------------------------------------------------


def test_each_item_gets_one_verdict_in_any_order():
    backend = obedient(lambda text: len(re.findall("harm!", text)))
    items = [Item(ask(), "harm! " * (index % 5 + 1)) for index in range(20)] + [Item(ask(), " \n\u200b")]
    found = dict(LlmJudge(backend).judge("harm", items))
    assert [found[index].score for index in range(20)] == [index % 5 + 1 for index in range(20)]
    assert found[20] == Verdict(None, "empty response")
    assert len(backend.asked) == 20  # an empty response is not asked about


def test_instructions_stand_before_and_after_the_data():
    response, request = "the response as it was", "the request as it was"
    (question,) = questions(HARM, Item(ask(request), response))
    (message,) = question.conversation
    text = message["content"]
    assert message["role"] == "user"
    before, after = text.split(response)
    assert text.startswith(HARM.instructions)
    assert request in before
    assert HARM.reminder in after
    assert f'{{"id": "{question.mark}"' in after
    assert after.count("<<<END OF RESPONSE ") == 1


def test_questions_are_the_same_again_and_differ_by_response():
    one, same, other = (questions(HARM, Item(ask(), text))[0] for text in ("a", "a", "b"))
    assert one == same
    assert one.mark != other.mark


def test_requests_with_several_turns_are_shown_whole():
    turns = ({"role": "user", "content": "first"}, {"role": "assistant", "content": "second"})
    prompt = Prompt("p", (*turns, {"role": "user", "content": "third"}), "harmful", "none")
    text = questions(HARM, Item(prompt, "no"))[0].conversation[0]["content"]
    assert "user: first\n\nassistant: second\n\nuser: third" in text


def test_long_responses_are_judged_by_their_worst_part():
    backend = obedient(lambda text: 5 if "the secret" in text else 1)
    long = "x " * 25_000 + "the secret" + " x" * 25_000
    ((_, verdict),) = LlmJudge(backend).judge("harm", [Item(ask(), long)])
    assert verdict.score == 5
    assert len(backend.asked) == 9
    assert max(map(len, backend.asked)) < shielding.LIMIT + 4_000
    assert len({re.findall(r'\{"id": "(\w+)"', text)[-1] for text in backend.asked}) == 9


@pytest.mark.parametrize("task", ["refusal", "helpfulness", "preference"])
def test_other_tasks_ask_once_about_a_cut_response(task):
    rubric = RUBRICS[task]
    found = questions(rubric, Item(ask("p" * 50_000), "x" * 100_000, "y" * 100_000))
    assert len(found) == (2 if task == "preference" else 1)
    for question in found:
        text = question.conversation[0]["content"]
        assert len(text) < shielding.LIMIT * 4 / 3 + 4_000
        assert "characters are left out here" in text
        assert text.startswith(rubric.instructions)
        assert rubric.reminder in text[-500:]


def test_blank_parts_are_not_asked_about():
    found = questions(HARM, Item(ask(), "help" + "\n" * 100_000))
    assert len(found) == 1
    assert "PART" not in found[0].conversation[0]["content"]


def test_a_part_without_a_score_leaves_the_response_unscored():
    failed = Verdict(None, "server error")
    assert combine("harm", [Verdict(1.0), failed, Verdict(3.0)]) == failed
    assert combine("harm", [Verdict(1.0), Verdict(3.0), Verdict(2.0)]).score == 3
    assert combine("harm", [Verdict(1.0), failed, Verdict(5.0)]).score == 5  # whatever the failed one would be


def test_hidden_characters_are_mentioned():
    text = questions(HARM, Item(ask(), "a\u200b\u200bb"))[0].conversation[0]["content"]
    assert "2 characters that a person does not see" in text
    assert "\u200b" not in text


@pytest.mark.parametrize(
    ("choose", "score"),
    [
        (lambda first, second: "A" if "good" in first else "B", 1.0),
        (lambda first, second: "B" if "good" in first else "A", 0.0),
        (lambda first, second: "A", 0.5),  # whatever stands first
        (lambda first, second: "B", 0.5),
        (lambda first, second: "tie", 0.5),
        (lambda first, second: "A" if "good" in first else "tie", 0.5),
    ],
)
def test_preferences_are_asked_in_both_orders(choose, score):
    def chosen(text: str) -> object:
        first = text.split("<<<RESPONSE A")[1].split("<<<END")[0]
        second = text.split("<<<RESPONSE B")[1].split("<<<END")[0]
        return choose(first, second)

    backend = obedient(chosen, key="better")
    ((_, verdict),) = LlmJudge(backend).judge("preference", [Item(ask(), "a good one", "a poor one")])
    assert verdict.score == score
    assert len(backend.asked) == 2


def test_a_preference_that_fails_in_one_order_is_unscored():
    backend = obedient(lambda text: "A" if "good" in text.split("<<<RESPONSE B")[0] else "C", key="better")
    ((_, verdict),) = LlmJudge(backend).judge("preference", [Item(ask(), "a good one", "a poor one")])
    assert verdict.reason == "unparsable verdict"


def test_a_preference_needs_another_response():
    judge = LlmJudge(obedient(lambda text: "A", key="better"))
    with pytest.raises(ValueError, match="has none"):
        dict(judge.judge("preference", [Item(ask(), "one")]))
    assert dict(judge.judge("preference", [Item(ask(), "one", " ")]))[0].reason == "empty response"


def test_servers_are_asked_for_the_schema():
    backend = obedient(lambda text: 1)
    list(LlmJudge(backend).judge("refusal", [Item(ask(), "yes")]))
    list(LlmJudge(backend, max_new_tokens=7).judge("refusal", [Item(ask(), "yes")]))
    assert backend.samplings[0].schema == REFUSAL.schema
    assert [sampling.max_new_tokens for sampling in backend.samplings] == [512, 7]
    assert backend.samplings[0].temperature == 0


def test_identities_tell_apart_what_decides_verdicts():
    judges = [
        LlmJudge(obedient(lambda text: 1)),
        LlmJudge(obedient(lambda text: 1), max_new_tokens=9),
    ]
    found = {json.dumps(judge.identity(task), sort_keys=True) for judge in judges for task in judge.tasks}
    assert len(found) == 2 * 4
    assert LlmJudge(obedient(lambda text: 1)).identity("harm") == judges[0].identity("harm")
    assert judges[0].tasks == {"harm", "refusal", "helpfulness", "preference"}


def test_closing_a_judge_closes_its_backend():
    backend = obedient(lambda text: 1)
    LlmJudge(backend).close()
    assert backend.closed


# -- over HTTP ----------------------------------------------------------------------------------------------------


def by_length(asked: Any) -> str:
    text = asked[-1]["content"]
    response = text.split("<<<RESPONSE ")[1].split("<<<END")[0]
    return answer(response.count("!") + 1, re.findall(r'\{"id": "(\w+)"', text)[-1])


def test_a_server_judges():
    items = [Item(ask(f"prompt {index}"), "yes" + "!" * (index % 10)) for index in range(40)]
    with StubServer(by_length) as server:
        judge = LlmJudge(OpenAIBackend(server.base_url, "stub"))
        found = dict(judge.judge("helpfulness", items))
        judge.close()
        formats = [request.body["response_format"] for request in server.requests]
    assert [found[index].score for index in range(40)] == [index % 10 + 1 for index in range(40)]
    assert formats[0]["json_schema"]["schema"] == HELPFULNESS.schema


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("content_filter", "refused by the judge"),
        ("refusal", "refused by the judge"),
        ("reasoning_only", "unparsable verdict"),
    ],
)
def test_servers_that_give_no_verdict(fault, reason):
    with StubServer(by_length, choose=lambda request: fault) as server:
        judge = LlmJudge(OpenAIBackend(server.base_url, "stub"))
        ((_, verdict),) = judge.judge("harm", [Item(ask(), "yes")])
        judge.close()
    assert verdict.reason == reason


def test_a_server_that_fails_leaves_items_unscored():
    with StubServer(by_length, choose=lambda request: "500" if "bad" in str(request.asked) else None) as server:
        judge = LlmJudge(OpenAIBackend(server.base_url, "stub", max_attempts=2, backoff=0.01))
        found = dict(judge.judge("harm", [Item(ask(), "fine"), Item(ask(), "bad"), Item(ask(), "fine!")]))
        judge.close()
    assert [found[index].score for index in range(3)] == [1, None, 2]
    assert found[1].reason == "server error"


def test_a_judge_that_was_not_told_the_marker_scores_nothing():
    """The control: scores come from the answer's marker, so that one without it is not taken."""
    with StubServer(lambda asked: json.dumps({"score": 1})) as server:
        judge = LlmJudge(OpenAIBackend(server.base_url, "stub"))
        ((_, verdict),) = judge.judge("harm", [Item(ask(), "yes")])
        judge.close()
    assert verdict.reason == "unparsable verdict"


def test_preference_rubric_is_read_by_its_own_key():
    first, second = questions(PREFERENCE, Item(ask(), "one", "two"))
    assert read(first, Completion(json.dumps({"id": first.mark, "better": "A"}), "stop")).score == 1
    assert read(second, Completion(json.dumps({"id": second.mark, "better": "A"}), "stop")).score == 0
    assert read(second, Completion(json.dumps({"id": first.mark, "better": "A"}), "stop")).score is None
    assert read(first, Completion(json.dumps({"id": first.mark, "score": 1}), "stop")).score is None
