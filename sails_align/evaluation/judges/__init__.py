"""Score responses. Each entry is a judge (`records.Judge`); `make` makes judges of options.

The testbed registers its oracle here.
"""

from sails_align.core.registry import Entry, Registry

JUDGES = Registry(
    "judge",
    {
        "llm": Entry("sails_align.evaluation.judges.llm:LlmJudge", "An instruction-tuned model with a rubric."),
        "guard": Entry("sails_align.evaluation.judges.guard:GuardJudge", "A classifier of harm, such as Llama Guard."),
        "rouge": Entry("sails_align.evaluation.judges.rouge:RougeJudge", "Words in common with --reference (ROUGE-L)."),
        "rules": Entry("sails_align.evaluation.judges.rules:RulesJudge", "Refusal phrases: fast and free, but weak."),
    },
)
WITH_MODEL = ("llm", "guard")
"""Judges that run a model; the others have no options."""
