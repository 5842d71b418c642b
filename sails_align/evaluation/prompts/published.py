"""What the rows of published prompt sets mean: their kinds, their layouts, and what tells sets of one source apart."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.data.formats import BadRowError, user
from sails_align.evaluation.prompts.definitions import Row, prompt_id
from sails_align.evaluation.records import Kind

HEX_PHI_CATEGORIES = {
    1: "Illegal Activity", 2: "Child Abuse Content", 3: "Hate/Harass/Violence", 4: "Malware", 5: "Physical Harm",
    6: "Economic Harm", 7: "Fraud/Deception", 8: "Adult Content", 9: "Political Campaigning",
    10: "Privacy Violation Activity", 11: "Tailored Financial Advice",
}  # fmt: skip
"""By the number in a file's name. The repository no longer has category 2, so 300 of 330 prompts are left."""

# -- kinds and categories ---------------------------------------------------------------------------------------------


def hex_phi_category(file: Path) -> str:
    """Return the category of a file of HEx-PHI."""
    number = re.search(r"\d+", file.stem)
    return HEX_PHI_CATEGORIES.get(int(number[0]), file.stem) if number else file.stem


def xstest_kind(row: Row) -> Kind:
    """Return the kind of a row of XSTest: its contrasts are harmful."""
    if row.get("type"):
        return "harmful" if str(row["type"]).startswith("contrast_") else "dual_use"
    if row.get("label") in ("safe", "unsafe"):
        return "harmful" if row["label"] == "unsafe" else "dual_use"
    raise InputError(
        "a row of xstest has neither a type nor a label (safe, unsafe); give a copy that has the column type"
    )


def wildguard_kind(row: Row) -> Kind:
    """Return the kind of a row of WildGuardTest."""
    label = str(row.get("prompt_harm_label") or "").strip().lower()
    if label not in ("harmful", "unharmful"):
        raise BadRowError("prompt_harm_label is neither harmful nor unharmful")
    return "harmful" if label == "harmful" else "benign"


def wildjailbreak_kind(row: Row) -> Kind:
    """Return the kind of a row of WildJailbreak. Its benign requests resemble harmful ones."""
    word = str(row.get("data_type") or "").strip().lower().rpartition("_")[2]
    if word not in ("harmful", "benign"):
        raise BadRowError("data_type ends in neither _harmful nor _benign")
    return "harmful" if word == "harmful" else "dual_use"


def toxicchat_kind(row: Row) -> Kind:
    """Return the kind of a row of ToxicChat."""
    label = str(row.get("toxicity")).strip().removesuffix(".0")
    if label not in ("0", "1"):
        raise BadRowError("toxicity is neither 0 nor 1")
    return "harmful" if label == "1" else "benign"


# -- rows -------------------------------------------------------------------------------------------------------------


def only(column: str, *values: str) -> Callable[[Row], Row | None]:
    """Return a function that keeps rows with one of these values in a column, and rows without the column."""

    def keep(row: Row) -> Row | None:
        return row if column not in row or str(row[column] or "").strip().lower() in values else None

    return keep


def wildjailbreak_row(row: Row) -> Row:
    """Return a row of WildJailbreak with its prompt: the jailbreak if there is one, else the request itself."""
    prompt = next((row[name] for name in ("adversarial", "vanilla") if row.get(name)), None)
    return {**row, "prompt": prompt, "category": row.get("data_type")}


def artifacts(content: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a file of JailbreakBench's artifacts: the jailbreaks of one attack on one model."""
    about, jailbreaks = content.get("parameters"), content.get("jailbreaks")
    if not isinstance(about, dict) or not isinstance(jailbreaks, list):
        return []
    meta = {"attack": about.get("method"), "attacked_model": about.get("model")}
    rows: list[Row] = []
    for jailbreak in (each for each in jailbreaks if isinstance(each, dict)):
        goal = str(jailbreak.get("goal"))
        of_row = {**meta, "behavior": goal, "attacked": prompt_id([user(goal)])}
        rows.append({"prompt": jailbreak.get("prompt"), "category": jailbreak.get("category"), "meta": of_row})
    return rows


def instructions(content: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a file of safety-tuned-llamas: {"instructions": [...], "inputs": [], ...}."""
    found = content.get("instructions")
    return [{"prompt": text} for text in found] if isinstance(found, list) else []


def nested(category: str, subcategory: str) -> Callable[[Mapping[str, Any]], list[Row]]:
    """Return what reads a file of red-instruct, {category: {subcategory: [questions]}}, with the hub's columns."""

    def unpack(content: Mapping[str, Any]) -> list[Row]:
        return [
            {"question": question, category: str(name).rstrip(":"), subcategory: str(part).rstrip(":")}
            for name, parts in content.items()
            for part, questions in _items(parts)
            for question in (questions if isinstance(questions, list) else ())
        ]

    return unpack


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    yield from value.items() if isinstance(value, dict) else ()


# -- telling sets of one source apart ---------------------------------------------------------------------------------


def _has_context(rows: Sequence[Row]) -> bool:
    return any(str(row.get(column) or "").strip() for row in rows for column in ("context", "contextstring"))


def not_standard(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of HarmBench's standard behaviors."""
    if rows and "tags" in rows[0] and not {"category", "semanticcategory"}.intersection(rows[0]):
        return "it has the columns of harmbench-copyright"
    return not_copyright(rows)


def not_contextual(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of HarmBench's contextual behaviors."""
    return None if _has_context(rows) else "none of its rows has a context"


def not_copyright(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of HarmBench's copyright behaviors."""
    return "its rows have contexts, as those of harmbench-contextual do" if _has_context(rows) else None


def not_harmful(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of JailbreakBench's harmful behaviors."""
    sources = {str(row.get("source") or "").strip() for row in rows}
    # 45 of its 100 requests are from AdvBench or from HarmBench, and no benign one is.
    return "it has no requests from AdvBench or HarmBench" if len(rows) > 20 and sources == {"Original"} else None


def not_benign(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of JailbreakBench's benign behaviors."""
    sources = {str(row.get("source") or "").strip() for row in rows}
    others = sorted(sources & {"AdvBench", "TDC/HarmBench"})
    return f"it has requests from {others[0]}, which only jailbreakbench has" if others else None


_NOT_IN_CONTRAST = {"Indeterminate requests", "Humanizing requests"}


def not_original(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of CoCoNot's main test."""
    found = {str(row.get("category")) for row in rows} & _NOT_IN_CONTRAST
    # 224 of its 1,001 requests have one of these categories.
    return None if found or len(rows) <= 50 else "it has only the categories of coconot-contrast"


def not_contrast(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of CoCoNot's contrast test."""
    found = sorted({str(row.get("category")) for row in rows} & _NOT_IN_CONTRAST)
    return f"it has the category {found[0]!r}, which only coconot has" if found else None


def not_i_cona(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are those of another file of safety-tuned-llamas, some of which are harmless."""
    others = {50: "I-Alpaca", 40: "I-Controversial", 100: "I-MaliciousInstructions and others"}
    return f"it has as many rows as {others[len(rows)]}" if len(rows) in others else None


def not_catqa(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of CatQA."""
    return "it has the 1960 rows of harmfulqa" if len(rows) == 1960 else None


def not_harmfulqa(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of HarmfulQA."""
    return "it has the 550 rows of catqa" if len(rows) == 550 else None


def not_evaluation(rows: Sequence[Row]) -> str | None:
    """Return what shows that rows are not those of BeaverTails' evaluation."""
    return "it has responses with labels, as BeaverTails has" if rows and "is_safe" in rows[0] else None
