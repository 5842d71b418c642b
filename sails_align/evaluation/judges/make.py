"""Make judges of options."""

from collections.abc import Sequence

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.make import in_process
from sails_align.evaluation.judges import JUDGES, WITH_MODEL
from sails_align.evaluation.judges.options import HERE, JudgeArguments
from sails_align.evaluation.prompts import is_of_testbed
from sails_align.evaluation.records import Backend, Judge, Prompt
from sails_align.models.resolve import resolve_model


def make_judges(who: JudgeArguments, prompts: Sequence[Prompt]) -> dict[str, Judge]:
    """Make judges by name. Their models are loaded when they are first used.

    Raises `InputError` if no judge is given and the prompts are not the testbed's, or a model cannot be used.
    """
    if who.judge:
        return {name: _make(who, kind, place) for name, (kind, place) in who.judges().items()}
    if is_of_testbed(prompts):
        return {"oracle": JUDGES.get("oracle").load()()}
    raise InputError(
        "no judge is given; give --judge llm or guard, with --judge_model;\n"
        "--judge rules needs no model, but looks for refusal phrases only"
    )


def _make(who: JudgeArguments, kind: str, place: int) -> Judge:
    judge = JUDGES.get(kind).load()
    if kind not in WITH_MODEL:
        return judge()
    assert who.judge_model is not None
    model = who.judge_model[place]
    backend = _backend(who, model, place)
    if kind == "llm":
        return judge(backend, max_new_tokens=who.judge_max_new_tokens)
    from sails_align.evaluation.judges.guard import guess_family

    return judge(backend, who.guard_family or guess_family(model))


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
