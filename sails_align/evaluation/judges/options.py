"""The options that say who scores: judges by kind, each with a model and a server of its own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sails_align.core.errors import InputError
from sails_align.core.options import check_choice, check_least
from sails_align.evaluation.judges.guard import GuardJudge, guess_family
from sails_align.evaluation.judges.llm import LlmJudge
from sails_align.evaluation.judges.rules import RulesJudge
from sails_align.evaluation.model import resolve_model
from sails_align.evaluation.options import BACKENDS, in_process
from sails_align.evaluation.records import Backend, Judge, Prompt
from sails_align.testbed.judge import OracleJudge

JUDGES = ("oracle", "llm", "guard", "rules")
WITH_MODEL = ("llm", "guard")
HERE = "none"
"""In place of a server's URL: the model is run in this process."""


@dataclass
class JudgeArguments:
    """Who scores."""

    judge: list[str] | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(JUDGES)}; several of them vote. Default: oracle, if all prompts are the testbed's."
        },
    )
    judge_model: list[str] | None = field(
        default=None,
        metadata={"help": "Of each llm and guard in turn: what the server calls it, a folder or a hub id."},
    )
    judge_backend: str = field(
        default="hf", metadata={"help": "hf or vllm, for judges' models without a --judge_base_url."}
    )
    judge_base_url: list[str] | None = field(
        default=None,
        metadata={"help": f"Of the judge's server; one for all models, or one for each, `{HERE}` for those run here."},
    )
    judge_api_key_env: list[str] = field(
        default_factory=lambda: ["OPENAI_API_KEY"],
        metadata={"help": "The environment variable that has the server's key; one for all models, or one for each."},
    )
    judge_concurrency: int = field(default=16, metadata={"help": "Requests to a server at the same time."})
    judge_max_new_tokens: int = field(default=512, metadata={"help": "Of an llm's answer; reasoning counts."})
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for an answer of a server."})
    guard_family: str | None = field(
        default=None, metadata={"help": "Whose prompt format a guard has; default: what --judge_model's name says."}
    )

    def __post_init__(self) -> None:
        for name in self.judge or ():
            check_choice("judge", name, JUDGES)
        if self.judge == []:
            raise InputError(f"judge is empty; choose among {', '.join(JUDGES)}, or leave it out")
        twice = [name for name, times in Counter(self.judge).items() if times > 1 and name not in WITH_MODEL]
        if twice:
            raise InputError(f"the judge {twice[0]} is given twice; give it once")
        if self.guard_family is not None and "guard" not in (self.judge or ()):
            raise InputError("guard_family is given, but no judge is a guard; give --judge guard, or leave it out")
        check_choice("judge_backend", self.judge_backend, tuple(name for name in BACKENDS if name != "openai"))
        check_least(self, judge_concurrency=1, judge_max_new_tokens=1, judge_timeout=1)
        kinds, models = self._kinds(), self.judge_model or []
        if len(kinds) != len(models):
            asked = ", ".join(self.judge or ["no judge"])
            raise InputError(
                f"{asked} is given, and {len(models)} --judge_model ({', '.join(models) or 'none'});\n"
                "give a model for each llm and each guard, in their order (and --judge_base_url for a server)"
            )
        for option in ("judge_base_url", "judge_api_key_env"):
            values = getattr(self, option) or []
            if len(values) not in (0, 1, len(models)):
                raise InputError(
                    f"{option} has {len(values)} values for {len(models)} models; give one for all, or one for each"
                )

    def _kinds(self) -> list[str]:
        """Of the judges that have models."""
        return [name for name in self.judge or () if name in WITH_MODEL]

    def make(self, prompts: Sequence[Prompt]) -> dict[str, Judge]:
        """The judges by name, whose models are loaded when they are first asked something.

        Raises:
            InputError: if none is named and the prompts are not the testbed's, or one's model cannot be used.
        """
        names = self.judge
        if not names:
            if not all("testbed" in prompt.meta for prompt in prompts):
                raise InputError(
                    "who is to judge the responses? give --judge llm or guard, with --judge_model;\n"
                    "--judge rules needs no model, but looks for refusal phrases only"
                )
            names = ["oracle"]
        made: dict[str, Judge] = {}
        times, n_models = Counter(names), 0
        for name in names:
            if name not in WITH_MODEL:
                made[name] = OracleJudge() if name == "oracle" else RulesJudge()
                continue
            assert self.judge_model is not None
            model = self.judge_model[n_models]
            called = name if times[name] == 1 else f"{name}:{model}"
            if called in made:
                raise InputError(f"the judge {called} is given twice; give each model once")
            made[called] = self._with_model(name, model, n_models)
            n_models += 1
        return made

    def _with_model(self, kind: str, model: str, place: int) -> Judge:
        backend = self._backend(model, place)
        if kind == "llm":
            return LlmJudge(backend, max_new_tokens=self.judge_max_new_tokens)
        return GuardJudge(backend, self.guard_family or guess_family(model))

    def _backend(self, model: str, place: int) -> Backend:
        base_url = _each(self.judge_base_url or [HERE], place)
        if base_url == HERE:
            return in_process(resolve_model(model), self.judge_backend)
        from sails_align.evaluation.backends.openai import OpenAIBackend

        key = _each(self.judge_api_key_env, place)
        options = {"api_key_env": key, "concurrency": self.judge_concurrency, "timeout": self.judge_timeout}
        return OpenAIBackend(base_url, model, **options)


def _each(values: Sequence[str], place: int) -> str:
    return values[0] if len(values) == 1 else values[place]
