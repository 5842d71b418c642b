"""Make docs/messages.md: every `InputError` of the package, with its remedy, read from the source.

python docs/messages.py --write    write the page; without it the exit code is 1 if the page is not up to date
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "messages.md"
PARTS = {
    "Commands and options": ("errors", "config", "cli", "commands", "training.parsing"),
    "Files and folders": ("artifacts",),
    "Data": ("data", "formats", "rows", "loading"),
    "Tokenizers and chat templates": ("tokens",),
    "Discovery: models, SAEs, subspaces": ("subspace", "training.subspaces", "sae_training", "explaining"),
    "Training": ("training", "align", "distributed", "estimate"),
    "The RLHF reference": ("rlhf", "rlhf_options", "warm_start"),
    "Evaluation": ("evaluation", "eval_*", "judge_check", "measuring"),
    "Attacks": ("attacking", "attack_options", "evaluation.gcg", "evaluation.suffix_tokens", "evaluation.wrappers"),
    "Comparison": ("comparison", "comparing", "compare_options", "reporting"),
    "Merging, serving, the hub": ("export", "exporting"),
    "Testbed": ("testbed",),
    "Other commands": ("*",),
}
"""Titles, and the modules or folders under them; of several that fit, the longest name counts."""
REMEDY = re.compile(r"; |[;:]\n")
"""What mostly stands between a cause and its remedy."""
VERBS = "accept|add|ask|check|choose|delete|give|install|keep|leave|load|lower|merge|raise|see|take|train|use"
OTHER_REMEDY = re.compile(
    rf": (?=({VERBS})\b)|(?<=\?) (?=give)|, (but |which )?(?=(it )?(must be|is not one of|but must be one of))"
    r"| (?=is not one of )"
)
"""What else does; a line break, if nothing of this is there."""
HEAD = """# Messages

<!-- Made by `python docs/messages.py --write` -->

Every message that a command ends with on input that it cannot use, and what to do. `<...>` stands for a value. The
message is on standard error, behind `error:`; the exit code is 2, and nothing that was there is lost. `<message>`,
`<error>` and `<cause>` are passed on from another message or library. By symptom:
[troubleshooting.md](troubleshooting.md).
"""


@dataclass(frozen=True, order=True)
class Message:
    """What an `InputError` says."""

    module: str
    line: int
    text: str

    @property
    def cause(self) -> str:
        return self._parts()[0]

    @property
    def remedy(self) -> str:
        """What to do; empty if the message does not say."""
        return self._parts()[1]

    @property
    def is_passed_on(self) -> bool:
        """Whether it ends in the message of another library or another part of the tool, which has the remedy."""
        return bool(re.search(r"<(error|cause|first|lines|why|remedy|otherwise)>$", self.text))

    def _parts(self) -> tuple[str, str]:
        found = next((at for at in REMEDY.finditer(self.text) if _is_balanced(self.text[: at.start()])), None)
        found = found or OTHER_REMEDY.search(self.text) or re.search(r",?\n", self.text)
        if found is None:
            return self.text, ""
        return self.text[: found.start()].strip(), self.text[found.end() :].strip()


def _is_balanced(text: str) -> bool:
    return text.count("(") == text.count(")")


def messages() -> list[Message]:
    """Of all modules, in the order of the source."""
    return sorted(
        Message(".".join(path.relative_to(ROOT / "sails_align").with_suffix("").parts), line, text)
        for path in sorted((ROOT / "sails_align").rglob("*.py"))
        for line, text in _of(ast.parse(path.read_text(encoding="utf-8")))
    )


def _of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InputError":
            for text in _texts(node.args[0], functions):
                yield node.lineno, text


def _texts(value: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """What an expression can say: one text, or those that a function of the module returns."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in functions:
        returned = [node.value for node in ast.walk(functions[value.func.id]) if isinstance(node, ast.Return)]
        return [text for of in returned if of is not None for text in _texts(_of_error(of), functions)]
    if isinstance(value, ast.IfExp):
        return [*_texts(value.body, functions), *_texts(value.orelse, functions)]
    return [_text(value, functions)]


def _of_error(value: ast.expr) -> ast.expr:
    """The message of an error that is returned."""
    is_error = isinstance(value, ast.Call) and getattr(value.func, "id", "") == "InputError"
    return value.args[0] if is_error else value  # pyright: ignore[reportAttributeAccessIssue]


def _text(value: ast.expr, functions: dict[str, ast.FunctionDef]) -> str:
    """A text with `<...>` for values."""
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, functions) for part in parts)
        case ast.FormattedValue(value=ast.IfExp(body=body, orelse=orelse)):
            return _text(body, functions) or _text(orelse, functions)
        case ast.FormattedValue(value=ast.BoolOp(values=[of, *_])) | ast.FormattedValue(value=of):
            return _hint(of, functions) or _text(of, functions)
        case ast.BinOp(left=left, right=right, op=ast.Add()):
            return _text(left, functions) + _text(right, functions)
        case _:
            return f"<{_name(value)}>"


def _hint(value: ast.expr, functions: dict[str, ast.FunctionDef]) -> str:
    """What a function of the module adds to a message, if it is one that makes a text."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in functions):
        return ""
    last = functions[value.func.id].body[-1]
    text = last.value.body if isinstance(last, ast.Return) and isinstance(last.value, ast.IfExp) else None
    return _text(text, functions) if isinstance(text, ast.JoinedStr) else ""


def _name(value: ast.expr) -> str:
    """What a value is called in the page."""
    match value:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.lower().strip("_").replace("_", " ")
        case ast.Call(func=ast.Attribute(attr="join"), args=[of]):
            return _name(of)
        case ast.Call(func=ast.Name(id="getattr")):
            return "value"
        case ast.Call(func=ast.Name(id="len" | "sum")):
            return "number"
        case ast.Call(func=ast.Name(id=name)) if name.startswith("_"):
            return name.lower().strip("_").replace("_", " ")
        case ast.Call(func=ast.Name(), args=[of, *_]):
            return _name(of)
        case ast.Call(func=ast.Attribute(attr=name)):
            return name.replace("_", " ")
        case ast.GeneratorExp(generators=[of, *_]) | ast.ListComp(generators=[of, *_]):
            return _name(of.iter)
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            return key
        case ast.Subscript(value=of) | ast.Starred(value=of) | ast.BinOp(left=of):
            return _name(of)
        case _:
            return "value"


def part_of(module: str) -> str:
    """The title under which a module's messages stand."""

    def fit(name: str) -> int:
        is_it = module == name or module.startswith(f"{name}.") or (name[-1] == "*" and module.startswith(name[:-1]))
        return len(name) if is_it else 0

    return max(PARTS, key=lambda title: max(map(fit, PARTS[title])))


def page() -> str:
    """The page's Markdown."""
    parts: dict[str, list[str]] = {title: [] for title in PARTS}
    for message in messages():
        if message.remedy or not message.is_passed_on:
            row = f"| {_code(message.cause)} | {_prose(message.remedy)} |"
            parts[part_of(message.module)].append(row)
    sections = [
        f"\n## {title}\n\n| message | what to do |\n|---|---|\n" + "\n".join(dict.fromkeys(rows)) + "\n"
        for title, rows in parts.items()
        if rows
    ]
    return HEAD + "".join(sections)


def _code(text: str) -> str:
    """A cell of the table, as code; a text that has code itself stands between two backticks."""
    ticks = "``" if "`" in text else "`"
    return f"{ticks}{_line(text)}{ticks}"


def _prose(text: str) -> str:
    return _line(text).replace("<", "&lt;").replace("*", "&#42;")


def _line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|")


def main() -> None:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is not up to date: python docs/messages.py --write")


if __name__ == "__main__":
    main()
