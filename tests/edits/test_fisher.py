"""The Fisher information is the squared gradient of each batch's mean loss on its answers."""

import torch
from family import Family

from sails_align.edits.fisher import fisher_information
from sails_align.edits.linears import dense_model, linears_of
from sails_align.edits.weights import open_weights


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(4, 40, (2, 6), generator=generator)
    mask_BS = torch.zeros(2, 6, dtype=torch.bool)
    mask_BS[0, 3:], mask_BS[1, 4] = True, True
    return ids_BS, torch.ones_like(ids_BS), mask_BS


def test_it_is_that_of_batches_and_of_answers_alone(family: Family) -> None:
    weights = open_weights(family.aligned)
    places = linears_of(weights)
    batches = [batch(0), batch(1)]
    model = dense_model(weights, "cpu", torch.float64)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: place.of(model).weight for name, place in places.items()}
    found = fisher_information(model, weights, batches, remedy="")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    by_batch, by_example = [], []
    for ids_BS, attention_BS, mask_BS in batches:
        labels_BS = ids_BS.masked_fill(~mask_BS, -100)
        loss = model(input_ids=ids_BS, attention_mask=attention_BS, labels=labels_BS).loss
        by_batch.append(torch.autograd.grad(loss, weight)[0].square())
        for row in range(2):
            of_row = model(input_ids=ids_BS[row : row + 1], labels=labels_BS[row : row + 1]).loss
            by_example.append(torch.autograd.grad(of_row, weight)[0].square())
    torch.testing.assert_close(found[name], torch.stack(by_batch).mean(0), atol=1e-10, rtol=0)
    assert (found[name] - torch.stack(by_example).mean(0)).abs().max() > 1e-6
    assert found.keys() == places.keys()
