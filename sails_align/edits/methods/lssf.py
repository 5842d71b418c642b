"""LSSF: add the safety that further training has lost, within the subspace of safe answers (arXiv 2602.00038).

    W <- W + alpha P' (W_aligned - W_unaligned)

for every linear layer, where the unaligned model is the aligned one after training on harmful answers. P' projects onto
what the layer of the aligned model puts out while it refuses harmful requests (`subspaces`). Its rank differs from
layer to layer: the least that keeps a share eta of the entropy of the singular values.

The difference is taken from the linear layers of the decoder's blocks; embeddings, norms and the head stay.

Without a projector this is task arithmetic (RESTA without DARE). If the subspace were that of the difference itself, it
would be LoX's term: `low_rank.truncated`.

Shapes: O outputs and I inputs of a linear layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from sails_align.edits.apply import Edited, Finish, apply, check_new
from sails_align.edits.controls import Turn
from sails_align.edits.linears import Place, dense_model, linears_of, set_weight
from sails_align.edits.logits import checked_device
from sails_align.edits.options import LssfOptions
from sails_align.edits.requests import find_requests, response_batches
from sails_align.edits.subspaces import find_subspaces
from sails_align.edits.temporary import in_file
from sails_align.edits.weights import WeightDifference, Weights, open_three
from sails_align.models.blocks import Batch
from sails_align.models.load import load_spec_tokenizer


def edit(run: Path, output: Path, options: LssfOptions, finish: Finish | None = None) -> Edited:
    """Add the projected difference to a run, an adapter or a model that was trained from an aligned one.

    The result is a whole model. Raises `InputError` as `open_three`, `find_requests` and `apply`.
    """
    weights, aligned, unaligned = open_three(run, options.base_model, options.aligned_model, options.unaligned_model)
    check_new(output)
    device = checked_device(options.device)
    vectors = WeightDifference(aligned, unaligned)
    places = {name: place for name, place in linears_of(weights).items() if vectors.of(name) is not None}
    tokenizer = load_spec_tokenizer(aligned.spec)
    requests = find_requests("dataset_name", options, Path(aligned.spec.name), [aligned, weights], tokenizer)
    rows = requests.with_responses("dataset_name").some(options.n_prompts, options.data_seed)
    batches = response_batches(tokenizer, rows, options.max_length, requests.source)
    change = Lssf(weights, vectors, options)
    change.find(places, batches, dense_model(aligned, device, weights.dtype))
    change.notes.append(f"safe answers: {len(rows)} of {requests.source}, as they stand there")
    return apply("lssf", change, weights, output, options=options, finish=finish)


class Lssf:
    """Add to each linear layer the safety vector's part in its subspace."""

    def __init__(self, weights: Weights, vectors: WeightDifference, options: LssfOptions) -> None:
        self._weights, self._vectors, self._options = weights, vectors, options
        self._edited: dict[str, Tensor] = {}
        self.notes: list[str] = []

    def find(self, places: Mapping[str, Place], batches: Sequence[Batch], model: nn.Module) -> None:
        """Find the subspaces and edit the layers; they take the place of the aligned model's, which are needed no more.

        (Subspaces of a whole model would not fit into memory beside it.)
        """
        ranks, options = [], self._options
        for name, subspace in find_subspaces(model, places, batches, options.eta, options.a_1):
            ranks.append(subspace.rank)
            vector_OI = self._vectors.of(name)
            assert vector_OI is not None, "layers without a difference are left out"
            vector_OI = vector_OI.to(subspace.directions.device)
            change_OI = options.alpha * Turn.around(subspace.project, vector_OI, name, options.control_seed)
            edited_OI = self._weights.get(name).to(change_OI) + change_OI
            self._edited[name] = in_file(edited_OI.to(self._weights.stored(name).dtype))
            set_weight(places[name].of(model), self._edited[name])
        self.notes.append(
            f"ranks of {len(ranks)} subspaces: {min(ranks)} to {max(ranks)}"
            if ranks
            else "aligned and unaligned model have the same linear layers: nothing is changed"
        )

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        if name not in self._edited or self._options.alpha == 0:
            return None
        return self._edited.pop(name).float()
