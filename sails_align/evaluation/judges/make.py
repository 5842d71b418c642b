"""Make judges of options."""

from collections import Counter
from collections.abc import Sequence

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.make import in_process
from sails_align.evaluation.judges import JUDGES, WITH_MODEL
from sails_align.evaluation.judges.options import HERE, JudgeArguments
from sails_align.evaluation.prompts import is_of_testbed
from sails_align.evaluation.records import Backend, Judge, Prompt
from sails_align.models.resolve import resolve_model


def make_judges(who: JudgeArguments, prompts: Sequence[Prompt]) -> dict[str, Judge]:
    """Make the judges by name, whose models are loaded when they are first asked something.

    Raises:
        InputError: if none is named and the prompts are not the testbed's, or one's model cannot be used.
    """
    names = who.judge
    if not names:
        if not is_of_testbed(prompts):
            raise InputError(
                "no judge is given; give --judge llm or guard, with --judge_model;\n"
                "--judge rules needs no model, but looks for refusal phrases only"
            )
        names = ["oracle"]
    made: dict[str, Judge] = {}
    times, n_models = Counter(names), 0
    for name in names:
        if name not in WITH_MODEL:
            made[name] = JUDGES.get(name).load()()
            continue
        assert who.judge_model is not None
        model = who.judge_model[n_models]
        called = name if times[name] == 1 else f"{name}:{model}"
        if called in made:
            raise InputError(f"the judge {called} is given twice; give each model once")
        made[called] = _with_model(who, name, model, n_models)
        n_models += 1
    return made


def _with_model(who: JudgeArguments, kind: str, model: str, place: int) -> Judge:
    backend = _backend(who, model, place)
    if kind == "llm":
        from sails_align.evaluation.judges.llm import LlmJudge

        return LlmJudge(backend, max_new_tokens=who.judge_max_new_tokens)
    from sails_align.evaluation.judges.guard import GuardJudge, guess_family

    return GuardJudge(backend, who.guard_family or guess_family(model))


def _backend(who: JudgeArguments, model: str, place: int) -> Backend:
    base_url = _each(who.judge_base_url or [HERE], place)
    if base_url == HERE:
        return in_process(resolve_model(model), who.judge_backend)
    from sails_align.evaluation.backends.openai import OpenAIBackend

    key = _each(who.judge_api_key_env, place)
    options = {"api_key_env": key, "concurrency": who.judge_concurrency, "timeout": who.judge_timeout}
    return OpenAIBackend(base_url, model, **options)


def _each(values: Sequence[str], place: int) -> str:
    return values[0] if len(values) == 1 else values[place]
