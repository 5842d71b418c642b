"""Define the known prompt sets: the source of each, its columns, and the kind of its prompts."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.core.registry import Registry
from sails_align.evaluation.records import Kind

Columns = Mapping[str, tuple[str, ...]]
"""Role -> names of its column in lower case, of which the first one found counts."""
COLUMNS: Columns = {
    "prompt": (
        *("messages", "prompt", "goal", "forbidden_prompt", "instruction", "question", "prompts_final", "behavior"),
        *("conversations", "text"),
    ),
    "category": ("category", "semanticcategory"),
    "kind": ("kind",),
    "target": ("target",),
    "reference": ("reference",),
    "context": ("context", "contextstring"),
    "id": ("id",),
}
"""The columns of any file; the originals of known sets and their copies on the hub differ in them."""


@dataclass(frozen=True)
class Part:
    """Define one table of a set."""

    kind: Kind | Callable[[Mapping[str, Any]], Kind]
    """Of all its prompts, or of a row with lower-case columns."""
    config: str | None = None
    split: str = "train"
    pattern: str | None = None
    """Files in the repository, if `datasets` cannot read the repository itself."""
    word: str = ""
    """Part of the path of a local copy that tells this table from the set's others."""
    category: str | Callable[[Path], str] | None = None
    """Of all its prompts, or of those in a file. None: a column has it, or else it is the set's name."""
    header: tuple[str, ...] | None = None
    """Names of the columns of csv files without a header."""


@dataclass(frozen=True)
class PromptSource:
    """Name the source of a set."""

    hub_id: str
    licence: str
    citation: str
    gated: bool = False
    """Whether the user must accept a licence on the hub first."""

    @property
    def url(self) -> str:
        """The page with the licence."""
        return f"https://huggingface.co/datasets/{self.hub_id}"


@dataclass(frozen=True)
class PromptSet:
    """Define a known prompt set."""

    name: str
    source: PromptSource
    parts: tuple[Part, ...]
    columns: Columns = field(default_factory=lambda: COLUMNS)


HEX_PHI_CATEGORIES = {
    1: "Illegal Activity", 2: "Child Abuse Content", 3: "Hate/Harass/Violence", 4: "Malware", 5: "Physical Harm",
    6: "Economic Harm", 7: "Fraud/Deception", 8: "Adult Content", 9: "Political Campaigning",
    10: "Privacy Violation Activity", 11: "Tailored Financial Advice",
}  # fmt: skip
"""By the number in a file's name. The repository no longer has category 2, so 300 of 330 prompts are left."""


def _hex_phi_category(file: Path) -> str:
    number = re.search(r"\d+", file.stem)
    return HEX_PHI_CATEGORIES.get(int(number[0]), file.stem) if number else file.stem


def _xstest_kind(row: Mapping[str, Any]) -> Kind:
    if row.get("type"):
        return "harmful" if str(row["type"]).startswith("contrast_") else "dual_use"
    if row.get("label") in ("safe", "unsafe"):
        return "harmful" if row["label"] == "unsafe" else "dual_use"
    raise InputError(
        "a row of xstest has neither a type nor a label (safe, unsafe); give a copy that has the column type"
    )


def _first(role: str, *names: str) -> Columns:
    """Return the usual columns, with these first for a role."""
    return {**COLUMNS, role: (*names, *COLUMNS[role])}


_ADVBENCH = PromptSource("walledai/AdvBench", "MIT", "Zou et al. 2023, arXiv 2307.15043", gated=True)
_ALPACA_EVAL = PromptSource("tatsu-lab/alpaca_eval", "CC BY-NC 4.0", "Li et al. 2023, github.com/tatsu-lab/alpaca_eval")
_COCONOT = PromptSource("allenai/coconot", "ODC-BY", "Brahman et al. 2024, arXiv 2407.12043")
_DO_NOT_ANSWER = PromptSource(
    "LibrAI/do-not-answer", "Apache 2.0 (its card also: CC BY-NC-SA 4.0)", "Wang et al. 2023, arXiv 2308.13387"
)
_HARMBENCH = PromptSource("walledai/HarmBench", "MIT", "Mazeika et al. 2024, arXiv 2402.04249", gated=True)
_HEX_PHI = PromptSource("LLM-Tuning-Safety/HEx-PHI", "HEx-PHI licence", "Qi et al. 2023, arXiv 2310.03693", gated=True)
_HH_RLHF = PromptSource("Anthropic/hh-rlhf", "MIT", "Bai et al. 2022, arXiv 2204.05862")
_JAILBREAKBENCH = PromptSource("JailbreakBench/JBB-Behaviors", "MIT", "Chao et al. 2024, arXiv 2404.01318")
_MT_BENCH = PromptSource("HuggingFaceH4/mt_bench_prompts", "Apache 2.0", "Zheng et al. 2023, arXiv 2306.05685")
_OR_BENCH = PromptSource("bench-llm/or-bench", "CC BY 4.0", "Cui et al. 2024, arXiv 2405.20947")
_SIMPLE = PromptSource("Bertievidgen/SimpleSafetyTests", "CC BY 2.0", "Vidgen et al. 2023, arXiv 2311.08370")
_STRONGREJECT = PromptSource("walledai/StrongREJECT", "MIT", "Souly et al. 2024, arXiv 2402.10260", gated=True)
_XSTEST = PromptSource("natolambert/xstest-v2-copy", "CC BY 4.0", "Röttger et al. 2023, arXiv 2308.01263")

_HEX_PHI_PART = Part("harmful", pattern="category_*.csv", category=_hex_phi_category, header=("prompt",))
_SIMPLE_PART = Part("harmful", pattern="sst_test_cases.csv")  # `datasets` takes "test" in its name for the split
_ALPACA_PART = Part("benign", pattern="alpaca_eval.json")  # the repository has a script, which is never run
_HARMLESS, _HELPFUL = "harmless-base/test.jsonl.gz", "helpful-base/test.jsonl.gz"
_HH_PARTS = (
    Part("harmful", pattern=_HARMLESS, word="harmless", category="harmless"),
    Part("benign", pattern=_HELPFUL, word="helpful", category="helpful"),
)

_SETS = (
    PromptSet("hex-phi", _HEX_PHI, (_HEX_PHI_PART,)),
    PromptSet("advbench", _ADVBENCH, (Part("harmful"),)),
    PromptSet("harmbench", _HARMBENCH, (Part("harmful", config="standard"),)),
    PromptSet("harmbench-contextual", _HARMBENCH, (Part("harmful", config="contextual"),)),
    PromptSet("harmbench-copyright", _HARMBENCH, (Part("harmful", config="copyright"),)),
    PromptSet("jailbreakbench", _JAILBREAKBENCH, (Part("harmful", config="behaviors", split="harmful"),)),
    PromptSet("jailbreakbench-benign", _JAILBREAKBENCH, (Part("benign", config="behaviors", split="benign"),)),
    PromptSet("strongreject", _STRONGREJECT, (Part("harmful"),)),
    PromptSet("xstest", _XSTEST, (Part(_xstest_kind, split="prompts"),), _first("category", "type")),
    PromptSet("or-bench", _OR_BENCH, (Part("dual_use", config="or-bench-80k"),)),
    PromptSet("or-bench-hard", _OR_BENCH, (Part("dual_use", config="or-bench-hard-1k"),)),
    PromptSet("or-bench-toxic", _OR_BENCH, (Part("harmful", config="or-bench-toxic"),)),
    PromptSet("simple-safety-tests", _SIMPLE, (_SIMPLE_PART,), _first("category", "harm_area")),
    PromptSet("do-not-answer", _DO_NOT_ANSWER, (Part("harmful"),), _first("category", "risk_area")),
    PromptSet("coconot", _COCONOT, (Part("harmful", config="original", split="test"),)),
    PromptSet("coconot-contrast", _COCONOT, (Part("dual_use", config="contrast", split="test"),)),
    PromptSet("coconot-pref", _COCONOT, (Part("dual_use", config="pref"),), _first("reference", "chosen")),
    PromptSet("hh-rlhf", _HH_RLHF, _HH_PARTS),
    PromptSet(
        "alpaca-eval", _ALPACA_EVAL, (_ALPACA_PART,), {**_first("reference", "output"), "category": ("dataset",)}
    ),
    PromptSet("mt-bench", _MT_BENCH, (Part("benign"),), _first("id", "prompt_id", "question_id")),
)
PROMPT_SETS = Registry("prompt set", {known.name: known for known in _SETS})
