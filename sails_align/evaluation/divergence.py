"""Measure how far training has moved a model from its base, on answers to harmless prompts: `sails eval divergence`.

<output_dir>/answers.jsonl     the prompts and the answers
<output_dir>/tokens.jsonl      the numbers of each answer
<output_dir>/metrics.json      means over answers with intervals, also by prompt set; provenance

Shapes: B sequences, S positions, T marked tokens of a sequence, V vocabulary.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sails_align.core.artifacts import package_versions
from sails_align.core.earlier import check_earlier, write_record
from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.core.log import LOG_FILE, say, show
from sails_align.core.options import all_but
from sails_align.core.progress import progress_bar
from sails_align.core.tables import FittedTable
from sails_align.data.tokens import TokenizedSide, padded, tokenize_response
from sails_align.evaluation.backends.local_model import Batches
from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.compared import BASE, Responder, compared_with
from sails_align.evaluation.metrics import METRICS, Estimate, as_numbers, estimate
from sails_align.evaluation.options import (
    NOT_IN_IDENTITY,
    DivergenceArguments,
    PromptArguments,
    ResponseArguments,
    RunArguments,
)
from sails_align.evaluation.output import METRICS_FILE, output_folder, prompts_hash, write_responses, write_rows
from sails_align.evaluation.pipeline import respond
from sails_align.evaluation.records import Completion, Prompt
from sails_align.evaluation.reference import reference_answers, reference_identity
from sails_align.evaluation.result import places_by_split
from sails_align.evaluation.run import opened, prompts_of
from sails_align.evaluation.tracking import send_numbers
from sails_align.models.generation import context_length
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.models.threads import fitting_threads


@dataclass(frozen=True)
class Divergence:
    """What two models say of an answer; means over its tokens, in nats."""

    kl_per_token: float
    """Kullback-Leibler divergence of the model from its base, over the whole vocabulary: KL(base || model)."""
    answer_loss: float
    """Negative log-likelihood by the model."""
    base_answer_loss: float
    """Negative log-likelihood by the base model."""
    n_tokens: int


NAMES = tuple(of.name for of in fields(Divergence) if of.name != "n_tokens")


def run_divergence(
    how: ResponseArguments,
    asked: PromptArguments,
    run: RunArguments,
    against: DivergenceArguments,
    report_to: Sequence[str] = (),
) -> Mapping[str, Any]:
    """Get the answers, compare the models on them, write the files and print the means.

    Harmful prompts are left out. `report_to` names trackers. Returns the contents of `metrics.json`.

    Raises:
        InputError: for models, prompts or answers that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the prompts have no answer.
    """
    if how.backend != "hf":
        raise InputError(f"backend is {how.backend}, which does not give all probabilities of a token; use hf")
    if how.clade_oracle:
        raise InputError("clade_oracle is true, but divergence is of the predicted categories; leave it out")
    if how.guard is not None:
        raise InputError("guard is given, but a guard changes no probabilities of the model; leave it out")
    folder = output_folder(run, "divergence", how.model)
    with opened(folder, run, "sails eval divergence", ("prompts", "answers", "divergence")) as (stages, cache):
        say(f"divergence of {how.model}; output: {folder}/ (all lines: {LOG_FILE})")
        prompts = prompts_of(how, asked, stages, harmless_only=True)
        model = Responder(how, find_spec(how))
        base = _base_of(model, against.base)
        reference = against.reference
        identity = {
            "command": "sails eval divergence",
            "options": all_but(NOT_IN_IDENTITY, how, asked, run, against),
            "prompts": prompts_hash(prompts),
            "sampling": asdict(how.sampling(prompts)),
            **{name: make_backend(of.how, of.spec, []).identity() for name, of in (("model", model), ("base", base))},
            "reference": None if reference is None else reference_identity(reference, how),
        }
        check_earlier(folder, identity, METRICS_FILE, overwrite=run.overwrite_output_dir)
        stages.begin("answers", f"of {reference or base.how.model}")
        answers = _answers(reference, base, prompts, cache, how, run)
        write_responses(folder / "answers.jsonl", prompts, answers)
        stages.begin("divergence", f"of {how.model} from {against.base or 'its base'}")
        found = _measured(model, base, prompts, answers, progress=run.progress)
        write_rows(folder / "tokens.jsonl", _rows(prompts, found))
        provenance = {name: identity[name] for name in ("model", "base", "reference", "sampling")}
        provenance |= {"prompts": {"sets": asked.prompts, "n": len(prompts), "part": asked.part}}
        metrics = {**summary(prompts, found), "provenance": {**provenance, "versions": package_versions()}}
        write_json(folder / METRICS_FILE, metrics)
        write_record(folder, identity)
        _show(metrics, how.model, folder)
        send_numbers(_numbers(metrics), report_to, folder)
    n_unscored = found.count(None)
    if n_unscored > run.max_unscored * len(found):
        print(
            f"{n_unscored} of {len(found)} prompts have no answer, more than max_unscored ({run.max_unscored:.1%});\n"
            "the means leave them out. --retry_unscored asks for these alone again",
            file=sys.stderr,
        )
        raise SystemExit(1)
    return metrics


def _base_of(model: Responder, name: str | None) -> Responder:
    """Find the base model; raise `InputError` if it must be named, or has other tokens than the model."""
    assert model.spec is not None
    if name is None and model.spec.adapter is None:
        raise InputError(f"{model.how.model} has no adapter; give --base, the model that it was trained from")
    base = compared_with(name or BASE, model)
    assert base.spec is not None
    if load_spec_tokenizer(model.spec).get_vocab() != load_spec_tokenizer(base.spec).get_vocab():
        raise InputError(
            f"{model.how.model} and {name or 'its base'} have other tokens, so that probabilities cannot be compared;\n"
            "give --base, the model that it was trained from"
        )
    return base


def _answers(
    reference: str | None,
    base: Responder,
    prompts: Sequence[Prompt],
    cache: Cache,
    how: ResponseArguments,
    run: RunArguments,
) -> list[Completion]:
    """Return the answers that the models are compared on: the reference's, or the base model's own."""
    options = {"retry_failed": run.retry_unscored, "progress": run.progress}
    if reference is not None:
        return reference_answers(reference, how, prompts, cache, **options)
    with closing(make_backend(base.how, base.spec, prompts)) as backend:
        return respond(backend, prompts, how.sampling(prompts), cache, **options)


def _measured(
    model: Responder, base: Responder, prompts: Sequence[Prompt], answers: Sequence[Completion], *, progress: bool
) -> list[Divergence | None]:
    """Load the models and compare them on the answers; an adapter and its own base are one model in memory."""
    assert model.spec is not None
    assert base.spec is not None
    loaded, tokenizer = load_model(model.spec), load_spec_tokenizer(model.spec)
    is_own_base = model.spec.adapter is not None and base.spec.adapter is None and _weights(model) == _weights(base)
    other = None if is_own_base else load_model(base.spec)
    limit = context_length(loaded.config)
    sides = [
        None if answer.text is None else tokenize_response(tokenizer, list(prompt.messages), answer.text, limit)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return divergences(loaded, other, sides, batch_size=model.how.batch_size, progress=progress)


def _weights(of: Responder) -> tuple[Any, ...]:
    """Return what is loaded, without an adapter."""
    assert of.spec is not None
    return of.spec.base, of.spec.revision, of.spec.dtype, of.spec.trust_remote_code


def divergences(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    sides: Sequence[TokenizedSide | None],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Divergence | None]:
    """Compare a model with its base at the marked tokens of some sequences, each predicted from those before it.

    Args:
        model: with or without an adapter.
        base: None: the model without its adapter.
        sides: sequences; None, or one without a marked token, has no result.
        batch_size: sequences at a time; halved when memory runs out.
        progress: show a bar.

    Returns:
        a result for each sequence.

    Raises:
        InputError: if memory does not suffice for a single sequence, the models have other vocabularies, or their
            probabilities are not numbers.
    """
    usable = {place: side for place, side in enumerate(sides) if side is not None and any(side.mask[1:])}
    order = sorted(usable, key=lambda place: len(usable[place].input_ids), reverse=True)
    found: list[Divergence | None] = [None] * len(sides)
    with progress_bar(progress and bool(order)) as bar:
        task = bar.add_task("divergence", total=len(order))
        for batch, results in Batches(batch_size).run(partial(_compare, model, base, usable), order):
            if results is None:
                n_tokens = len(usable[batch[0]].input_ids)
                raise InputError(f"out of memory with {n_tokens} tokens; use a smaller --dtype, or shorter answers")
            for place, result in zip(batch, results, strict=True):
                found[place] = result
            bar.advance(task, len(batch))
    return found


@torch.inference_mode()
def _compare(
    model: PreTrainedModel, base: PreTrainedModel | None, sides: Mapping[int, TokenizedSide], batch: Sequence[int]
) -> list[Divergence]:
    input_ids_BS, attention_mask_BS, mask_BS = (of.to(model.device) for of in padded([sides[place] for place in batch]))
    inputs = {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS}
    with fitting_threads(model):
        logits_BSV = model(**inputs).logits
        with _without_adapter(model, base) as other:
            base_logits_BSV = other(**inputs).logits
    if logits_BSV.shape != base_logits_BSV.shape:
        n, n_base = logits_BSV.shape[-1], base_logits_BSV.shape[-1]
        raise InputError(f"the vocabularies have {n} and {n_base} entries; give --base, the model it was trained from")
    results = []
    for row, mask_S in enumerate(mask_BS):
        at = mask_S[1:].nonzero().squeeze(1)
        log_p_TV = logits_BSV[row, at].float().log_softmax(-1)
        log_q_TV = base_logits_BSV[row, at].float().log_softmax(-1)
        targets_T1 = input_ids_BS[row, at + 1].unsqueeze(1)
        kl = torch.where(log_q_TV > -torch.inf, log_q_TV.exp() * (log_q_TV - log_p_TV), 0.0).sum(-1).mean().item()
        loss, base_loss = (-log_TV.gather(1, targets_T1).mean().item() for log_TV in (log_p_TV, log_q_TV))
        if not all(map(math.isfinite, (kl, loss, base_loss))):
            raise InputError(
                "a model's probabilities are not numbers, or 0 where the other's are not: its training has diverged;\n"
                "check its weights, or train it with a smaller learning rate"
            )
        results.append(Divergence(max(0.0, kl), loss, base_loss, len(at)))  # rounding can take it below 0
    return results


@contextmanager
def _without_adapter(model: PreTrainedModel, base: PreTrainedModel | None) -> Iterator[PreTrainedModel]:
    if base is not None:
        yield base
        return
    adapted: Any = model
    with adapted.disable_adapter():
        yield model


def summary(prompts: Sequence[Prompt], found: Sequence[Divergence | None]) -> dict[str, Any]:
    """Return the means over answers, of all and of each prompt set, for `metrics.json`."""
    splits = places_by_split(prompts)
    return {
        "overall": _means(found),
        "by_split": {name: _means([found[place] for place in places]) for name, places in splits.items()},
        "n_tokens": sum(of.n_tokens for of in found if of is not None),
    }


def _means(found: Sequence[Divergence | None]) -> dict[str, Any]:
    def mean(name: str) -> Estimate:
        values = [None if of is None else float(getattr(of, name)) for of in found]
        return estimate(values, span=METRICS[name].span)

    return {name: mean(name).to_json() for name in NAMES}


def _rows(prompts: Sequence[Prompt], found: Sequence[Divergence | None]) -> list[dict[str, Any]]:
    return [
        {"id": prompt.id, "category": prompt.category, **({} if of is None else asdict(of))}
        for prompt, of in zip(prompts, found, strict=True)
    ]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = as_numbers(metrics["overall"], "overall/")
    for split, rates in metrics["by_split"].items():
        numbers |= as_numbers(rates, f"by_split/{split}/")
    return numbers


def _show(metrics: Mapping[str, Any], model: str, folder: Path) -> None:
    of_splits = metrics["by_split"] if len(metrics["by_split"]) > 1 else {}
    table = FittedTable(f"Divergence of {model}", ("", "mean (95% interval)", "n"))
    for split, rates in {"": metrics["overall"], **of_splits}.items():
        for name in NAMES if not split else NAMES[:1]:
            metric, of = METRICS[name], Estimate(**rates[name])
            table.add_row(f"{metric.heading}{split and f', {split}'}", metric.with_interval(of), str(of.n))
    show(table)
    show(f"metrics   {folder / METRICS_FILE}")
