"""Apply an edit to every tensor of a model, and write the result: an adapter where the edit allows it, else a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.core.files import atomic_folder, write_json
from sails_align.core.progress import progress_bar
from sails_align.edits.controls import Turn
from sails_align.edits.logits import checked_device, logits_of, random_ids
from sails_align.edits.options import EditOptions
from sails_align.edits.weights import PART, Update, Weights, squared_norm, write_adapter, write_model
from sails_align.models.load import load_model
from sails_align.models.quantized import quantization_of_run
from sails_align.models.resolve import resolve_model

EDIT_FILE = "edit.json"
"""In the edited folder: which model was edited with which options, what was changed, and what the edit found."""
Finish = Callable[[Path], object]


class TensorEdit(Protocol):
    """How an edit changes single tensors of a model. An adapter counts as the model that it is merged into."""

    @property
    def notes(self) -> list[str]:
        """What the user should know, once the tensors are edited."""
        ...

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        """Return the new values of a tensor of the model, in float32; None leaves it as it is."""
        ...


@runtime_checkable
class AdapterEdit(TensorEdit, Protocol):
    """An edit that can give the edited adapter exactly, of the same rank.

    Shapes: O outputs of a linear layer, R rank.
    """

    keeps_adapter: bool
    """Whether it does with these options."""

    def update(self, name: str, update: Update) -> Tensor | None:
        """Return the new lora_B (O, R) of an adapter's update, in float32; None leaves it as it is."""
        ...


@dataclass(frozen=True)
class Edited:
    """What an edit did."""

    method: str
    model: str
    """As the user called it."""
    options: EditOptions
    folder: Path
    is_adapter: bool
    n_changed: int
    n_tensors: int
    """Of the model; of an adapter, those that it updates."""
    share: float
    """Frobenius norm of the change over that of the weights (of an adapter: of its updates)."""
    difference: float
    """Largest absolute difference of logits between the model before and after, on random tokens."""
    largest_logit: float
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return what is written beside the weights, for the model card."""
        return {
            "method": self.method,
            "model": self.model,
            "options": {name: value for name, value in asdict(self.options).items() if name != "device"},
            "changed": f"{self.n_changed} of {self.n_tensors} {'updates' if self.is_adapter else 'tensors'}",
            "share": self.share,
            "notes": list(self.notes),
        }

    def report(self) -> Iterator[str]:
        """Yield the lines that the command prints."""
        kind, of = ("adapter", "updates") if self.is_adapter else ("model", "tensors")
        yield f"{self.method:<9} {self.folder}/ ({kind}; {self.n_changed} of {self.n_tensors} {of} changed)"
        yield f"change    {self.share:.2%} of the {of} in the Frobenius norm"
        yield (
            f"logits    differ from the model's before by at most {self.difference:.2g} (largest logit "
            f"{self.largest_logit:.1f}; random tokens)"
        )
        yield from (f"note      {note}" for note in self.notes)


def apply(
    method: str,
    edit: TensorEdit,
    weights: Weights,
    output: Path,
    *,
    options: EditOptions,
    finish: Finish | None = None,
    turn_seed: int | None = None,
) -> Edited:
    """Apply an edit and write the result with its tokenizer.

    Args:
        method: name of the edit.
        edit: how it changes tensors.
        weights: the model.
        output: the folder to make; it appears when all is written.
        options: `device`, where both models are run on a few tokens, one after the other; all of them are recorded.
        finish: called with the folder before it appears, to add a model card.
        turn_seed: turn each change at random (`Turn`), as a control of edits that choose directions by no other way.

    Raises:
        InputError: if the output folder is not empty, or the device cannot be used.
    """
    check_new(output)
    device = checked_device(options.device)
    changes = _Changes()
    kept = edit if isinstance(edit, AdapterEdit) and edit.keeps_adapter and weights.adapter is not None else None
    keeps = kept is not None
    names = list(weights.updated) if keeps else weights.names
    with atomic_folder(output) as temporary, progress_bar(shown=True) as bar:
        task = bar.add_task(f"editing ({method})", total=len(names))

        def tensor(name: str, weight: Tensor) -> Tensor | None:
            new = changes.note(weight, _turned(name, weight, edit.tensor(name, weight), turn_seed))
            bar.advance(task)
            return new

        def update(name: str, update: Update) -> Tensor | None:
            assert kept is not None
            new_OR = _turned(name, update.B_OR, kept.update(name, update), turn_seed)
            new = None if new_OR is None else Update(update.A_RI, new_OR, update.scaling).dense()
            changes.note(update.dense(), new)
            bar.advance(task)
            return new_OR

        if keeps:
            write_adapter(weights, update, temporary)
        else:
            write_model(weights, tensor, temporary)
        logits = _logits(weights, temporary, device, keeps=keeps)
        edited = Edited(
            method,
            weights.spec.name,
            options,
            output,
            keeps,
            changes.n,
            len(names),
            changes.share,
            *logits,
            (*edit.notes, *_quantized_notes(weights)),
        )
        write_json(temporary / EDIT_FILE, edited.record())
        if finish is not None:
            finish(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes it private
    return edited


def _logits(weights: Weights, edited: Path, device: str, *, keeps: bool) -> tuple[float, float]:
    """Return how far the logits of the model and of the edited one are apart at most, and the model's largest."""
    ids_BS = random_ids(weights.config)
    before_BSV = logits_of(load_model(weights.spec, device), ids_BS)
    after = resolve_model(str(edited), weights.spec.base if keeps else None)
    after_BSV = logits_of(load_model(after, device), ids_BS)
    return (after_BSV - before_BSV).abs().max().item(), before_BSV.abs().max().item()


def check_new(output: Path) -> None:
    """Refuse an output folder that is not empty, with an `InputError`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty; give a new folder with --output")


def _quantized_notes(weights: Weights) -> list[str]:
    """Return a note for an adapter that was trained on a quantized base model (QLoRA), as merging has one."""
    if weights.adapter is None or quantization_of_run(weights.adapter.record) is None:
        return []
    return ["it was trained on a quantized base model, and is edited on the unquantized one; evaluate the edited model"]


def left_alone(names: Sequence[str]) -> list[str]:
    """Return a note on tensors that an edit of matrices left alone, though training changed them; none if no names."""
    if not names:
        return []
    return [
        f"{len(names)} changed tensors of more than 2 dimensions, such as fused experts, are left alone ({names[0]}"
        f"{', ...' if len(names) > 1 else ''}): this edit is of matrices"
    ]


def _turned(name: str, before: Tensor, after: Tensor | None, seed: int | None) -> Tensor | None:
    """Return `before` with the change turned at random; without a seed, with the change as it is."""
    if after is None or seed is None:
        return after
    return before + Turn.draw(len(before), name, seed).of(after - before)


def _parts(values: Tensor) -> Sequence[Tensor]:
    """Return the values in parts, of which copies in float64 are small."""
    return values.reshape(-1).split(PART)


@dataclass
class _Changes:
    """Sum up how far tensors moved."""

    n: int = 0
    changed: float = 0.0
    whole: float = 0.0

    def note(self, before: Tensor, after: Tensor | None) -> Tensor | None:
        self.whole += squared_norm(before)
        if after is not None:
            self.n += 1
            pairs = zip(_parts(before), _parts(after), strict=True)
            self.changed += sum((new - old).double().square().sum().item() for old, new in pairs)
        return after

    @property
    def share(self) -> float:
        return (self.changed / self.whole) ** 0.5 if self.whole else 0.0
