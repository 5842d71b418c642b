"""Options of trainings without gradients."""

import math
from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_least, check_positive, option

DEFAULTS = {"optim": "sgd", "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}
"""Of TRL's options, in place of its own, where there are no gradients."""


@dataclass(frozen=True)
class ZerothOrderOptions:
    """Options of trainings without gradients; private ones have a noise multiplier or an epsilon."""

    zeroth_order: bool = option(
        False,
        "Train the adapter without gradients: each step measures the loss on both sides of the weights along a random "
        "direction (MeZO). With --dp_epsilon or --dp_sigma, with differential privacy.",
    )
    zo_eps: float = option(1e-3, "How far to each side of the weights --zeroth_order measures the loss.")
    zo_directions: int = option(1, "Random directions of each step of --zeroth_order.")
    dp_epsilon: float | None = option(
        None,
        "Privacy to spend on the whole training, as the epsilon of (epsilon, delta) differential privacy; the noise "
        "follows from it. Default, or inf: none, without clipping.",
    )
    dp_sigma: float | None = option(
        None,
        "In place of --dp_epsilon: the noise multiplier, which is the standard deviation of the noise divided by "
        "--dp_clip. With 0, examples are clipped and there is no noise.",
    )
    dp_clip: float = option(
        3.0, "Slopes of the loss of one example along a direction are clipped to plus or minus this."
    )
    dp_delta: float = option(1e-5, "Delta of the privacy; must be below 1 divided by the number of examples.")
    dp_batch_size: int | None = option(
        None,
        "Expected number of examples of a private step: each example is in it with the same probability. Default: all "
        "examples are in every step.",
    )
    dp_noise_seed: int | None = option(
        None,
        "For experiments only: a seed that makes noise and batches repeatable. Whoever knows it can remove the noise. "
        "Default: a secret one.",
    )

    def __post_init__(self) -> None:
        check_positive(self, "zo_eps", "dp_clip", "dp_delta")
        check_least(self, zo_directions=1, dp_sigma=0, dp_batch_size=1, dp_noise_seed=0)
        if self.dp_delta >= 1:
            raise InputError(f"dp_delta is {self.dp_delta}, but it is a probability; choose one such as 1e-5")
        if self.dp_epsilon is not None and not self.dp_epsilon > 0:
            raise InputError(f"dp_epsilon is {self.dp_epsilon}; choose a value above 0, such as 4")
        if self.dp_epsilon is not None and self.dp_sigma is not None:
            raise InputError("dp_epsilon and dp_sigma are both given, but one follows from the other; leave one out")

    @property
    def is_clipped(self) -> bool:
        """Return whether steps are made as private ones are, though `dp_sigma` 0 adds no noise."""
        return self.dp_sigma is not None or (self.dp_epsilon is not None and math.isfinite(self.dp_epsilon))

    @property
    def is_private(self) -> bool:
        return self.is_clipped and self.dp_sigma != 0
