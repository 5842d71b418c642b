"""Write a model's own answers to prompts, as rows to train on (`sails answer`).

A model that is trained on its own answers to harmless requests keeps the way it answers, and is not taught another.
"""

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sails_align.core.earlier import remedy_of
from sails_align.core.errors import InputError
from sails_align.core.files import disk_errors
from sails_align.core.log import Stages, say, show
from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.options import AnswerArguments, PromptArguments, ResponseArguments
from sails_align.evaluation.output import default_cache, stem_with_run, write_rows
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.prompts.load import counted, load_all
from sails_align.evaluation.reasoning import answer_of
from sails_align.evaluation.records import GUARDED, Completion, Prompt

SENTENCE = re.compile(r".*(?:(?<!\d)\.|[!?])[\"')\]*]*(?=\s|$)", re.DOTALL)
"""Up to the end of the last whole sentence; the number of a list's item (`2.`) is none."""


def write_answers(how: ResponseArguments, asked: PromptArguments, output: AnswerArguments) -> Path:
    """Answer the prompts and write the rows: prompt, response, kind, category.

    An answer that reached the maximum length is cut after its last whole sentence. Prompts without an answer, or
    without a whole sentence of it, are left out and counted.

    Returns:
        the file.

    Raises:
        InputError: for a model or prompts that cannot be used, if no prompt has an answer, or for a file that is there
            and may not be replaced.
    """
    file = Path(output.output or f"runs/answers-{stem_with_run(how.model)}.jsonl")
    if file.exists() and not output.overwrite_output_dir:
        raise InputError(f"{file} is there already;\n{remedy_of('--output')}")
    with disk_errors(file), Stages(("prompts", "answers")) as stages, closing(Cache(default_cache())) as cache:
        stages.begin("prompts", ", ".join(asked.prompts))
        prompts = load_all(asked, how.seed, how.system_prompt)
        say(f"    {counted(prompts)}")
        stages.begin("answers", f"{how.model} by {how.backend}")
        backend = make_backend(how, find_spec(how), prompts)
        completions = respond(backend, prompts, how.sampling(prompts), cache, progress=output.progress)
        rows = rows_of(prompts, completions)
        if not rows:
            raise InputError(f"{how.model} answered none of the {len(prompts)} prompts; try a larger --max_new_tokens")
        write_rows(file, rows)
    refused = sum(completion.finish_reason == GUARDED for completion in completions)
    by_guard = f", {refused} of them the guard's refusals" if how.guard else ""
    show(f"{file}: {len(rows)} answers to {len(prompts)} prompts{by_guard}")
    return file


def rows_of(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Return a row for each prompt that has an answer."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = _whole(completion)
        if text:
            (*before, last) = prompt.messages
            asked = last["content"] if not before else list(prompt.messages)
            rows.append({"prompt": asked, "response": text, "kind": prompt.kind, "category": prompt.category})
    return rows


def _whole(completion: Completion) -> str | None:
    answer = answer_of(completion.text or "")
    if answer is None or completion.finish_reason == "stop":
        return answer and answer.strip()
    sentences = SENTENCE.match(answer)
    return None if sentences is None else sentences.group().strip()
