"""GCG: search for a suffix after which a model begins its answer as wanted (Zou et al. 2023, arXiv 2307.15043).

Every step takes the gradient of the target's loss with respect to the one-hot tokens of the suffix, picks for every
position the `topk` tokens that should lower it most, draws `search_width` suffixes with one token replaced by one of
these, and goes on with the best of them (Algorithm 1). With several prompts, the losses and the normalised gradients
are summed, and the next prompt is added once the suffix works on all those before it (Algorithm 2).

Shapes: A allowed tokens, B candidates, D d_model, K topk, N suffix tokens, S sequence, T target tokens, V vocabulary.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import content_hash
from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.core.progress import progress_bar
from sails_align.evaluation.attacks import Setting
from sails_align.evaluation.attacks.options import GcgOptions
from sails_align.evaluation.attacks.suffix_tokens import Frame, allowed_tokens, make_frame, surviving, texts_around
from sails_align.evaluation.attacks.wrappers import with_suffix
from sails_align.evaluation.backends.local_model import Batches, is_out_of_memory
from sails_align.evaluation.records import Prompt
from sails_align.models.generation import context_length
from sails_align.models.hooks import evaluation_mode
from sails_align.models.load import load_model, load_spec_tokenizer

FORMAT = 1
SAVE_EVERY = 10
"""Steps between two writings of the state."""
START = "!"
"""The token that the first suffix repeats, as in the paper; if the tokenizer lacks it, the seed draws another."""
CHUNK = 16_384
"""Embeddings looked up at once: all of a vocabulary of 256,000 would take gigabytes."""


@dataclass(frozen=True)
class GcgResult:
    """The best suffix of all that were tried: one that matches before one that does not, then by loss."""

    suffix: str
    """Text, for `wrappers.with_suffix`."""
    loss: float
    """Mean cross-entropy of a token of the target (nats); of several prompts, the mean over those reached."""
    matched: bool
    """Whether the greedy answers to all prompts begin with their targets."""
    losses: list[float]
    """The loss of the best suffix of each step."""
    n_evaluations: int
    """Number of suffixes scored, times the prompts they were scored on."""
    n_reached: int
    """Number of prompts that the search reached (Algorithm 2)."""


@dataclass
class _State:
    """The state of a search: all that its next step depends on."""

    suffix_ids: list[int]
    best_ids: list[int]
    best_loss: float = float("inf")
    matched: bool = False
    losses: list[float] = field(default_factory=list)
    n_evaluations: int = 0
    n_active: int = 1


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[tuple[Prompt, str]],
    options: GcgOptions,
    *,
    seed: int = 0,
    batch_size: int = 128,
    state_path: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> GcgResult:
    """Search for a suffix after which a model begins its answers to prompts with their targets.

    The same call gives the same result, also if it was killed in between and resumes from its state.

    Args:
        model: a causal language model, with or without an adapter; mode and weights are left as they are.
        tokenizer: its tokenizer, with a chat template.
        targets: prompts, and how the wanted answer to each begins; with several, the suffix is a universal one.
        options: the budget.
        seed: of the draws.
        batch_size: suffixes in one forward pass; halved when memory runs out.
        state_path: JSON file to resume from and to write to; one for each model and search.
        on_step: called after each step with its number (from 1) and loss, and once with the step it resumes from.

    Raises:
        InputError: if tokenizer, prompts or state cannot be used, or memory is too small for one suffix.
    """
    if not targets:
        raise InputError("no prompts to attack; give at least one")
    try:
        with evaluation_mode(model):
            run = _Search(model, tokenizer, targets, options, seed, batch_size)
            state = run.start(state_path)
            if state.losses:
                on_step(len(state.losses), state.losses[-1])
            while not run.ended(state):
                run.step(state)
                if state_path and (len(state.losses) % SAVE_EVERY == 0 or run.ended(state)):
                    write_json(state_path, {"format": FORMAT, "key": run.key, **asdict(state)})
                on_step(len(state.losses), state.losses[-1])
            return run.result(state)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory() from error


def _out_of_memory() -> InputError:
    return InputError(
        "memory ran out with a single suffix;\ngive --dtype bfloat16, a shorter prompt, or a larger device"
    )


class _Search:
    """The steps of a search, and what stays the same from step to step."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        targets: Sequence[tuple[Prompt, str]],
        options: GcgOptions,
        seed: int,
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.options, self.seed = model, tokenizer, options, seed
        self.batches = Batches(batch_size)
        self.embed = model.get_input_embeddings()
        self.device = next(self.embed.parameters()).device
        context = context_length(model.config)
        if options.suffix_length >= context:
            raise InputError(
                f"suffix_length is {options.suffix_length}, and the model's context is {context} tokens; choose less"
            )
        first = options.initial_suffix or self._first_suffix(*targets[0])
        framed = [make_frame(tokenizer, prompt, first, target) for prompt, target in targets]
        self.frames = [frame for frame, _ in framed]
        self.first_ids = framed[0][1]
        longest = max(len(frame.ids(self.first_ids)) + len(frame.target_ids) for frame in self.frames)
        if longest > context:
            raise InputError(
                f"a prompt with its suffix and target is {longest} tokens long, and the model's context is {context};\n"
                "leave out long prompts, or give a shorter --suffix_length"
            )
        if not surviving(tokenizer, self.frames, [self.first_ids]):
            raise InputError(
                f"the suffix {first!r} does not keep its tokens after every prompt;\n"
                "give plain words, without white space around them, with --initial_suffix"
            )
        frames = [asdict(frame) for frame in self.frames]
        self.key = content_hash({"options": asdict(options), "seed": seed, "frames": frames, "first": self.first_ids})

    @cached_property
    def allowed(self) -> list[int]:
        """The ids of tokens for suffixes; for a large vocabulary this takes a second."""
        return allowed_tokens(self.tokenizer, len(next(self.embed.parameters())))

    def _first_suffix(self, prompt: Prompt, target: str) -> str:
        """Return a repeated token: the first whose repetition gives the same tokens again after conversion to text."""
        n = self.options.suffix_length
        for word in self._words():
            suffix = " ".join([word] * n)
            frame, ids = make_frame(self.tokenizer, prompt, suffix, target)
            if len(ids) == n and surviving(self.tokenizer, [frame], [ids]):
                return suffix
        raise InputError(
            f"{self.tokenizer.name_or_path} has no printable token that makes a suffix when it is repeated {n} times;\n"
            "give what to start from with --initial_suffix"
        )

    def _words(self) -> Iterator[str]:
        yield START
        order = np.random.default_rng([self.seed, 0]).permutation(self.allowed)
        yield from (self.tokenizer.batch_decode([[int(token_id)]])[0].strip() for token_id in order)

    def start(self, path: Path | None) -> _State:
        """Return the state in the file; if there is none, that before the first step."""
        if path is None or not path.is_file():
            state = _State(self.first_ids, self.first_ids)
            self._score_best(state)
            return state
        try:
            values = dict(json.loads(path.read_text(encoding="utf-8")))
            written_for = values.pop("format"), values.pop("key")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is no state of a search ({error}); delete it to search anew") from error
        if written_for != (FORMAT, self.key):
            raise InputError(
                f"{path} is the state of a search with other prompts or options; delete it, or give another path"
            )
        return _State(**values)

    def matched_all(self, state: _State) -> bool:
        """Return whether the best suffix works on all prompts."""
        return state.matched and state.n_active == len(self.frames)

    def ended(self, state: _State) -> bool:
        """Return whether there is nothing more to do."""
        is_done = self.options.stop_when_matched and self.matched_all(state)
        return is_done or len(state.losses) >= self.options.n_steps

    def step(self, state: _State) -> None:
        """Run the loop body of Algorithm 1, then that of Algorithm 2."""
        candidates = surviving(self.tokenizer, self.frames, self._candidates(state))
        if not candidates:  # the next step draws others
            state.losses.append(state.losses[-1] if state.losses else state.best_loss)
            return
        loss_B, matched_B = self._score(state, [ids for ids, _ in candidates])
        lowest = int(loss_B.argmin())
        # A suffix that matches is kept, even if the search goes on with another one.
        best = int(torch.where(matched_B, loss_B, torch.inf).argmin()) if matched_B.any() else lowest
        if (not bool(matched_B[best]), float(loss_B[best])) < (not state.matched, state.best_loss):
            state.best_ids = candidates[best][0]
            state.best_loss, state.matched = float(loss_B[best]), bool(matched_B[best])
        state.suffix_ids = candidates[lowest][0]
        state.losses.append(float(loss_B[lowest]))
        while state.matched and state.n_active < len(self.frames):
            state.n_active += 1
            state.suffix_ids = state.best_ids
            self._score_best(state)

    def _score_best(self, state: _State) -> None:
        loss_B, matched_B = self._score(state, [state.best_ids])
        state.best_loss, state.matched = float(loss_B[0]), bool(matched_B[0])

    def _candidates(self, state: _State) -> list[list[int]]:
        """Draw distinct suffixes with one token replaced. The draws depend on seed and step alone."""
        gradient_NA = self._gradient(state)
        topk_NK = (-gradient_NA).topk(min(self.options.topk, len(self.allowed)), dim=1).indices.tolist()
        rng = np.random.default_rng([self.seed, len(state.losses) + 1])
        positions_B = rng.integers(len(topk_NK), size=self.options.search_width)
        choices_B = rng.integers(len(topk_NK[0]), size=self.options.search_width)
        drawn: dict[tuple[int, ...], None] = {}
        for position, choice in zip(positions_B, choices_B, strict=True):
            ids = list(state.suffix_ids)
            ids[position] = self.allowed[topk_NK[position][choice]]
            drawn[tuple(ids)] = None
        return [list(ids) for ids in drawn]

    def _gradient(self, state: _State) -> torch.Tensor:
        """Return the loss's gradient by the suffix's one-hot tokens (N, A), with unit norm at each position.

        An embedding is linear in its one-hot token, so this is the gradient by the embedding times all embeddings;
        they come out of the embedding module, since some (Gemma's) scale what they look up.
        """
        total_NA = torch.zeros(len(state.suffix_ids), len(self.allowed), device=self.device)
        allowed_A = torch.tensor(self.allowed, device=self.device)
        for frame in self.frames[: state.n_active]:
            ids_S = torch.tensor(frame.ids(state.suffix_ids) + frame.target_ids, device=self.device)
            embeds_SD = self.embed(ids_S).detach().requires_grad_()
            loss_B, _ = self._losses(frame, inputs_embeds=embeds_SD[None])
            (gradient_SD,) = torch.autograd.grad(loss_B.sum(), embeds_SD)
            start = len(frame.before_ids)
            gradient_ND = gradient_SD[start : start + len(state.suffix_ids)].float()
            with torch.no_grad():
                parts = [gradient_ND @ self.embed(chunk).float().T for chunk in allowed_A.split(CHUNK)]
            total_NA += functional.normalize(torch.cat(parts, dim=1), dim=1)
        return total_NA

    @torch.no_grad()
    def _score(self, state: _State, candidates: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss over the active prompts (B,), and whether all their answers begin as wanted (B,)."""
        loss_B = torch.zeros(len(candidates))
        matched_B = torch.ones(len(candidates), dtype=torch.bool)
        frames = self.frames[: state.n_active]
        for frame in frames:
            start = 0
            for batch, scored in self.batches.run(partial(self._losses_of, frame), candidates):
                if scored is None:
                    raise _out_of_memory()
                part = slice(start, start + len(batch))
                loss_B[part] += scored[0].cpu() / len(frames)
                matched_B[part] &= scored[1].cpu()
                start += len(batch)
        state.n_evaluations += len(candidates) * len(frames)
        return loss_B, matched_B

    def _losses_of(self, frame: Frame, suffixes: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [frame.ids(ids) + frame.target_ids for ids in suffixes]
        return self._losses(frame, input_ids=torch.tensor(rows, device=self.device))

    def _losses(self, frame: Frame, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the target's mean cross-entropy (B,), and whether each of its tokens is the likeliest (B,)."""
        n = len(frame.target_ids)
        logits_BTV = self.model(**inputs, logits_to_keep=n + 1, use_cache=False).logits[:, -n - 1 : -1].float()
        target_BT = torch.tensor(frame.target_ids, device=logits_BTV.device).expand(len(logits_BTV), n)
        loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
        return loss_BT.mean(dim=1), (logits_BTV.argmax(dim=-1) == target_BT).all(dim=1)

    def result(self, state: _State) -> GcgResult:
        """Return what was found."""
        ((_, suffix),) = surviving(self.tokenizer, self.frames, [state.best_ids])
        matched = self.matched_all(state)
        return GcgResult(suffix, state.best_loss, matched, state.losses, state.n_evaluations, state.n_active)


def attack(options: GcgOptions, prompts: Sequence[Prompt], setting: Setting) -> list[Prompt]:
    """Search for suffixes, and add them to the prompts. Searches that were stopped or done before are resumed.

    Raises `InputError` if the model cannot be loaded, or its chat template refuses a prompt.
    """
    assert setting.spec is not None
    targets = [(prompt, str(prompt.meta.get("target") or options.target)) for prompt in prompts]
    groups = [targets] if options.universal else [[target] for target in targets]
    model, tokenizer = load_model(setting.spec), load_spec_tokenizer(setting.spec)
    for prompt in prompts:  # before the first search, which may take hours
        texts_around(tokenizer, prompt)
    attacked: list[Prompt] = []
    with progress_bar(setting.progress) as bar:
        all_searches = bar.add_task("searches", total=len(groups))
        steps = bar.add_task("steps", total=options.n_steps)
        for group in groups:
            bar.reset(steps)
            what = [setting.spec.identity, setting.spec.dtype, asdict(options), setting.seed]
            what += [[list(prompt.messages), target] for prompt, target in group]
            found = search(
                model,
                tokenizer,
                group,
                options,
                seed=setting.seed,
                batch_size=setting.batch_size,
                state_path=setting.folder / "searches" / f"{content_hash(what)[:16]}.json",
                on_step=lambda step, loss: bar.update(steps, completed=step, description=f"steps (loss {loss:.2f})"),
            )
            bar.advance(all_searches)
            about = {"loss": found.loss, "matched": found.matched, "n_steps": len(found.losses)}
            for prompt, target in group:
                with_it = with_suffix(prompt, found.suffix, "gcg")
                attacked.append(replace(with_it, meta={**with_it.meta, **about, "target": target}))
    return attacked
