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

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sails_align.edits.apply import Edited, Finish, apply, check_new
from sails_align.edits.linears import dense_model, linears_of
from sails_align.edits.logits import checked_device
from sails_align.edits.options import LssfOptions
from sails_align.edits.requests import find_requests, response_batches
from sails_align.edits.subspaces import OutputSubspace, find_subspaces
from sails_align.edits.weights import WeightDifference, open_three
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
    model = dense_model(aligned, device)
    subspaces = find_subspaces(model, places, batches, options.eta, options.a_1)
    del model
    change = Lssf(vectors, subspaces, options.alpha)
    change.notes.append(f"safe answers: {len(rows)} of {requests.source}, as they stand there")
    return apply("lssf", change, weights, output, options=options, finish=finish)


class Lssf:
    """Add to each linear layer the safety vector's part in its subspace."""

    def __init__(self, vectors: WeightDifference, subspaces: Mapping[str, OutputSubspace], alpha: float) -> None:
        self._vectors, self._subspaces, self._alpha = vectors, subspaces, alpha
        ranks = sorted(subspace.rank for subspace in subspaces.values())
        self.notes = [f"ranks of {len(ranks)} subspaces: {ranks[0]} to {ranks[-1]}"] if ranks else []
        if not ranks:
            self.notes = ["aligned and unaligned model have the same linear layers: nothing is changed"]

    def tensor(self, name: str, weight: Tensor) -> Tensor | None:
        if name not in self._subspaces or self._alpha == 0:
            return None
        vector_OI = self._vectors.of(name)
        assert vector_OI is not None, "layers without a difference have no subspace"
        return (weight.double() + self._alpha * self._subspaces[name].project(vector_OI)).float()
