"""Define the known prompt sets: the source of each, its columns, and the kind of its prompts."""

from sails_align.core.registry import Registry
from sails_align.evaluation.prompts import published
from sails_align.evaluation.prompts.definitions import COLUMNS, Columns, PromptSet, PromptSource, Subset
from sails_align.evaluation.records import Kind

# -- sources ----------------------------------------------------------------------------------------------------------


def _first(role: str, *names: str) -> Columns:
    """Return the usual columns, with these first for a role."""
    return {**COLUMNS, role: (*names, *COLUMNS[role])}


_ADVBENCH = PromptSource("walledai/AdvBench", "MIT", "Zou et al. 2023, arXiv 2307.15043", gated=True)
_ALPACA_EVAL = PromptSource("tatsu-lab/alpaca_eval", "CC BY-NC 4.0", "Li et al. 2023, github.com/tatsu-lab/alpaca_eval")
_ARTIFACTS = PromptSource(
    None, "MIT", "Chao et al. 2024, arXiv 2404.01318", home="https://github.com/JailbreakBench/artifacts"
)
_BEAVERTAILS = PromptSource("PKU-Alignment/BeaverTails-Evaluation", "CC BY-NC 4.0", "Ji et al. 2023, arXiv 2307.04657")
_CATQA = PromptSource("declare-lab/CategoricalHarmfulQA", "Apache 2.0", "Bhardwaj et al. 2024, arXiv 2402.11746")
_COCONOT = PromptSource("allenai/coconot", "ODC-BY", "Brahman et al. 2024, arXiv 2407.12043")
_DO_NOT_ANSWER = PromptSource(
    "LibrAI/do-not-answer", "Apache 2.0 (its card also: CC BY-NC-SA 4.0)", "Wang et al. 2023, arXiv 2308.13387"
)
_HARMBENCH = PromptSource("walledai/HarmBench", "MIT", "Mazeika et al. 2024, arXiv 2402.04249", gated=True)
_HARMFULQA = PromptSource("declare-lab/HarmfulQA", "Apache 2.0", "Bhardwaj and Poria 2023, arXiv 2308.09662")
_HEX_PHI = PromptSource("LLM-Tuning-Safety/HEx-PHI", "HEx-PHI licence", "Qi et al. 2023, arXiv 2310.03693", gated=True)
_HH_RLHF = PromptSource("Anthropic/hh-rlhf", "MIT", "Bai et al. 2022, arXiv 2204.05862")
_I_CONA = PromptSource(
    None, "CC BY-NC 4.0", "Bianchi et al. 2024, arXiv 2309.07875", home="https://github.com/vinid/safety-tuned-llamas"
)
_JAILBREAKBENCH = PromptSource("JailbreakBench/JBB-Behaviors", "MIT", "Chao et al. 2024, arXiv 2404.01318")
_MALICIOUS = PromptSource("walledai/MaliciousInstruct", "CC BY-SA 4.0", "Huang et al. 2023, arXiv 2310.06987")
_MT_BENCH = PromptSource("HuggingFaceH4/mt_bench_prompts", "Apache 2.0", "Zheng et al. 2023, arXiv 2306.05685")
_OR_BENCH = PromptSource("bench-llm/or-bench", "CC BY 4.0", "Cui et al. 2024, arXiv 2405.20947")
_SAFE_RLHF = PromptSource("PKU-Alignment/PKU-SafeRLHF", "CC BY-NC 4.0", "Ji et al. 2024, arXiv 2406.15513")
_SALAD = PromptSource("OpenSafetyLab/Salad-Data", "Apache 2.0", "Li et al. 2024, arXiv 2402.05044")
_SIMPLE = PromptSource("Bertievidgen/SimpleSafetyTests", "CC BY 2.0", "Vidgen et al. 2023, arXiv 2311.08370")
_SORRY_BENCH = PromptSource(
    "sorry-bench/sorry-bench-202503", "SORRY-Bench licence", "Xie et al. 2024, arXiv 2406.14598", gated=True
)
_STRONGREJECT = PromptSource("walledai/StrongREJECT", "MIT", "Souly et al. 2024, arXiv 2402.10260", gated=True)
_TOXICCHAT = PromptSource("lmsys/toxic-chat", "CC BY-NC 4.0", "Lin et al. 2023, arXiv 2310.17389")
_WILDGUARD = PromptSource("allenai/wildguardmix", "ODC-BY", "Han et al. 2024, arXiv 2406.18495", gated=True)
_WILDJAILBREAK = PromptSource("allenai/wildjailbreak", "ODC-BY", "Jiang et al. 2024, arXiv 2406.18510", gated=True)
_XSTEST = PromptSource("natolambert/xstest-v2-copy", "CC BY 4.0", "Röttger et al. 2023, arXiv 2308.01263")

# -- tables and columns -----------------------------------------------------------------------------------------------

_HEX_PHI_SUBSET = Subset("harmful", pattern="category_*.csv", category=published.hex_phi_category, header=("prompt",))
_SIMPLE_SUBSET = Subset("harmful", pattern="sst_test_cases.csv")  # `datasets` takes "test" in its name for the split
_ALPACA_SUBSET = Subset("benign", pattern="alpaca_eval.json")  # the repository has a script, which is never run
_ARTIFACTS_SUBSET = Subset("harmful", pattern="**/*.json", unpack=published.artifacts)
_SORRY_SUBSET = Subset(
    "harmful", pattern="question.jsonl", row=published.only("prompt_style", "base", "")
)  # beside its mutations
_WILDJAILBREAK_SUBSET = Subset(
    published.wildjailbreak_kind, pattern="eval/eval.tsv", row=published.wildjailbreak_row
)  # not a csv to the hub
_HARMLESS, _HELPFUL = "harmless-base/test.jsonl.gz", "helpful-base/test.jsonl.gz"
_HH_PARTS = (
    Subset("harmful", pattern=_HARMLESS, word="harmless", category="harmless"),
    Subset("benign", pattern=_HELPFUL, word="helpful", category="helpful"),
)
_HARMBENCH_COLUMNS = frozenset({"behavior", "functionalcategory", "semanticcategory", "contextstring", "behaviorid"})
_JBB_COLUMNS = frozenset({"goal", "target", "behavior", "category", "source"})
_COCONOT_COLUMNS = frozenset({"id", "category", "subcategory", "prompt"})
_TAXONOMY = frozenset({"1-category", "2-category", "3-category"})


def _harmbench(category: str) -> tuple[Subset]:
    return (Subset("harmful", config=category, row=published.only("functionalcategory", category)),)


def _jailbreakbench(kind: Kind) -> tuple[Subset]:
    return (Subset(kind, config="behaviors", split=kind),)


_SETS = (
    PromptSet("hex-phi", _HEX_PHI, (_HEX_PHI_SUBSET,), counts=(300, 330)),
    PromptSet("advbench", _ADVBENCH, (Subset("harmful"),), counts=(520,), signature=frozenset({"goal", "target"})),
    PromptSet(
        "harmbench", _HARMBENCH, _harmbench("standard"), counts=(200,), signature=_HARMBENCH_COLUMNS, word="standard",
        refuse=published.not_standard,
    ),
    PromptSet(
        "harmbench-contextual", _HARMBENCH, _harmbench("contextual"), counts=(100,), signature=_HARMBENCH_COLUMNS,
        word="contextual", refuse=published.not_contextual,
    ),
    PromptSet(
        "harmbench-copyright", _HARMBENCH, _harmbench("copyright"), counts=(100,), signature=_HARMBENCH_COLUMNS,
        word="copyright", refuse=published.not_copyright,
    ),
    PromptSet(
        "jailbreakbench", _JAILBREAKBENCH, _jailbreakbench("harmful"), counts=(100,), signature=_JBB_COLUMNS,
        word="harmful", refuse=published.not_harmful,
    ),
    PromptSet(
        "jailbreakbench-benign", _JAILBREAKBENCH, _jailbreakbench("benign"), counts=(100,), signature=_JBB_COLUMNS,
        word="benign", refuse=published.not_benign,
    ),
    PromptSet(
        "jailbreakbench-artifacts", _ARTIFACTS, (_ARTIFACTS_SUBSET,), signature=frozenset({"parameters", "jailbreaks"})
    ),
    PromptSet(
        "strongreject", _STRONGREJECT, (Subset("harmful"),), counts=(313,),
        signature=frozenset({"category", "source", "forbidden_prompt"}),
    ),
    PromptSet(
        "sorry-bench", _SORRY_BENCH, (_SORRY_SUBSET,), _first("id", "question_id"), counts=(440, 450),
        signature=frozenset({"question_id", "category", "turns", "prompt_style"}),
    ),
    PromptSet("malicious-instruct", _MALICIOUS, (Subset("harmful"),), counts=(100,)),
    PromptSet(
        "beavertails-evaluation", _BEAVERTAILS, (Subset("harmful", split="test"),), counts=(700,),
        signature=frozenset({"prompt", "category", "category_id"}), refuse=published.not_evaluation,
    ),
    PromptSet(
        "pku-saferlhf", _SAFE_RLHF, (Subset("harmful", config="default", split="test"),),
        signature=frozenset({"prompt", "response_0", "response_1", "safer_response_id"}),
    ),
    PromptSet(
        "salad-bench", _SALAD, (Subset("harmful", config="base_set"),),
        {**_first("id", "qid"), "category": ("1-category",)}, signature=_TAXONOMY | {"question"}, word="base",
    ),
    PromptSet(
        "salad-bench-attack", _SALAD, (Subset("harmful", config="attack_enhanced_set"),),
        {**_first("id", "aid"), "prompt": ("augq",), "category": ("1-category",)},
        signature=_TAXONOMY | {"augq", "baseq"}, word="attack",
    ),
    PromptSet(
        "catqa", _CATQA, (Subset("harmful", split="en", unpack=published.nested("category", "subcategory")),),
        counts=(550,),
        signature=frozenset({"question", "category", "subcategory"}), refuse=published.not_catqa,
    ),
    PromptSet(
        "harmfulqa", _HARMFULQA, (Subset("harmful", unpack=published.nested("topic", "subtopic")),),
        _first("category", "topic"), counts=(1960,),
        signature=frozenset({"question", "topic", "subtopic"}), refuse=published.not_harmfulqa,
    ),
    PromptSet(
        "i-cona", _I_CONA, (Subset("harmful", pattern="**/I-CoNa.json", unpack=published.instructions),), counts=(178,),
        signature=frozenset({"instructions", "inputs"}), refuse=published.not_i_cona,
    ),
    PromptSet(
        "wildguardtest", _WILDGUARD, (Subset(published.wildguard_kind, config="wildguardtest", split="test"),),
        _first("category", "subcategory"), counts=(1725,),
        signature=frozenset({"prompt", "adversarial", "prompt_harm_label", "response_harm_label"}),
    ),
    PromptSet(
        "wildjailbreak", _WILDJAILBREAK, (_WILDJAILBREAK_SUBSET,), counts=(2210,),
        signature=frozenset({"adversarial", "data_type"}),
    ),
    PromptSet(
        "toxicchat", _TOXICCHAT, (Subset(published.toxicchat_kind, config="toxicchat0124", split="test"),),
        _first("id", "conv_id"), counts=(5083,), signature=frozenset({"user_input", "toxicity", "jailbreaking"}),
    ),
    PromptSet(
        "xstest", _XSTEST, (Subset(published.xstest_kind, split="prompts"),), _first("category", "type"), counts=(450,),
        signature=frozenset({"prompt", "type", "focus", "note"}),
    ),
    PromptSet("or-bench", _OR_BENCH, (Subset("dual_use", config="or-bench-80k"),), word="80k"),
    PromptSet(
        "or-bench-hard", _OR_BENCH, (Subset("dual_use", config="or-bench-hard-1k"),), counts=(1319,), word="hard"
    ),
    PromptSet("or-bench-toxic", _OR_BENCH, (Subset("harmful", config="or-bench-toxic"),), counts=(655,), word="toxic"),
    PromptSet(
        "simple-safety-tests", _SIMPLE, (_SIMPLE_SUBSET,), _first("category", "harm_area"), counts=(100,),
        signature=frozenset({"harm_area", "prompts_final"}),
    ),
    PromptSet(
        "do-not-answer", _DO_NOT_ANSWER, (Subset("harmful"),), _first("category", "risk_area"), counts=(939,),
        signature=frozenset({"risk_area", "types_of_harm", "question"}),
    ),
    PromptSet(
        "coconot", _COCONOT, (Subset("harmful", config="original", split="test"),), counts=(1001,),
        signature=_COCONOT_COLUMNS | {"response"}, word="original", refuse=published.not_original,
    ),
    PromptSet(
        "coconot-contrast", _COCONOT, (Subset("dual_use", config="contrast", split="test"),), counts=(379,),
        signature=_COCONOT_COLUMNS | {"response"}, word="contrast", refuse=published.not_contrast,
    ),
    PromptSet(
        "coconot-pref", _COCONOT, (Subset("dual_use", config="pref"),), _first("reference", "chosen"), counts=(927,),
        signature=_COCONOT_COLUMNS | {"chosen", "rejected"}, word="pref",
    ),
    PromptSet("hh-rlhf", _HH_RLHF, _HH_PARTS, counts=(4666, 2312, 2354)),  # both files, or one of them
    PromptSet(
        "alpaca-eval", _ALPACA_EVAL, (_ALPACA_SUBSET,), {**_first("reference", "output"), "category": ("dataset",)},
        counts=(805,), signature=frozenset({"dataset", "instruction", "output", "generator"}),
    ),
    PromptSet(
        "mt-bench", _MT_BENCH, (Subset("benign"),), _first("id", "prompt_id", "question_id"), counts=(80,),
        signature=frozenset({"question_id", "category", "turns"}),
    ),
)  # fmt: skip
PROMPT_SETS = Registry("prompt set", {known.name: known for known in _SETS})


def find_set(name: str) -> PromptSet | None:
    """Return the known set of a name, in which case, hyphens and underscores do not matter; None if there is none."""
    return next((known for of_set, known in PROMPT_SETS.items() if _letters(of_set) == _letters(name)), None)


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
