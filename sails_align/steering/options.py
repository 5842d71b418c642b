"""Options of steering."""

from dataclasses import dataclass, fields

from sails_align.core.errors import InputError
from sails_align.core.options import check_least, check_positive, option


@dataclass(frozen=True)
class SteeringOptions:
    """Steering of the residual stream while a model responds."""

    steer: str | None = option(None, "add (a direction of a subspace) or ablate (remove a subspace).")
    steer_subspace: str | None = option(None, "Folder of the subspace, such as `subspace` in a run's folder.")
    steer_strength: float | None = option(
        None,
        "add: norm of what is added, as a share of each hidden state's norm, negative to subtract (default 0.2); "
        "ablate: share that is removed (default 1).",
    )
    steer_layers: list[int] | None = option(None, "Layers to steer; default: all of the subspace.")
    steer_direction: int = option(0, "add: number of the direction in each basis; 0 is the most important one.")
    gate: str | None = option(
        None, "Folder of a guard (`sails guard fit`): steer only while its probability of harm is high."
    )
    gate_prompt: float = option(
        0.75, "Steer a response from its start if the prompt's probability of harm is at least this."
    )
    gate_every: int = option(4, "Tokens of a response between two readings of the probability.")
    gate_high: float = option(
        0.9, "A reading is high if its probability is at least this: the steering gets 1.5 times as strong."
    )
    gate_high_steps: int = option(6, "High readings in a row after which the steering is twice as strong.")
    gate_low: float = option(0.7, "A reading is low if its probability is at most this.")
    gate_low_steps: int = option(4, "Low readings in a row after which the steering gets weaker again, by one state.")
    gate_clamp: float | None = option(None, "Clip steered hidden states to this absolute value; default: do not.")
    gate_prefix: str | None = option(
        None,
        "Begin a response with this text, such as a refusal, if its prompt reaches `gate_prompt`; default: do not.",
    )

    def __post_init__(self) -> None:
        if (self.steer is None) != (self.steer_subspace is None):
            given, lacking = ("steer", "steer_subspace") if self.steer else ("steer_subspace", "steer")
            raise InputError(f"{given} is {getattr(self, given)}, but {lacking} is not given; give both, or none")
        if self.steer_strength is not None and not abs(self.steer_strength) < float("inf"):
            raise InputError(f"steer_strength is {self.steer_strength}; choose a finite number")
        if self.gate is not None and self.steer is None:
            raise InputError("gate is given, but there is no steering that it could gate; give --steer, too")
        for name in ("steer", "gate"):
            if getattr(self, name) is None and (changed := self._changed(f"{name}_")):
                raise InputError(f"{changed[0]} is given without {name}; add --{name}, or leave it out")
        if self.steer == "ablate" and self.steer_direction:
            raise InputError(
                f"steer_direction is {self.steer_direction}, but `--steer ablate` removes all directions; leave it out"
            )
        for name in ("gate_prompt", "gate_high", "gate_low"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, but it is a probability: choose 0 to 1")
        if self.gate_low >= self.gate_high:
            raise InputError(f"gate_low is {self.gate_low}; choose a value below gate_high ({self.gate_high})")
        check_least(self, gate_every=1, gate_high_steps=1, gate_low_steps=1)
        if self.gate_clamp is not None:
            check_positive(self, "gate_clamp")
        if self.gate_prefix is not None and not self.gate_prefix.strip():
            raise InputError("gate_prefix is empty; write how a response is to begin, or leave it out")
        if self.steer_direction < 0:
            raise InputError(f"steer_direction is {self.steer_direction}; choose 0 or more")

    def _changed(self, prefix: str) -> list[str]:
        """Return the options with a prefix that are not their defaults."""
        return [of.name for of in fields(self) if of.name.startswith(prefix) and getattr(self, of.name) != of.default]
