"""Callbacks of a training, one file each, attached in this order.

A callback's module has a function `attach(trainer, init, plan)`, which adds a `TrainerCallback` if the plan of the
training asks for one. `init` describes the adapter's initialization (None: in no subspace).
"""

from sails_align.core.registry import Entry, Registry
from sails_align.training.callbacks.options import (
    CladeOptions,
    DecayOptions,
    EmaOptions,
    FreezeUnitsOptions,
    SiftOptions,
)
from sails_align.training.zeroth_order.options import ZerothOrderOptions

CALLBACKS = Registry(
    "callback",
    {
        "clade": Entry(
            "sails_align.training.callbacks.clade:attach",
            "Train norms that depend on the category of the request.",
            CladeOptions,
        ),
        "drift": Entry(
            "sails_align.training.callbacks.drift:attach", "Log how far the adapter has moved out of its subspace."
        ),
        "decay": Entry(
            "sails_align.training.callbacks.decay:attach", "Pull the adapter back towards its subspace.", DecayOptions
        ),
        "freeze_units": Entry(
            "sails_align.training.callbacks.freeze_units:attach",
            "Freeze the channels that matter most for safety.",
            FreezeUnitsOptions,
        ),
        "ema": Entry(
            "sails_align.training.callbacks.ema:attach",
            "End with an average of the weights over the steps.",
            EmaOptions,
        ),
        # After the average, which takes the place of the weights when training ends.
        "sift": Entry(
            "sails_align.training.callbacks.sift:attach",
            "Train only the entries with the largest gradients.",
            SiftOptions,
        ),
        "zeroth_order": Entry(
            "sails_align.training.zeroth_order.trainer:attach",
            "Train without gradients; with differential privacy if an option sets it.",
            ZerothOrderOptions,
        ),
    },
)
