"""Train gains and biases of norms for each category of requests, and nothing else (`--clade`; see `models.clade`).

The rows of the training data have the class of their request (`CLASS`); the collator gives it to the model. The probe
is fitted before the training, on hidden states of the frozen base at all tokens of training examples.

Shapes: T tokens, D d_model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from sails_align.core.errors import InputError
from sails_align.core.log import say
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.models.clade import CLASS_IDS, NONE, Clade, CladeConfig, fit_probe, norms_after, unit_rms
from sails_align.models.clade import attach as put_on
from sails_align.models.hooks import at_tokens, decoder_layers, evaluation_mode, hidden_states_at
from sails_align.training.callbacks.options import CladeOptions

CLASS = "clade_name"
"""Column with the name of a row's class."""
N_TOKENS = 32768
"""Whose hidden states the probe is fitted to, about: those of examples drawn at random, with a fixed seed."""
LEFT_OUT = 8
"""One of this number of examples is left out of the fit, for the accuracy."""


def class_names(rows: Dataset, options: CladeOptions) -> list[str]:
    """Return the class of each row.

    Raises `InputError` if there should be several, and the rows have no categories.
    """
    if options.clade == "one":
        return [NONE] * len(rows)
    categories = rows["category"] if "category" in rows.column_names else [None] * len(rows)
    harmful = rows["harmful"] if "harmful" in rows.column_names else [None] * len(rows)
    names = [
        NONE if category is None or is_harmful is False else str(category)
        for category, is_harmful in zip(categories, harmful, strict=True)
    ]
    if set(names) == {NONE}:
        raise InputError(
            "clade is categories, but no row of the safety data has a category;\n"
            "add a column category, or train one class with --clade one"
        )
    return names


def attach(trainer: Trainer, init: object, plan: Any) -> None:
    """Put the adapter on the model of trainings that ask for it, and freeze all other weights."""
    options = plan.of(CladeOptions)
    if options.clade is None:
        return
    model: Any = trainer.model
    rows: Any = trainer.train_dataset
    names = list(rows[CLASS])
    classes = (NONE, *sorted(set(names) - {NONE}))
    layer = len(decoder_layers(model)) // 3 if options.clade_layer is None else options.clade_layer
    ids = [classes.index(name) for name in names]
    weights, accuracy = _probe(model, layer, rows, ids, len(classes)) if len(classes) > 1 else (None, None)
    config = CladeConfig(
        plan.model_name, plan.model.model_revision, classes, layer, norms_after(model, layer), accuracy
    )
    clade = Clade(config, model.config.get_text_config().hidden_size)
    if weights is not None:
        clade.probe.load_state_dict(dict(zip(("weight", "bias"), weights, strict=True)))
        say(f"    {len(classes)} classes; the probe of layer {layer} predicts {accuracy:.0%} of response tokens")
    model.requires_grad_(False)
    put_on(model, clade)
    trainer.train_dataset = rows.remove_columns(CLASS).add_column(CLASS_IDS, ids)
    trainer.data_collator = with_class_ids(trainer.data_collator)
    trainer._set_signature_columns_if_needed()  # columns that it does not list are removed
    trainer._signature_columns = [*(trainer._signature_columns or ()), CLASS_IDS]


def with_class_ids(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a collator that also collects the class of each example, where they have one."""

    def collated(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        if CLASS_IDS in examples[0]:
            batch[CLASS_IDS] = torch.tensor([example[CLASS_IDS] for example in examples])
        return batch

    return collated


def _probe(
    model: PreTrainedModel, layer: int, rows: Dataset, ids: Sequence[int], n_classes: int
) -> tuple[tuple[Tensor, Tensor], float]:
    """Fit the probe on training examples. Returns its weight and bias, and its accuracy on examples left out."""
    drawn: list[int] = []
    n_tokens = 0
    for place in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist():
        drawn.append(place)
        n_tokens += len(rows[place]["input_ids"])
        if n_tokens >= N_TOKENS:
            break
    fitted: list[tuple[Tensor, Tensor]] = []
    left_out: list[tuple[Tensor, Tensor]] = []
    with evaluation_mode(model):
        for number, place in enumerate(sorted(drawn)):
            row = rows[place]
            is_left_out = number % LEFT_OUT == 0
            learned = [label != -100 for label in row["labels"]]
            side = TokenizedSide(row["input_ids"], learned if is_left_out else [True] * len(learned))
            ids_BS, attention_BS, mask_BS = padded([side])
            hidden_BSD = hidden_states_at(model, [layer], ids_BS, attention_BS)[layer]
            states_TD = unit_rms(at_tokens(hidden_BSD, mask_BS)).cpu()
            (left_out if is_left_out else fitted).append((states_TD, torch.full((len(states_TD),), ids[place])))
    weight_CD, bias_C = fit_probe(*_joined(fitted), n_classes)
    states_TD, ids_T = _joined(left_out)
    right_T = (states_TD @ weight_CD.T + bias_C).argmax(1) == ids_T
    return (weight_CD, bias_C), right_T.double().mean().item()


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    states, ids = zip(*parts, strict=True)
    return torch.cat(states), torch.cat(ids)
