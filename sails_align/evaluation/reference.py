"""Find the answers that a model's are compared with: another model's, an earlier evaluation's, or the prompt set's."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError
from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.options import ResponseArguments
from sails_align.evaluation.output import conversation_hash, read_rows
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.records import Backend, Completion, Prompt

IN_SET = "set"
"""`--reference set`: the answers that come with the prompts."""


def reference_answers(
    name: str, how: ResponseArguments, prompts: Sequence[Prompt], cache: Cache, **options: bool
) -> list[Completion]:
    """Return the reference's answers to the prompts.

    Args:
        name: a model, a responses.jsonl, or `set`.
        how: options of the evaluation, which a model as the reference shares.
        prompts: what it is asked.
        cache: of earlier responses.
        options: of `respond`.

    Raises:
        InputError: if the model, the file or the set has no answer to a prompt.
    """
    if name == IN_SET:
        texts = [prompt.meta.get("reference") for prompt in prompts]
    elif name.endswith(".jsonl"):
        responses = _read_responses(Path(name))
        texts = [responses.get(conversation_hash(prompt.messages)) for prompt in prompts]
    else:
        with closing(_reference_backend(name, how, prompts)) as backend:
            return respond(backend, prompts, how.sampling(prompts), cache, **options)
    lacking = [prompt.id for prompt, text in zip(prompts, texts, strict=True) if not text]
    if lacking:
        remedy = "give a model" if name == IN_SET else "evaluate it on the same prompts first, or give a model"
        raise InputError(
            f"the reference {name} has no answer to {len(lacking)} of {len(prompts)} prompts, such as {lacking[0]};\n"
            f"{remedy}"
        )
    return [Completion(text) for text in texts]


def _reference_backend(name: str, how: ResponseArguments, prompts: Sequence[Prompt]) -> Backend:
    own = {"base_model": None, "revision": None, "chat_template_path": None, "server_template": None, "guard": None}
    other = replace(how, model=name, clade_oracle=False, **own)
    return make_backend(other, find_spec(other), prompts)


def reference_identity(name: str, how: ResponseArguments) -> dict[str, Any]:
    """Return what the answers to compare with are: those of the set are known with the prompts."""
    if name == IN_SET:
        return {"name": name, "sha256": None}
    if not name.endswith(".jsonl"):
        return {"name": name, "sha256": None, "model": _reference_backend(name, how, []).identity()}
    return {"name": name, "sha256": file_hash(Path(name)) if Path(name).is_file() else None}


def _read_responses(path: Path) -> dict[str, str]:
    """Read responses by the hash of their conversation: prompts of two sets may have the same id."""
    try:
        return {conversation_hash(row["messages"]): row["response"] for row in read_rows(path)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read the answers in {path} ({type(error).__name__}: {error});\n"
            "give the responses.jsonl of an evaluation"
        ) from error
