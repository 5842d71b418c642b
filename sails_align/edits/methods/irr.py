"""IRR: remove what further training changed against safety, and recalibrate the rest (arXiv 2412.11041).

    W <- W_aligned + recalibrated(delta without its unsafe entries),    delta = W - W_aligned

for every linear layer that the further training and the safety vector (aligned - unaligned) both changed. An entry of
delta is unsafe if its sign is not that of the safety vector; of these, a share `sparsity` with the lowest Fisher
information of the aligned model on refusals is kept (`recalibration`, `fisher`). The unaligned model is the aligned one
after training on harmful answers.

Layers are recalibrated in order, on texts of the task: the inputs of a block are those that come out of the blocks that
are already edited. Unlike upstream (pikepokenew/IRR), padding does not count among the inputs.

The further trained model is in memory as a whole; before it the aligned one, if some unsafe entries are kept.

Shapes: O outputs and I inputs of a linear layer, T tokens.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sails_align.core.progress import progress_bar
from sails_align.edits.apply import Edited, Finish, apply, check_new
from sails_align.edits.fisher import fisher_information
from sails_align.edits.linears import Place, dense_model, linears_of, set_weight
from sails_align.edits.logits import checked_device
from sails_align.edits.options import IrrOptions
from sails_align.edits.recalibration import thin
from sails_align.edits.requests import find_requests, response_batches
from sails_align.edits.temporary import in_file
from sails_align.edits.weights import WeightDifference, Weights, open_three
from sails_align.models.blocks import Batch, BlockByBlock
from sails_align.models.inputs import add_products
from sails_align.models.load import load_spec_tokenizer


def edit(run: Path, output: Path, options: IrrOptions, finish: Finish | None = None) -> Edited:
    """Remove and recalibrate the changes of a run, an adapter or a model that was trained from an aligned one.

    The result is a whole model. Raises `InputError` as `open_three`, `find_requests` and `apply`.
    """
    weights, aligned, unaligned = open_three(run, options.base_model, options.aligned_model, options.unaligned_model)
    check_new(output)
    device = checked_device(options.device)
    change = Irr(weights, aligned, WeightDifference(aligned, unaligned), options)
    places = change.places(linears_of(weights))
    sources = Sources(weights, aligned, options)
    texts = sources.texts(run) if options.recalibrate != "none" and options.sparsity < 1 else []
    refusals = sources.refusals() if 0 < options.sparsity < 1 else []
    if refusals:
        dtype = torch.float32 if aligned.dtype == torch.float16 else aligned.dtype  # whose small gradients would be 0
        change.fisher = _fisher(dense_model(aligned, device, dtype), places, refusals)
    if options.sparsity < 1:
        change.thin_all(places, dense_model(weights, device, weights.dtype) if texts else None, texts)
    change.notes.extend(sources.notes)
    return apply("irr", change, weights, output, options=options, finish=finish)


def _fisher(model: torch.nn.Module, places: Mapping[str, Place], refusals: list[Batch]) -> dict[str, Tensor]:
    weights = {name: place.of(model).weight for name, place in places.items()}
    return fisher_information(model, weights, refusals, remedy="use --device cpu, or --sparsity 0")


class Sources:
    """The data that is looked at, with a note on each."""

    def __init__(self, weights: Weights, aligned: Weights, options: IrrOptions) -> None:
        self._weights, self._aligned, self._options = weights, aligned, options
        self.notes: list[str] = []

    def texts(self, run: Path) -> list[Batch]:
        """Return texts of the task, all of whose tokens count."""
        return self._batches("task_dataset_name", run, self._weights, self._options.n_texts, whole=True)

    def refusals(self) -> list[Batch]:
        """Return harmful requests with safe answers, whose tokens count."""
        folder = Path(self._aligned.spec.name)
        return self._batches("dataset_name", folder, self._aligned, self._options.n_prompts, whole=False)

    def _batches(self, option: str, run: Path, of: Weights, n: int, *, whole: bool) -> list[Batch]:
        tokenizer = load_spec_tokenizer(of.spec)
        found = find_requests(option, self._options, run, [self._aligned, self._weights], tokenizer)
        rows = found.with_responses(option).some(n, self._options.data_seed)
        self.notes.append(f"{'texts of the task' if whole else 'safe answers'}: {len(rows)} of {found.source}")
        return response_batches(tokenizer, rows, self._options.max_length, found.source, whole=whole)


class Irr:
    """Remove and recalibrate the changes of linear layers."""

    def __init__(self, weights: Weights, aligned: Weights, vectors: WeightDifference, options: IrrOptions) -> None:
        self._weights, self._aligned, self._vectors, self._options = weights, aligned, vectors, options
        self._deltas = WeightDifference(weights, aligned)
        self._edited: dict[str, Tensor] = {}
        self.fisher: Mapping[str, Tensor] | None = None
        self.notes: list[str] = []

    def places(self, linears: Mapping[str, Place]) -> dict[str, Place]:
        """Return those that both the further training and the safety vector changed."""
        changed = {name: place for name, place in linears.items() if self._deltas.of(name) is not None}
        found = {name: place for name, place in changed.items() if self._vectors.of(name) is not None}
        if len(found) < len(changed):
            n = len(changed) - len(found)
            self.notes.append(f"{n} of {len(changed)} changed layers stay, since the safety vector is zero there")
        return found

    def thin_all(self, places: Mapping[str, Place], model: torch.nn.Module | None, texts: list[Batch]) -> None:
        """Remove and recalibrate in order; `model` is the further trained one, edited in place (None: no inputs)."""
        n_removed = n_entries = 0
        runner = None if model is None else BlockByBlock(model, texts)
        with progress_bar(shown=True) as bar, torch.no_grad():
            task = bar.add_task("removing and recalibrating", total=len(places))
            for block in sorted({place.block for place in places.values()}):
                named = {place.path: name for name, place in places.items() if place.block == block}
                grams = {} if runner is None else _grams(runner, block, named)
                for path, name in named.items():
                    removed_OI = self._thin(name, grams.pop(path, None))
                    n_removed, n_entries = n_removed + int(removed_OI.sum()), n_entries + removed_OI.numel()
                    if model is not None and name in self._edited:
                        set_weight(places[name].of(model), self._edited[name])
                    bar.advance(task)
        self.notes.append(f"removed {n_removed / max(n_entries, 1):.1%} of the entries of {len(places)} layers")

    def _thin(self, name: str, gram_II: Tensor | None) -> Tensor:
        """Edit a layer; return which entries (O, I) are removed."""
        delta_OI, vector_OI = self._deltas.of(name), self._vectors.of(name)
        assert delta_OI is not None
        assert vector_OI is not None
        device = "cpu" if gram_II is None else gram_II.device
        fisher_OI = None if self.fisher is None else self.fisher[name].to(device)
        thinned = thin(delta_OI.to(device), vector_OI.to(device), fisher_OI, gram_II, self._options, name)
        if thinned.removed.any():
            edited_OI = self._aligned.get(name).double() + thinned.delta.cpu()
            self._edited[name] = in_file(edited_OI.to(self._weights.stored(name).dtype))
        return thinned.removed

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        return self._edited.pop(name).float() if name in self._edited else None


def _grams(runner: BlockByBlock, block: int, paths: Mapping[str, str]) -> dict[str, Tensor]:
    """Go to a block; return the sum of the outer products (I, I) of each layer's inputs, float64."""
    while runner.block < block:
        runner.advance()
    grams: dict[str, Tensor] = {}
    runner.watch(paths, partial(add_products, grams))
    return grams
