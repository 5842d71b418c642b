"""The command `sails answer`: write a model's own answers to prompts, as rows to train on.

sails answer --model smollm2 --prompts mine.jsonl --max_new_tokens 48 --output own.jsonl
sails train sft --helpful_dataset_name own.jsonl ...
"""

from collections.abc import Sequence
from pathlib import Path

from sails_align.core.command_line import CommandLine
from sails_align.evaluation.options import AnswerArguments, PromptArguments, ResponseArguments


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> Path:
    """Answer and write. Returns the file."""
    classes = (ResponseArguments, PromptArguments, AnswerArguments)
    how, asked, output = CommandLine.read(argv).parse(classes, prog=prog)
    from sails_align.evaluation.answers import write_answers

    return write_answers(how, asked, output)
