"""Refuse options that trainings without gradients, or private ones, cannot be used with."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from sails_align.core.errors import InputError
from sails_align.data.options import DertaOptions, NearestRefusalOptions
from sails_align.training.callbacks.options import FreezeUnitsOptions
from sails_align.training.plan import TrainingPlan
from sails_align.training.zeroth_order.options import ZerothOrderOptions


def check_zeroth_order(args: TrainingPlan) -> None:
    """Raise `InputError` if options contradict the steps without gradients, or their privacy."""
    options = args.of(ZerothOrderOptions)
    if not options.zeroth_order:
        given = [option.name for option in fields(ZerothOrderOptions) if option.name in args.given]
        if given := [name for name in given if name != "zeroth_order"]:
            raise InputError(f"{given[0]} is given without zeroth_order; add --zeroth_order true, or leave it out")
        return
    if not isinstance(args.training, SFTConfig):
        raise InputError(
            "zeroth_order is true, but DPO's loss of a pair needs a reference, which has no private form here;\n"
            "leave it out, or use SFT"
        )
    if not args.model.use_peft:
        raise InputError(
            "zeroth_order is true with --use_peft false, but its error grows with the number of trained weights;\n"
            "train an adapter"
        )
    if args.engine != "single":
        raise InputError(f"zeroth_order is true, but it trains in one process, not by {args.engine}; start one process")
    for name, value, why in _unsuitable(args):
        raise InputError(f"zeroth_order is true and {name} is {value}, but {why}; leave one of them out")
    if options.is_private:
        _check_private(args)
    elif not options.is_clipped:
        private = ("dp_clip", "dp_delta", "dp_batch_size", "dp_noise_seed")
        if given := [name for name in private if name in args.given]:
            raise InputError(
                f"{given[0]} is given, but nothing is clipped or noisy without dp_sigma or a finite dp_epsilon; "
                "add one of them, or leave it out"
            )


def _unsuitable(args: TrainingPlan) -> Iterator[tuple[str, Any, str]]:
    """Yield options that steps without gradients contradict: name, value, and why."""
    training: Any = args.training
    one_loss, no_gradients = "the loss of an example is its cross-entropy", "there are no gradients"
    one_row, no_dropout = "each row must be one example", "the two losses of a step must differ by the weights alone"
    wanted = {
        "loss": ((args.loss or {}).get("name"), None, one_loss),
        "loss_type": (training.loss_type, "nll", one_loss),
        "label_smoothing_factor": (training.label_smoothing_factor, 0, one_loss),
        "packing": (training.packing, False, one_row),
        "padding_free": (training.padding_free, False, one_row),
        "lora_dropout": (args.model.lora_dropout, 0, no_dropout),
        "neftune_noise_alpha": (training.neftune_noise_alpha, None, no_dropout),
        "optim": (str(OptimizerNames(training.optim).value), "sgd", "it steps along random directions by plain SGD"),
        "max_grad_norm": (training.max_grad_norm, 0, no_gradients),
        "fp16": (training.fp16, False, no_gradients),
        "freeze_units": (args.of(FreezeUnitsOptions).freeze_units, None, no_gradients),
        "gradient_accumulation_steps": (
            training.gradient_accumulation_steps,
            1,
            "a step is one batch (which may be larger, since no activations are kept)",
        ),
    }
    for name, (value, suitable, why) in wanted.items():
        if value != suitable:
            yield name, value, why


def _check_private(args: TrainingPlan) -> None:
    """Refuse what uses the data in other ways than by private steps."""
    sails, derta = args.sails, args.of(DertaOptions)
    if derta is not None and derta.used is not None:
        raise InputError(
            f"{derta.used} is {getattr(derta, derta.used)}, which makes several examples of a pair, and only single "
            "examples are private;\nleave it out, or train without dp_epsilon and dp_sigma"
        )
    if args.of(NearestRefusalOptions).nearest_refusal:
        raise InputError(
            "nearest_refusal is true, with which one row can change the response of others, and only single examples "
            "are private;\nleave it out, or train without dp_epsilon and dp_sigma"
        )
    if sails.initializer.needs_data or (sails.uses_subspace and sails.subspace_path is None):
        raise InputError(
            f"--init {sails.init} reads the training data before the private steps, so that the result would not be "
            "private;\nuse --init default, or give --subspace_path with a subspace that sails discover found in public "
            "data"
        )
