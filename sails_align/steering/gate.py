"""Steer only while a guard calls the prompt or the response harmful, with hysteresis: the gate of GSAE.

p = sigmoid(score) is the guard's probability of harm. Stage 1 reads it at the last token of the prompt: from
`gate_prompt` on, the response is steered. Stage 2 reads it at every `gate_every`-th token of the response:

    NORMAL -> ELEVATED at a p of at least `gate_high`; -> LOCKDOWN at the `gate_high_steps`-th one in a row
    back by one state at the `gate_low_steps`-th p in a row that is at most `gate_low`

and multiplies what the steering changes by 1.5 (ELEVATED) or 2 (LOCKDOWN), also if stage 1 saw nothing. A reading has
its effect from the next token on. Tokens of the prompt are never steered. With `gate_prefix`, a response whose prompt
stage 1 called harmful begins with that text: the logits of its first tokens allow nothing else. From arXiv 2512.06655,
where p is that of a random forest on SAE latents.

Shapes: B batch, S sequence, D d_model, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from sails_align.core.errors import InputError
from sails_align.guards.guard import Guard
from sails_align.models.hooks import HiddenEdit, decoder_layers, edited
from sails_align.steering.options import SteeringOptions


class Level(IntEnum):
    """How strongly a response is steered."""

    NORMAL = 0
    ELEVATED = 1
    LOCKDOWN = 2


FACTORS = {Level.ELEVATED: 1.5, Level.LOCKDOWN: 2.0}
"""Of what the steering changes."""


@dataclass(frozen=True)
class GateState:
    """The state of one response."""

    fired: bool
    """Whether stage 1 called the prompt harmful."""
    level: Level = Level.NORMAL
    n_high: int = 0
    """High readings in a row."""
    n_low: int = 0
    """Low readings in a row since the level changed."""

    @property
    def factor(self) -> float:
        """By what the steering's change is multiplied; 0: it is not applied."""
        return FACTORS.get(self.level, float(self.fired))

    def after(self, p: float, options: SteeringOptions) -> "GateState":
        """Return the state after a reading."""
        if p >= options.gate_high:
            n_high = self.n_high + 1
            level = Level.LOCKDOWN if n_high >= options.gate_high_steps else max(self.level, Level.ELEVATED)
            return GateState(self.fired, level, n_high)
        n_low = self.n_low + 1 if p <= options.gate_low else 0
        if n_low < options.gate_low_steps:
            return GateState(self.fired, self.level, 0, n_low)
        return GateState(self.fired, Level(max(0, self.level - 1)))


class Gate:
    """The states of the responses of a batch, read and applied by hooks of a model that generates."""

    def __init__(self, guard: Guard, options: SteeringOptions, prefix: Sequence[int] = ()) -> None:
        """Take the guard, the options, and the token ids that a response to a harmful prompt begins with."""
        self._guard, self._options, self._prefix = guard, options, prefix
        self._n_tokens = 0
        self._factors_B = torch.zeros(0)
        self.states: list[GateState] = []

    def begin(self, block: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        """Take notice of a forward pass at its first block: a new prompt, or one token after what is cached.

        Raises `InputError` if the pass has no cache: each one would look like a prompt, and nothing would be steered.
        """
        if "past_key_values" in kwargs and kwargs["past_key_values"] is None:
            raise InputError(
                "the gate needs the cache of keys and values to tell the tokens of a response from its prompt, but the "
                "model runs without it;\nremove use_cache=False from the call, and from the model's generation config"
            )
        hidden_BSD = args[0] if args else kwargs["hidden_states"]
        is_prompt = hidden_BSD.shape[1] > 1
        self._n_tokens = 0 if is_prompt else self._n_tokens + 1
        self._factors_B = torch.tensor([] if is_prompt else [state.factor for state in self.states])

    def read(self, hidden_BSD: Tensor) -> Tensor:
        """Read the last tokens at the guard's layer, if it is time to."""
        if self._n_tokens % self._options.gate_every:
            return hidden_BSD
        scores_B = self._guard.projector.scores(hidden_BSD[:, -1].float().cpu())
        if not scores_B.isfinite().all():
            raise InputError("the gate's guard gave a score that is no number; check that the model is whole")
        p_B = scores_B.double().sigmoid().tolist()
        if self._n_tokens == 0:
            self.states = [GateState(p >= self._options.gate_prompt) for p in p_B]
        else:
            self.states = [state.after(p, self._options) for state, p in zip(self.states, p_B, strict=True)]
        return hidden_BSD

    def steer(self, edit: HiddenEdit, hidden_BSD: Tensor) -> Tensor:
        """Change the hidden states of the responses that are to be steered; the others stay bit for bit."""
        if not self._factors_B.any():
            return hidden_BSD
        factors_B11 = self._factors_B.to(hidden_BSD)[:, None, None]
        changed_BSD = hidden_BSD + factors_B11 * (edit(hidden_BSD) - hidden_BSD)
        if self._options.gate_clamp is not None:
            changed_BSD = changed_BSD.clamp(-self._options.gate_clamp, self._options.gate_clamp)
        return torch.where(factors_B11 > 0, changed_BSD, hidden_BSD)

    def begin_response(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Allow only the next token of the prefix, in responses to prompts that stage 1 called harmful."""
        fired_B = torch.tensor([state.fired for state in self.states])
        if self._n_tokens >= len(self._prefix) or not fired_B.any():
            return output
        token, logits_BSV = self._prefix[self._n_tokens], output.logits.clone()
        wanted_V = torch.full_like(logits_BSV[0, -1], -torch.inf)
        wanted_V[token] = 0
        logits_BSV[fired_B.to(logits_BSV.device), -1] = wanted_V
        output.logits = logits_BSV
        return output


@contextmanager
def gated(
    model: nn.Module,
    edits: Mapping[int, HiddenEdit],
    guard: Guard,
    options: SteeringOptions,
    prefix: Sequence[int] = (),
) -> Iterator[Gate]:
    """Apply edits of blocks' outputs to generated tokens as the gate allows, within the `with` block.

    `prefix` are the token ids of `gate_prefix`.
    """
    gate = Gate(guard, options, prefix)
    base = model.get_base_model() if isinstance(model, PeftModel) else model  # which `generate` calls
    handles = [
        decoder_layers(model)[0].register_forward_pre_hook(gate.begin, with_kwargs=True),
        base.register_forward_hook(gate.begin_response),
    ]
    steered = {layer: partial(gate.steer, edit) for layer, edit in edits.items()}
    try:
        with edited(model, {guard.about["layer"]: gate.read}), edited(model, steered):
            yield gate
    finally:
        for handle in handles:
            handle.remove()
