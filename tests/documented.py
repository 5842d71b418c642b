"""The commands that README.md and the pages in docs/ show.

A block of code (fenced, or indented by four spaces up to the next empty line) is of commands if its first line is one.
All its lines are commands then, `\\` continues them, and `#` begins a comment. In a block that begins with `$ ` the
other lines are output. A block of Python is one command.

A block whose first line is `# needs: ...` is not run by the tests: `GPU`, `network` (the hub, a paid judge),
`docker`, `a cluster`, or a time `of two cores`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from paths import ROOT

DOCUMENTS = [
    "README.md",
    *(
        str(path.relative_to(ROOT))
        for pages in ("docs", "docs/methods")
        for path in sorted((ROOT / pages).glob("*.md"))
    ),
]
PROGRAMS = ("accelerate", "cd", "docker", "export", "fuser", "git", "hf", "inspect", "make", "mkdocs", "pip", "python")
PROGRAMS += ("python3", "ruff", "sails", "sbatch", "source", "srun", "torchrun", "vllm")
NEED = r"(GPU|network|docker|a cluster|(\w+ minutes|hours) of two cores)"
NEEDS = re.compile(rf"# needs: {NEED}(, {NEED})*")
FENCE = re.compile(r"```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n)+", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code."""

    document: str
    language: str
    """Of a fence; empty for indented ones."""
    lines: tuple[str, ...]
    """Continued ones joined, without indentation."""

    @property
    def needs(self) -> str | None:
        """What its commands need beside a CPU and some minutes; None if nothing."""
        found = re.fullmatch(r"# needs: (.*)", self.lines[0])
        return found and found[1]

    @property
    def commands(self) -> list[str]:
        """Its commands, without comments; none if it is no block of commands.

        Raises:
            ValueError: if some lines are commands and others cannot be.
        """
        if self.language == "python":
            return ["\n".join(self.lines)]
        lines = [line for line in self.lines if not line.startswith("#")]
        if not lines or self.language not in ("", "bash", "console"):
            return []
        if lines[0].startswith("$ "):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif not is_command(lines[0]):
            return []
        if strange := [line for line in lines if not is_command(line)]:
            raise ValueError(
                f"{self.document}: {strange[0]!r} stands among commands and begins with none of {PROGRAMS}"
            )
        return [re.sub(r"\s+#.*", "", line) for line in lines]


def is_command(line: str) -> bool:
    """Whether a line begins with a program's name."""
    return line.split()[0].rpartition("/")[2] in PROGRAMS


def blocks(document: str) -> Iterator[Block]:
    """All blocks of code of a document, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = {match.start(): (match[1], match[2]) for match in FENCE.finditer(text)}
    without_fences = FENCE.sub(lambda match: "-" * len(match[0]), text)
    found |= {
        match.start(): ("", re.sub("^    ", "", match[0], flags=re.M)) for match in INDENTED.finditer(without_fences)
    }
    for _, (language, code) in sorted(found.items()):
        lines = re.sub(r"\s*\\\n\s*", " ", code).splitlines()
        yield Block(document, language, tuple(line for line in lines if line.strip()))
