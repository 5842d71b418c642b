"""Train only the entries of the weights with the largest gradients (`--sift_rate`).

SIFT (arXiv 2312.11875) fine-tunes few entries of each matrix: the int(rate * n) + 1 of its n entries with the largest
|gradient| of the first batches. Here the gradients of `sift_select_steps` batches are summed before the first step, and
no batch of the training is used up. All other entries keep their values (`frozen`): neither the optimizer's moments nor
weight decay see them.

As a guard of a model's safety (ours), entries with the largest Fisher information on harmful requests with refusals are
not chosen, so that further training cannot touch them.

<output_dir>/sparse_delta.safetensors     what was trained (`sparse_delta`)
<checkpoint>/sift.safetensors             flat indices of the trained entries of each parameter
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from sails_align.core.distributed import from_main
from sails_align.core.errors import InputError
from sails_align.core.log import say
from sails_align.edits.fisher import fisher_information
from sails_align.edits.requests import named_requests, response_batches
from sails_align.models.blocks import Batch
from sails_align.training.callbacks.frozen import Frozen, FrozenEntries
from sails_align.training.callbacks.options import SiftOptions
from sails_align.training.callbacks.reporting import ReportingCallback
from sails_align.training.callbacks.resumed import checkpoint_of, read_tensors, resumed_from
from sails_align.training.callbacks.sparse_delta import FILE as DELTA
from sails_align.training.callbacks.sparse_delta import narrow, save_delta

FILE = "sift.safetensors"
N_SAFETY = 128
"""Harmful requests with refusals for the Fisher information, at most."""


def attach(trainer: Any, init: object, plan: Any) -> None:
    """Add the callback to trainings that ask for it."""
    options = plan.of(SiftOptions)
    if options.sift_rate is None:
        return
    if options.sift_modules is not None:
        _train_only(trainer.model, options.sift_modules)
    refusals = []
    if options.sift_safety_dataset_name is not None:
        tokenizer, name, seed = trainer.processing_class, options.sift_safety_dataset_name, plan.training.seed
        rows = named_requests(name, "harmful", tokenizer).with_responses("sift_safety_dataset_name")
        length = plan.training.max_length or 1024
        refusals = response_batches(tokenizer, rows.some(N_SAFETY, seed), length, name)
    trainer.add_callback(Sift(trainer, options, refusals))


def quota(n: int, rate: float) -> int:
    """Return how many of n entries are trained: the paper's int(rate * n) + 1, but not more than there are."""
    return min(int(rate * n) + 1, n)


def largest(score: Tensor, n: int, forbidden: Tensor | None = None) -> Tensor:
    """Return the flat indices (n,) of the entries with the largest score, in order, without the forbidden ones.

    Args:
        score: of each entry, of any shape.
        n: how many; if fewer are allowed, all of these.
        forbidden: flat indices of entries that are not chosen.
    """
    flat = score.flatten()
    if forbidden is not None:
        flat = flat.index_fill(0, forbidden, -torch.inf)
        n = min(n, len(flat) - len(forbidden))
    return flat.topk(n).indices.sort().values


class Sift(Frozen, ReportingCallback):
    """Choose the entries that train when training begins, and keep all others as they are."""

    def __init__(self, trainer: Any, options: SiftOptions, refusals: Sequence[Batch] = ()) -> None:
        """Take the trainer whose loss chooses the entries, and harmful requests with refusals to guard, if any."""
        super().__init__("sift_rate", ())
        self._trainer, self._options, self._refusals = trainer, options, refusals
        self._trained: dict[str, nn.Parameter] = {}
        self.entries: dict[str, Tensor] = {}
        "Name of the parameter -> sorted flat indices of the entries that train."

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trained = {name: p for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        if state.global_step > 0:
            self.entries = _load(resumed_from(args, state) / FILE, self._trained)
        else:
            chosen = self._choose()
            self.entries = from_main(lambda: chosen)  # rounding must not let processes train different entries
        self._parts = [FrozenEntries(p, _is_frozen(p, self.entries[name])) for name, p in self._trained.items()]
        found = self.report()["sift"]
        say(f"    SIFT: {found['trained_entries']:,} of {found['entries']:,} entries train")
        super().on_train_begin(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = {name: narrow(index_N, self._trained[name].numel()) for name, index_N in self.entries.items()}
            save_file(kept, checkpoint_of(args, state) / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            save_delta(Path(str(args.output_dir)) / DELTA, self._trained, self.entries)

    def report(self) -> dict[str, Any]:
        """Return how many entries train, of how many in the whole model."""
        n_trained = sum(len(index_N) for index_N in self.entries.values())
        n = sum(parameter.numel() for parameter in self._trainer.model.parameters())
        return {"sift": {"trained_entries": n_trained, "entries": n, "share": n_trained / n}}

    def _choose(self) -> dict[str, Tensor]:
        """Return the entries to train, on the CPU."""
        options, fisher = self._options, self._fisher()
        scores, found = self._scores(), {}
        for name, parameter in self._trained.items():
            n = parameter.numel()
            forbidden = None if fisher is None else largest(fisher[name], int(options.sift_forbidden * n))
            found[name] = largest(scores[name], quota(n, options.sift_rate or 0), forbidden)
        return found

    def _scores(self) -> dict[str, Tensor]:
        """Return what the entries are ranked by, on the CPU."""
        if self._options.sift_entries == "random":
            generator = torch.Generator().manual_seed(self._trainer.args.seed)
            return {name: torch.rand(p.shape, generator=generator) for name, p in self._trained.items()}
        sign = 1 if self._options.sift_entries == "largest" else -1
        return {name: sign * of.abs() for name, of in _summed_gradients(self._trainer, self._options).items()}

    def _fisher(self) -> dict[str, Tensor] | None:
        if not self._refusals:
            return None
        remedy = "leave --sift_safety_dataset_name out, or train on the CPU"
        return fisher_information(self._trainer.model, self._trained, self._refusals, remedy=remedy)


def _summed_gradients(trainer: Any, options: SiftOptions) -> dict[str, Tensor]:
    """Return the summed gradients of the trainer's loss on batches of its data, in float32 on the CPU.

    The model, the random state and the trainer's logs are left as they were.
    """
    args, data, model = trainer.args, trainer.train_dataset, trainer.model
    size = args.per_device_train_batch_size
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).tolist()
    n_tokens, was_training = trainer._total_train_tokens, model.training
    model.train()  # TRL's loss in evaluations is another one, and keeps all activations
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        for start in range(0, min(options.sift_select_steps * size, len(order)), size):
            batch = trainer.data_collator([data[row] for row in order[start : start + size]])
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
            loss.backward()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = {name: torch.zeros(p.shape) if p.grad is None else p.grad.float().cpu() for name, p in named}
    model.zero_grad()
    model.train(was_training)
    trainer._total_train_tokens = n_tokens
    trainer._metrics["train"].clear()
    return found


def _train_only(model: nn.Module, modules: Sequence[str]) -> None:
    """Freeze all parameters that are not those of modules with the given names."""
    named = dict(model.named_parameters())
    of_modules = {name: next((m for m in modules if m in name.split(".")[:-1]), None) for name in named}
    if missing := set(modules) - set(of_modules.values()):
        raise InputError(
            f"sift_modules has {min(missing)}, which no module of the model is called; give others, such as q_proj"
        )
    for name, parameter in named.items():
        parameter.requires_grad_(parameter.requires_grad and of_modules[name] is not None)


def _is_frozen(parameter: nn.Parameter, index_N: Tensor) -> Tensor:
    """Return which entries of a parameter are not among the given ones, of its shape."""
    is_frozen = torch.ones(parameter.numel(), dtype=torch.bool, device=parameter.device)
    is_frozen[index_N.to(parameter.device)] = False
    return is_frozen.view(parameter.shape)


def _load(path: Path, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the entries of a checkpoint."""
    loaded = {name: index_N.long() for name, index_N in read_tensors(path, "with the same trained entries").items()}
    if loaded.keys() != trained.keys() or any(of.max() >= trained[name].numel() for name, of in loaded.items()):
        raise InputError(f"{path} is of other weights than are trained here; resume with the options of its run")
    return loaded
