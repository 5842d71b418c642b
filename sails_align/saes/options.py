"""Options of SAE trainings."""

from dataclasses import dataclass, fields, replace

from sails_align.core.errors import InputError
from sails_align.core.options import check_choices, check_least, check_positive, option
from sails_align.saes.algorithms import ALGORITHMS

FULL = "float32"
WARM_UP = 0.05
"""Share of the training steps in which learning rate and sparsity loss rise."""
GBA_WINDOW = 40_960
"""Tokens between two adaptations of the biases, in long trainings."""
N_ADAPTATIONS = 1000
"""Adaptations in short trainings; with the default gamma a bias needs some hundred to get to its place."""


@dataclass(frozen=True)
class SAETrainingOptions:
    """SAEs and their training."""

    d_sae: int | None = option(None, "Latents (default: 8 times d_model).")
    k: int = option(32, "Latents active at a token: exactly (topk) or on average (jumprelu, gba).")
    architecture: str = option("topk", f"One of {', '.join(ALGORITHMS.names())}.")
    lr: float | None = option(
        None,
        "Adam's learning rate (default: 2 / sqrt(d_model d_sae), which suits about 10^4 steps; "
        "choose less for many more).",
    )
    n_tokens: int = option(1_000_000, "Tokens to train on; texts are repeated if need be.")
    batch_size: int = option(512, "Tokens in a step.")
    context_size: int = option(128, "Tokens the model sees at once.")
    seed: int = option(0, "Seed of the initial weights, the order of the text, and the held-out part.")
    eval_tokens: int = option(100_000, "Held-out tokens to measure on; at most a tenth of the text.")
    buffer_tokens: int = option(65_536, "Tokens whose hidden states are in memory and shuffled together.")
    checkpoint_steps: int = option(2000, "Steps between checkpoints.")
    save_dtype: str = option(FULL, "Type of the saved weights: float32, float16 or bfloat16. They are used in float32.")
    gba_groups: int = option(10, "Number of groups of latents of --architecture gba.")
    gba_ratio: float = option(
        100.0, "Target frequency of the most active group over that of the least active one; 1: the same for all."
    )
    gba_gamma: float = option(0.01, "Size of an adaptation of the biases, as a share of the largest pre-activations.")
    gba_window: int | None = option(
        None,
        f"Tokens between two adaptations of the biases (default: {GBA_WINDOW}, or fewer for {N_ADAPTATIONS} "
        "adaptations in the training).",
    )
    graph_lambda: float = option(
        0.0, "Weight of the graph penalty on the decoder, relative to the squared error per coordinate; 0: none."
    )
    graph_threshold: float = option(
        0.6, "Coordinates of the residual stream are connected if their correlation is at least this."
    )
    graph_control_seed: int | None = option(
        None, "Make a control: the same graph, with its coordinates permuted at random by this seed."
    )

    def __post_init__(self) -> None:
        check_choices(self, {"architecture": ALGORITHMS.names(), "save_dtype": (FULL, "float16", "bfloat16")})
        check_least(self, d_sae=1, k=1, batch_size=1, context_size=2, eval_tokens=1, buffer_tokens=1)
        check_least(self, checkpoint_steps=1, gba_groups=1, gba_ratio=1, gba_gamma=0, gba_window=1, graph_lambda=0)
        check_positive(self, "graph_threshold")
        self._check_used()
        if self.d_sae is not None and self.k > self.d_sae:
            raise InputError(f"k is {self.k}, but there are only d_sae {self.d_sae} latents; choose a smaller k")
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"lr is {self.lr}; choose more than 0")
        if self.n_tokens < self.batch_size:
            raise InputError(f"n_tokens is {self.n_tokens}, less than one batch of {self.batch_size}; raise it")

    def _check_used(self) -> None:
        """Refuse options that the training would not use."""
        for prefix, is_used, remedy in self._parts():
            for field in fields(self):
                value = getattr(self, field.name)
                if field.name.startswith(prefix) and value != field.default and not is_used:
                    raise InputError(f"{field.name} is {value}, but it is used only with {remedy}; give both or none")

    def _parts(self) -> list[tuple[str, bool, str]]:
        """Return what the names of some options begin with, whether they are used, and with what."""
        return [
            ("gba_", self.architecture == "gba", "architecture gba"),
            ("graph_", self.graph_lambda > 0, "a graph_lambda above 0"),
        ]

    @property
    def unused(self) -> list[str]:
        """Return the names of the options that make no difference to this training."""
        prefixes = tuple(prefix for prefix, is_used, _ in self._parts() if not is_used)
        names = [field.name for field in fields(self) if prefixes and field.name.startswith(prefixes)]
        return [*names, *["save_dtype"] * (self.save_dtype == FULL)]

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch_size

    def target_frequencies(self) -> list[float]:
        """Return the target frequency of each group of a GBA SAE: a geometric series with the mean k / d_sae.

        Raises `InputError` if a target is above one half: biases of at most 0 leave a latent active at half of the
        tokens or fewer.
        """
        assert self.d_sae is not None
        last = max(self.gba_groups - 1, 1)
        series = [self.gba_ratio ** (-group / last) for group in range(self.gba_groups)]
        scale = self.k / self.d_sae * len(series) / sum(series)
        if scale > 0.5:
            raise InputError(
                f"k is {self.k}, so one of {self.gba_groups} groups of {self.d_sae} latents would have to be active at "
                f"{scale:.0%} of the tokens, but 50% is the most;\nchoose a smaller k or gba_ratio, or a larger d_sae"
            )
        return [scale * value for value in series]

    def for_width(self, d_model: int) -> "SAETrainingOptions":
        """Fill in the defaults that depend on the model's width."""
        d_sae = 8 * d_model if self.d_sae is None else self.d_sae
        filled = replace(self, d_sae=d_sae, lr=2 / (d_model * d_sae) ** 0.5 if self.lr is None else self.lr)
        if self.architecture != "gba":
            return filled
        filled.target_frequencies()
        window = max(self.batch_size, min(GBA_WINDOW, self.n_tokens // N_ADAPTATIONS))
        return replace(filled, gba_window=self.gba_window or window)
