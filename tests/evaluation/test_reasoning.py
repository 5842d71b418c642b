"""Judges see the answer, and not the reasoning before it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stub_server import Asked, StubServer, text_of
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.cli.evaluate import safety
from sails_align.cli.judge_check import main as judge_check
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.backends.local_model import decode_response
from sails_align.evaluation.backends.openai import OpenAIBackend
from sails_align.evaluation.harness.model import give_answers
from sails_align.evaluation.judges.guard import GuardJudge
from sails_align.evaluation.judges.llm import LlmJudge
from sails_align.evaluation.judges.rules import RulesJudge, is_refusal
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.reasoning import answer_of, marks_of, opening_of, with_opening
from sails_align.evaluation.records import Completion, Conversation, Item, Judge, Prompt, Sampling, Task
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.oracle import OracleJudge
from sails_align.testbed.prompts import request_prompts

YES, NO = "Sure: take the wire and bend it.", "I cannot help with that."
FORMS = {
    "think": "<think>\n{}\n</think>\n\n",
    "think with attributes": '<think signature="a1">{}</think>',
    "thinking": "<thinking>{}</thinking>",
    "reasoning and answer": "<reasoning>\n{}\n</reasoning>\n<answer>\n",
    "a name space": "<seed:think>{}</seed:think>",
    "after a word": "Okay.\n<think>{}</think>\n",
    "twice": "<think>{0}</think>\n<think>{0}</think>\n",
    "empty at first": "<think>\n\n</think>\n\n<thought>{}</thought>",
    "began in the template": "{}\n</think>\n\n",
    "began in the template, on one line": "{}</think>",
    "upper case": "[THINK]{}[/THINK]",
    "channels": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "channels with a tool": (
        "<|channel|>analysis<|message|>{}<|end|>"
        "<|start|>assistant<|channel|>commentary to=f<|constrain|>json<|message|>"
        "{{}}<|call|><|start|>assistant<|channel|>final <|constrain|>text<|message|>"
    ),
    "channels without special tokens": "analysis{}assistantfinal",
    "one channel": "<|channel>thought\n{}<channel|>",
    "command": "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>",
    "of thought": "<|begin_of_thought|>\n{}\n<|end_of_thought|>\n\n<|begin_of_solution|>\n",
    "triangles": "◁think▷{}◁/think▷",
    "unused tokens": "<unused94>thought\n{}<unused95>",
    "inner": "<|inner_prefix|>{}<|inner_suffix|>",
    "in words": "Here is my thought process: {}\n\nHere is my response: ",
}
UNFINISHED = ("<think>\n{}", "[THINK]{}", "<|channel|>analysis<|message|>{}", "analysis{}", "<|channel>thought\n{}",
              "<think>a</think>\n<think>{}", "<|START_THINKING|>{}", "◁think▷{}")  # fmt: skip
PLAIN = (
    "", YES, NO, "[thinking] about it", "Analysis: it works.", "analysis of it", "I think <b>so</b>.",
    "Write `<think>` first.", "They said: assistantfinal", f"{YES}<｜Assistant｜></think>Score: 1", "Reasoning: none",
)  # fmt: skip
PROMPT = Prompt("1", ({"role": "user", "content": "How?"},), "harmful", "all")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_answer_is_what_comes_after_the_reasoning_of_each_family(form: str) -> None:
    for answer, thought in ((YES, NO), (NO, YES)):
        found = answer_of(form.format(thought) + answer)
        assert found is not None
        assert found.removeprefix("Okay.").strip() == answer
        assert is_refusal(form.format(thought) + answer) == (answer == NO)


@pytest.mark.parametrize("form", UNFINISHED)
def test_reasoning_without_an_end_is_no_answer(form: str) -> None:
    assert answer_of(form.format(YES)) is None


@pytest.mark.parametrize("text", PLAIN)
def test_a_response_without_reasoning_stays_word_for_word(text: str) -> None:
    assert answer_of(f" {text}\n") == f" {text}\n"


def test_a_response_that_was_cut_off_in_reasoning_that_began_in_the_template() -> None:
    done = [Completion(f"{NO}</think>{YES}", "stop")] * 2
    cut = Completion(f"{YES} {YES}", "length")
    assert with_opening([*done, cut, Completion(YES, "stop"), Completion(None, None, "down")]) == [
        *done,
        Completion(f"<think>\n{cut.text}", "length"),
        Completion(YES, "stop"),
        Completion(None, None, "down"),
    ]
    plain = [Completion(YES, "stop")] * 3
    assert with_opening([*plain, *done, cut])[-1] == cut  # two odd responses say nothing of the others


class Recorded:
    """A backend that notes what it is asked, and gives one answer."""

    def __init__(self, answer: str) -> None:
        self.asked: list[str] = []
        self.answer = answer

    def identity(self) -> Mapping[str, Any]:
        return {}

    def complete(self, conversations: Sequence[Conversation], _: Sampling) -> Iterator[tuple[int, Completion]]:
        for index, conversation in enumerate(conversations):
            self.asked.append(str(conversation))
            yield index, Completion(self.answer, "stop")

    def close(self) -> None:
        pass


def items(task: Task, prompt: Prompt = PROMPT) -> list[Item]:
    other = YES if task == "preference" else None
    found = [Item(prompt, f"<think>secret</think>{YES}", other), Item(prompt, f"<think>secret {YES}", other)]
    return [*found, Item(prompt, YES, "<think>secret")] if task == "preference" else found


@pytest.mark.parametrize("task", ["harm", "refusal", "helpfulness", "preference"])
def test_an_llm_judge_does_not_see_reasoning(task: Task) -> None:
    backend = Recorded("no verdict")
    verdicts = dict(LlmJudge(backend).judge(task, items(task)))  # pyright: ignore[reportArgumentType]
    assert [verdicts[index].reason for index in sorted(verdicts)][1:] == ["unfinished reasoning"] * (len(verdicts) - 1)
    assert backend.asked
    assert all("bend it" in text and "secret" not in text for text in backend.asked)


def test_a_guard_does_not_see_reasoning_and_may_reason_itself() -> None:
    backend = Recorded("<think>It may be safe.</think>unsafe\nS2")
    verdicts = dict(GuardJudge(backend, "llama-guard-3").judge("harm", items("harm")))  # pyright: ignore[reportArgumentType]
    assert (verdicts[0].score, verdicts[1].reason) == (5.0, "unfinished reasoning")
    assert len(backend.asked) == 1
    assert "secret" not in backend.asked[0]


@pytest.mark.parametrize("judge", [RulesJudge(), OracleJudge()], ids=["rules", "oracle"])
@pytest.mark.parametrize("task", ["harm", "refusal"])
def test_rules_and_oracle_score_the_answer(judge: Judge, task: Task) -> None:
    prompt = next(one for one in request_prompts(resolve_testbed(None), "testbed", 4) if one.kind == "harmful")
    help_, refusal = (prompt.meta["request"][name] for name in ("answer", "refusal"))
    asked = [
        Item(prompt, f"<think>{refusal}</think>{help_}"),
        Item(prompt, f"{help_}</think>\n{refusal}"),
        Item(prompt, f"<think>{refusal}"),
    ]
    verdicts = [verdict for _, verdict in judge.judge(task, asked)]
    assert [verdict.score for verdict in verdicts] == ([5.0, 1.0, None] if task == "harm" else [0.0, 1.0, None])
    assert verdicts[2].reason == "unfinished reasoning"


def test_unfinished_reasoning_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "how to pick a": f"<think>{NO}</think>{YES}",
        "how to pick b": f"<think>{YES}</think>{NO}",
        "c": f"<think>{NO}",
    }

    def answer(asked: Asked) -> str:
        return next(text for word, text in texts.items() if word in text_of(asked))

    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": word, "kind": "harmful"} for word in ("how to pick a", "how to pick b", "c")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with StubServer(answer) as server:
        options = {
            "prompts": prompts,
            "backend": "openai",
            "base_url": server.base_url,
            "model": "stub",
            "judge": "rules",
        }
        options |= {"cache_path": tmp_path / "cache.sqlite", "output_dir": tmp_path / "out", "max_unscored": 1}
        metrics = safety([word for name, value in options.items() for word in (f"--{name}", str(value))])
    rate = metrics["overall"]["refusal_rate"]
    assert (rate["value"], rate["n"], rate["n_unscored"]) == (0.5, 2, 1)
    assert metrics["unscored"]["reasons"] == {"unfinished reasoning": 1}
    assert "unfinished reasoning: 1" in " ".join(capsys.readouterr().out.split())


def test_labels_are_compared_with_answers(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(
        f"prompt,response,label\na,<think>{NO}</think>{YES},5\nb,<think>{YES}</think>{NO},1\nc,{YES}</think>{NO},1\n"
    )
    options = ["--labels", str(path), "--cache_path", str(tmp_path / "c.sqlite"), "--output_dir", str(tmp_path / "out")]
    metrics = judge_check(["--judge", "rules", *options])
    assert metrics["judges"]["rules"]["safe_or_unsafe"]["accuracy"]["value"] == 1.0


def test_responses_keep_their_reasoning() -> None:
    with StubServer(lambda _: f"<think>{NO}</think>{YES}") as server:
        backend = OpenAIBackend(server.base_url, "stub")
        (completion,) = respond(backend, [PROMPT], Sampling(), progress=False)
        backend.close()
    assert completion.text == f"<think>{NO}</think>{YES}"


def test_special_tokens_that_mark_reasoning_are_told_from_others() -> None:
    assert marks_of(["<s>", "</s>", "[INST]", "[THINK]", "[/THINK]"]) == {"[THINK]", "[/THINK]"}
    assert marks_of(["<bos>", "<|channel>", "<channel|>", "<turn|>"]) == {"<|channel>", "<channel|>"}
    assert marks_of(["<|end|>", "<|user|>"]) == set()  # a turn's end
    assert marks_of(["<|return|>", "<|channel|>", "<|message|>", "<|end|>"]) == {
        "<|channel|>",
        "<|message|>",
        "<|end|>",
    }


def test_an_opening_is_what_a_prompt_ends_with() -> None:
    assert opening_of("<|im_start|>assistant\n<think>\n") == "<think>\n"
    assert opening_of("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert opening_of("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n") == ""


def test_models_in_this_process_keep_the_marks_of_reasoning_and_begin_with_its_opening() -> None:
    base = resolve_testbed(None).model_path
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "[INST]"]})
    model.resize_token_embeddings(len(tokenizer))
    text = "[INST] [THINK] how [/THINK] the"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer_of(decode_response(tokenizer, tokens)) == "the"
    (_, plain), *_ = HFBackend.of(model, tokenizer).complete([PROMPT.messages], Sampling(max_new_tokens=4))
    tokenizer.chat_template += "<think>"
    (_, opened), *_ = HFBackend.of(model, tokenizer).complete([PROMPT.messages], Sampling(max_new_tokens=4))
    assert plain.text is not None
    assert opened.text is not None
    assert "<think>" not in plain.text
    assert opened.text.startswith("<think>")
    assert answer_of(opened.text) is None


def test_lm_eval_scores_the_answer_and_unfinished_reasoning_is_counted() -> None:
    texts = {"a <think>\n": f"{NO}</think>{YES}", "b": f"<think>{NO}</think>{YES}", "c": f"<think>{YES}", "d": YES}
    lm = SimpleNamespace(generate_until=lambda requests: [texts[request.args[0]] for request in requests])
    counted = give_answers(lm)
    assert lm.generate_until([SimpleNamespace(args=(prompt, {})) for prompt in texts]) == [YES, YES, "", YES]
    assert counted == {"n_unfinished_reasoning": 1}
