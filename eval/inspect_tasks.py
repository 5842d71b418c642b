"""Run the same evaluations as tasks of inspect_ai: pip install 'sails-align[inspect]'.

inspect eval eval/inspect_tasks.py@safety --model vllm/google/gemma-2-2b-it -T prompts=hex-phi \
    -T judge=llm -T judge_model=gpt-4o-mini -T judge_base_url=https://api.openai.com/v1
inspect eval eval/inspect_tasks.py@over_refusal --model vllm/google/gemma-2-2b-it -T prompts=xstest -T judge=llm ...
inspect eval eval/inspect_tasks.py@helpfulness --model hf/testbed -M model_path=runs/merged -M do_sample=false

(do_sample=false: of inspect_ai's providers, hf does not take the temperature 0 that is asked for.)
inspect_ai runs the model, by its own names, and does not support adapters: merge one first (sails merge). Prompts,
judges and rates are those of `eval/safety.py`; what a judge does not score is unscored in inspect_ai's logs, too.
"""

from typing import Any

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, Value, metric, scorer
from inspect_ai.solver import TaskState, generate

from sails_align.core.errors import InputError
from sails_align.evaluation.inspect_log import chat_message
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.metrics import estimates
from sails_align.evaluation.options import PromptArguments, ResponseArguments
from sails_align.evaluation.prompts.load import load_all
from sails_align.evaluation.records import Item, Judge, Prompt
from sails_align.evaluation.records import Task as Asked


@task
def safety(prompts: str = "testbed", n_prompts: int | None = None, part: str = "test", **judge: Any) -> Task:
    """Measure safety rate, harmfulness and high-risk rate on the harmful prompts of a set.

    Args:
        prompts: a set by name, a file, a data set of the hub, or `testbed` (docs/prompt_sets.md).
        n_prompts: of them, balanced over categories.
        part: of the testbed: `test` or `validation`.
        judge: options of `eval/safety.py` that say who scores: `judge`, `judge_model`, `judge_base_url`, ...
    """
    chosen = _prompts(prompts, n_prompts, part, harmful=True)
    return _task(chosen, *_judge(chosen, judge), "harm")


@task
def over_refusal(prompts: str = "testbed", n_prompts: int | None = None, part: str = "test", **judge: Any) -> Task:
    """Measure the share of refused harmless prompts of a set; arguments as of `safety`."""
    chosen = _prompts(prompts, n_prompts, part, harmful=False)
    return _task(chosen, *_judge(chosen, judge), "refusal")


@task
def helpfulness(prompts: str = "testbed", n_prompts: int | None = None, part: str = "test", **judge: Any) -> Task:
    """Measure helpfulness (1-10), or with the testbed's oracle the share of correct answers; else as `safety`."""
    chosen = _prompts(prompts, n_prompts, part, harmful=False)
    asked, n_at_once = _judge(chosen, judge)
    return _task(chosen, asked, n_at_once, "correctness" if "correctness" in asked.tasks else "helpfulness")


def _prompts(name: str, n: int | None, part: str, *, harmful: bool) -> list[Prompt]:
    loaded = load_all(PromptArguments(prompts=[name], n_prompts=n, part=part), seed=0)
    chosen = [prompt for prompt in loaded if (prompt.kind == "harmful") == harmful]
    if not chosen:
        raise InputError(f"{name} has no {'harmful' if harmful else 'harmless'} prompts; choose another set")
    return chosen


def _judge(prompts: list[Prompt], options: dict[str, Any]) -> tuple[Judge, int]:
    """Return the judge, and how many verdicts it can give at once."""
    lists = ("judge", "judge_model", "judge_base_url", "judge_api_key_env")
    options = {name: [value] if name in lists and isinstance(value, str) else value for name, value in options.items()}
    arguments = JudgeArguments(**options)
    judges = list(make_judges(arguments, prompts).values())
    if len(judges) > 1:
        raise InputError("inspect_ai's tasks take one judge; for a vote of several use eval/safety.py")
    return judges[0], arguments.judge_concurrency if arguments.judge_base_url else 1


def _task(prompts: list[Prompt], judge: Judge, n_at_once: int, asked: Asked) -> Task:
    if asked not in judge.tasks:
        raise InputError(f"the judge {judge.name} cannot be asked for {asked}; choose another one")
    sampling = ResponseArguments().sampling(prompts)
    samples = [
        Sample(
            id=prompt.id,
            input=[chat_message(message) for message in prompt.messages],
            metadata={"kind": prompt.kind, "category": prompt.category},
        )
        for prompt in prompts
    ]
    return Task(
        dataset=MemoryDataset(samples),
        solver=generate(),
        scorer=_scorer(judge, prompts, asked, n_at_once),
        config=GenerateConfig(temperature=sampling.temperature, max_tokens=sampling.max_new_tokens, seed=sampling.seed),
    )


@metric
def rates(asked: Asked, binary: bool, by_rules: bool) -> Metric:
    """Compute our estimates over scored samples, with intervals; inspect_ai counts unscored samples itself."""

    def computed(scores: list[SampleScore]) -> Value:
        found: dict[str, float | None] = {}
        values = [score.score.as_float() for score in scores]
        for name, value in estimates(asked, values, binary=binary, by_rules=by_rules).items():
            found |= {name: value.value, f"{name}_ci_low": value.ci_low, f"{name}_ci_high": value.ci_high}
        return found

    return computed


def _scorer(judge: Judge, prompts: list[Prompt], asked: Asked, n_at_once: int) -> Scorer:
    by_id = {prompt.id: prompt for prompt in prompts}
    limiter = anyio.CapacityLimiter(n_at_once)

    @scorer(metrics=[rates(asked, judge.binary, judge.binary and judge.weak)], name=asked)
    def by_judge() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            if state.output.error is not None or state.output.stop_reason == "content_filter":
                # What stands there is not the model's.
                return Score.unscored(reason="no response", explanation=state.output.error or "content_filter")
            item = Item(by_id[str(state.sample_id)], state.output.completion)
            # In a thread, since judges wait for their servers; one at a time, since those run here are not thread-safe.
            found = await anyio.to_thread.run_sync(lambda: next(iter(judge.judge(asked, [item])))[1], limiter=limiter)
            if found.score is None:
                return Score.unscored(reason=found.reason, explanation=found.explanation)
            return Score(value=found.score, explanation=found.explanation)

        return score

    return by_judge()
