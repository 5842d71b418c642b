"""Options of judges: their kinds, models and servers."""

from dataclasses import dataclass, field

from sails_align.core.errors import InputError
from sails_align.core.options import check_choice, check_least, option
from sails_align.evaluation.backends import BACKENDS
from sails_align.evaluation.judges import JUDGES, WITH_MODEL

HERE = "none"
"""Stands for the URL of a server if the model runs in this process."""


@dataclass(frozen=True)
class JudgeArguments:
    """Judges."""

    judge: list[str] | None = option(
        None,
        f"Judges: {', '.join(JUDGES.names())}; several of them vote. Default: oracle, if all prompts are "
        "the testbed's.",
    )
    judge_model: list[str] | None = option(
        None, "Model of each llm and guard, in their order: its name on the server, a folder or a hub id."
    )
    judge_backend: str = option("hf", "Backend for judges without a --judge_base_url: hf or vllm.")
    judge_base_url: list[str] | None = option(
        None,
        f"URL of the judge's server: one for all models, or one for each (`{HERE}` for a model "
        "that runs in this process).",
    )
    judge_api_key_env: list[str] = field(
        default_factory=lambda: ["OPENAI_API_KEY"],
        metadata={"help": "Environment variable that holds the server's API key: one for all models, or one for each."},
    )
    judge_concurrency: int = option(16, "Number of parallel requests to a server.")
    judge_max_new_tokens: int = option(512, "Maximum length of an llm judge's answer in tokens, including reasoning.")
    judge_timeout: float = option(120.0, "Time-out for a response of a server, in seconds.")
    guard_family: str | None = option(None, "Prompt format of a guard model; default: from the name in --judge_model.")

    def __post_init__(self) -> None:
        for name in self.judge or ():
            check_choice("judge", name, JUDGES.names())
        if self.judge == []:
            raise InputError(f"judge is empty; choose among {', '.join(JUDGES.names())}, or leave it out")
        if self.guard_family is not None and "guard" not in (self.judge or ()):
            raise InputError("guard_family is given, but no judge is a guard; give --judge guard, or leave it out")
        check_choice("judge_backend", self.judge_backend, tuple(name for name in BACKENDS.names() if name != "openai"))
        check_least(self, judge_concurrency=1, judge_max_new_tokens=1, judge_timeout=1)
        models = self.judge_model or []
        if sum(kind in WITH_MODEL for kind in self.judge or ()) != len(models):
            asked = ", ".join(self.judge or ["no judge"])
            raise InputError(
                f"{asked} is given, and {len(models)} --judge_model ({', '.join(models) or 'none'});\n"
                "give a model for each llm and each guard, in their order (and --judge_base_url for a server)"
            )
        for name in ("judge_base_url", "judge_api_key_env"):
            values = getattr(self, name) or []
            if len(values) not in (0, 1, len(models)):
                raise InputError(
                    f"{name} has {len(values)} values for {len(models)} models; give one for all, or one for each"
                )
        self.judges()

    def judges(self) -> dict[str, tuple[str, int]]:
        """Return each judge's kind and the place of its model, by a name that tells two judges of a kind apart.

        Raises `InputError` if two judges are the same.
        """
        kinds, models = self.judge or [], self.judge_model or []
        found: dict[str, tuple[str, int]] = {}
        place = 0
        for kind in kinds:
            name = f"{kind}:{models[place]}" if kind in WITH_MODEL and kinds.count(kind) > 1 else kind
            if name in found:
                raise InputError(f"the judge {name} is given twice; give each judge once")
            found[name] = (kind, place)
            place += kind in WITH_MODEL
        return found


@dataclass(frozen=True)
class LabelArguments:
    """Labels."""

    labels: str = option(
        "oracle",
        "A csv or jsonl file of prompt, response and label (1-5, safe/unsafe, or refusal/compliance; also XSTest's "
        "completions and Do-Not-Answer as published); `oracle`: answers on the testbed; `attacks`: such answers with "
        "attempts to manipulate the judge.",
    )
    label_column: str | None = option(None, "Column of the labels. Default: label, or as in the known files.")
    n_labels: int = option(100, "Number of testbed answers for --labels oracle and (about as many) attacks.")
    on_bad_rows: str = option("error", "Rows of the file that cannot be read: error, or skip (counted).")

    def __post_init__(self) -> None:
        check_choice("on_bad_rows", self.on_bad_rows, ("error", "skip"))
        check_least(self, n_labels=1)
