"""The one evaluation, called from Python: nothing is written unless asked for, and results can be looked at."""

from contextlib import contextmanager

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.backends.make import make_backend
from sails_align.evaluation.evaluate import HELPFULNESS, evaluate, evaluate_model
from sails_align.evaluation.inspect_log import INSPECT_FILE, can_write_log
from sails_align.evaluation.judges.rules import RulesJudge
from sails_align.evaluation.options import ResponseArguments
from sails_align.evaluation.records import Completion, Sampling
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.oracle import OracleJudge
from sails_align.testbed.prompts import request_prompts

N = 6


@pytest.fixture(scope="module")
def testbed():
    return resolve_testbed(None)


@pytest.fixture(scope="module")
def prompts(testbed):
    return request_prompts(testbed, "testbed", N)


@pytest.fixture(scope="module")
def answers(testbed, prompts):
    """Of the testbed's base, which helps with everything."""
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path)
    backend = HFBackend.of(model, AutoTokenizer.from_pretrained(testbed.model_path))
    return evaluate(prompts, backend, {"oracle": OracleJudge()}, sampling=Sampling(24), progress=False)


def refusals(prompts):
    responses = [Completion(prompt.meta["request"]["refusal"]) for prompt in prompts]
    return evaluate(prompts, responses, {"oracle": OracleJudge()}, progress=False)


def test_responses_that_are_there_are_judged_as_they_are(prompts):
    result = refusals(prompts)
    overall = result.metrics["overall"]
    assert overall["safety_rate"]["value"] == overall["over_refusal_rate"]["value"] == 1.0
    assert overall["correct_answer_rate"]["value"] == 0.0
    assert result.metrics["by_split"]["ood"]["safety_rate"]["n"] == N
    assert "model" not in result.metrics["provenance"]


def test_a_result_is_told_in_a_few_lines_and_as_a_table(answers, prompts):
    assert "safety rate (%)             0.0 (0.0 to 24.2), n = 12" in repr(answers)
    assert len(repr(answers).splitlines()) < 10
    table = answers.to_pandas()
    assert list(table["id"]) == [prompt.id for prompt in prompts]
    assert table["harm"].count() == 2 * N
    assert table["refusal"].count() == table["correctness"].count() == 2 * N


def test_differences_are_paired_by_prompt(answers, prompts):
    compared = refusals(prompts[::-1]).compare(answers)
    safety = compared.metrics["safety_rate"]
    assert (safety.value, safety.ci_high, safety.n) == (1.0, 1.0, 2 * N)
    assert 0.4 < safety.ci_low < 1.0  # of 12 prompts
    assert compared.metrics["harmfulness"].value == -4.0
    assert "safety rate (%)" in repr(compared)
    same = answers.compare(answers)
    assert all(difference.value == 0 for difference in same.metrics.values())
    with pytest.raises(InputError, match="share no prompt"):
        refusals(prompts[:2]).compare(refusals(prompts[2:4]))


def test_a_judge_that_says_harmful_or_not_has_no_mean_to_compare(prompts, answers):
    by_rules = evaluate(prompts, answers.responses, {"rules": RulesJudge()}, progress=False)
    assert {"refusal_rate", "over_refusal_rate"} == by_rules.metrics["overall"].keys()
    assert by_rules.compare(answers).metrics.keys() == {"over_refusal_rate"}  # the oracle's is a safety rate
    assert "refusal_rate" in by_rules.compare(by_rules).metrics
    assert "refusal rate (%)" in repr(by_rules)


def test_a_refusal_is_called_safe_only_where_others_than_rules_judge(prompts, answers):
    """Of a vote the name is that of all judges together; each judge's own rate has its own name."""
    both = evaluate(prompts, answers.responses, {"rules": RulesJudge(), "oracle": OracleJudge()}, progress=False)
    rates = {name: both.rates(judge=name).keys() & {"safety_rate", "refusal_rate"} for name in both.binary}
    assert rates == {"rules": {"refusal_rate"}, "oracle": {"safety_rate"}, "vote": {"safety_rate"}}
    assert both.rates(judge="rules")["refusal_rate"].value == 0.0  # the base answers everything


def test_files_are_written_if_asked_for(answers, tmp_path):
    answers.save(tmp_path)
    expected = {"responses.jsonl", "verdicts.jsonl", "metrics.json", *([INSPECT_FILE] if can_write_log() else [])}
    assert {path.name for path in tmp_path.iterdir()} == expected


class Silence:
    """Takes away what a model says, but for its first token."""

    def identity(self):
        return {"hook": "silence"}

    @contextmanager
    def __call__(self, model):
        handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0)
        try:
            yield
        finally:
            handle.remove()


def test_a_hook_holds_while_the_model_responds_and_is_part_of_what_it_is(testbed, prompts, answers):
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path).train()
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
    asked = [prompt.messages for prompt in prompts]
    plain, hooked = HFBackend.of(model, tokenizer), HFBackend.of(model, tokenizer, hook=Silence())
    assert plain.identity() != hooked.identity()
    changed = [completion for _, completion in sorted(hooked.complete(asked, Sampling(4)))]
    assert len({completion.text for completion in changed}) == 1
    after = dict(plain.complete(asked, Sampling(24)))
    assert [after[index] for index in range(len(asked))] == list(answers.responses)
    assert model.training


@pytest.mark.parametrize("options", [{"backend": "vllm"}, {"backend": "openai", "base_url": "http://localhost:1/v1"}])
def test_hooks_are_refused_where_they_would_be_ignored(options, prompts):
    with pytest.raises(InputError, match="a hook cannot be applied with backend"):
        make_backend(ResponseArguments(model="m", **options), None, prompts, Silence())


def test_a_model_in_memory_by_the_names_of_prompt_sets(testbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path)
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
    quiet = {"n_prompts": 4, "progress": False}
    result = evaluate_model(model, tokenizer, ["testbed"], **quiet)
    assert result.rates()["safety_rate"].value == 0
    assert not list(tmp_path.iterdir())  # nothing is written
    (tmp_path / "mine.jsonl").write_text('{"prompt": "what is a dopen?"}\n')
    both = evaluate_model(model, tokenizer, ["testbed", "mine.jsonl"], "rules", kind="benign", **quiet)
    assert both.metrics["by_split"]["mine.jsonl"]["over_refusal_rate"]["n"] == 1
    votes = evaluate_model(model, tokenizer, result.prompts, ["rules", OracleJudge()], folder=tmp_path / "run", **quiet)
    assert set(votes.metrics["judges"]) == {"rules", "oracle"}
    assert (tmp_path / "run" / "metrics.json").is_file()
    helpful = evaluate_model(model, tokenizer, "testbed", tasks=HELPFULNESS, **quiet)
    assert helpful.metrics["overall"].keys() == {"correct_answer_rate"}
    with pytest.raises(InputError, match="no judge is given"):
        evaluate_model(model, tokenizer, "mine.jsonl", kind="benign", **quiet)
