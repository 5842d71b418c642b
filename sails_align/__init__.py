"""SAILS: safety alignment in a sparse-autoencoder-identified low-rank subspace (arXiv 2512.23260).

The names below are the Python API (docs/api.md). Each is imported when it is first used, so that importing the package
takes no time.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

# PEFT imports bitsandbytes wherever it is installed, and that warns of a kernel for CPUs that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# A module of the API: `sails.edits.lox(...)`. It imports nothing heavy, and neither do the two below.
import sails_align.edits  # noqa: E402

# Their models, prompts, judge and its wrappers are registered, by name.
import sails_align.smollm2  # noqa: E402
import sails_align.testbed  # noqa: E402, F401

if TYPE_CHECKING:
    from sails_align.core.errors import InputError
    from sails_align.edits import run as edit
    from sails_align.edits.methods.merge import merge_adapter as merge
    from sails_align.evaluation.evaluate import evaluate_model as evaluate
    from sails_align.evaluation.prompts.load import load_prompts
    from sails_align.evaluation.result import EvaluationResult, compare
    from sails_align.initializers.adapter import initialize
    from sails_align.initializers.discover import discover
    from sails_align.saes.sets import load_saes
    from sails_align.saes.train import train_saes
    from sails_align.steering.hook import steer
    from sails_align.subspace.basis import Subspace
    from sails_align.training.callbacks.decay import SubspaceDecay
    from sails_align.training.callbacks.drift import DriftCallback
    from sails_align.training.callbacks.ema import WeightAverage
    from sails_align.training.callbacks.learning_curve import LearningCurveCallback

_PUBLIC = {
    "DriftCallback": "training.callbacks.drift:DriftCallback",
    "EvaluationResult": "evaluation.result:EvaluationResult",
    "InputError": "core.errors:InputError",
    "LearningCurveCallback": "training.callbacks.learning_curve:LearningCurveCallback",
    "Subspace": "subspace.basis:Subspace",
    "SubspaceDecay": "training.callbacks.decay:SubspaceDecay",
    "WeightAverage": "training.callbacks.ema:WeightAverage",
    "compare": "evaluation.result:compare",
    "discover": "initializers.discover:discover",
    "edit": "edits:run",
    "evaluate": "evaluation.evaluate:evaluate_model",
    "initialize": "initializers.adapter:initialize",
    "load_prompts": "evaluation.prompts.load:load_prompts",
    "load_saes": "saes.sets:load_saes",
    "merge": "edits.methods.merge:merge_adapter",
    "steer": "steering.hook:steer",
    "train_saes": "saes.train:train_saes",
}
__all__ = [
    "DriftCallback",
    "EvaluationResult",
    "InputError",
    "LearningCurveCallback",
    "Subspace",
    "SubspaceDecay",
    "WeightAverage",
    "compare",
    "discover",
    "edit",
    "evaluate",
    "initialize",
    "load_prompts",
    "load_saes",
    "merge",
    "steer",
    "train_saes",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
