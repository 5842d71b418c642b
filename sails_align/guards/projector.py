"""Embed hidden states so that a frozen linear boundary tells harmful prompts from harmless ones (arXiv 2510.26935).

    z = W_2 relu(W_1 (h - mean) / scale + b_1) + b_2,    score = w . z    with w = e_1

The boundary w is never trained: the projector alone moves prompts to their side of it. The loss is cross entropy of the
score, each side counting half, plus `weight` times the supervised contrastive loss (arXiv 2004.11362, equation 2) of
the normalized embeddings. RepV gives the idea; sizes, the second term and the training are ours.

Shapes: N prompts, D d_model, H hidden units, E coordinates of the embedding.
"""

import torch
from torch import Tensor, nn

BUDGET = 200_000
"""Trained parameters, at most."""
HIDDEN = 64
BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 3e-3, 1e-2
TEMPERATURE = 0.1
"""Of the contrastive loss."""


def hidden_units(d_model: int, dimension: int) -> int:
    """Return how many hidden units keep a projector below the budget, at most `HIDDEN`."""
    return max(1, min(HIDDEN, (BUDGET - 1 - dimension) // (d_model + 1 + dimension)))


class Projector(nn.Module):
    """Map hidden states (N, D) to embeddings (N, E)."""

    mean: Tensor
    """(D,), of the hidden states that it was fitted on."""
    scale: Tensor
    """(D,), their standard deviations."""
    boundary: Tensor
    """(E,), normal to the frozen boundary."""

    def __init__(self, d_model: int, dimension: int) -> None:
        super().__init__()
        units = hidden_units(d_model, dimension)
        self.layers = nn.Sequential(nn.Linear(d_model, units), nn.ReLU(), nn.Linear(units, dimension))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(d_model))
        self.register_buffer("boundary", nn.functional.one_hot(torch.tensor(0), dimension).float())

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Projector":
        """Return the projector with the given state."""
        projector = cls(len(tensors["mean"]), len(tensors["boundary"]))
        projector.load_state_dict(tensors)
        return projector.eval()

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Embed hidden states."""
        return self.layers((hidden_ND - self.mean) / self.scale)

    @torch.no_grad()
    def scores(self, hidden_ND: Tensor) -> Tensor:
        """Return the scores (N,) of hidden states: positive on the harmful side of the boundary."""
        return self(hidden_ND.float()) @ self.boundary


def fit_projector(
    harmful_ND: Tensor, harmless_ND: Tensor, *, dimension: int, steps: int, contrastive_weight: float, seed: int
) -> Projector:
    """Train a projector on the hidden states of two kinds of prompts. The process's random state is kept.

    Args:
        harmful_ND: of harmful prompts, at least one.
        harmless_ND: of harmless prompts, likewise.
        dimension: E.
        steps: of Adam, each on at most `BATCH` prompts of both kinds, drawn at random.
        contrastive_weight: of the contrastive loss.
        seed: of the first weights and the draws.
    """
    hidden_ND = torch.cat([harmful_ND, harmless_ND]).float()
    labels_N = torch.cat([torch.ones(len(harmful_ND)), torch.zeros(len(harmless_ND))])
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        projector = Projector(hidden_ND.shape[1], dimension)
        projector.mean.copy_(hidden_ND.mean(0))
        projector.scale.copy_(hidden_ND.std(0, correction=0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for _ in range(steps):
            chosen = torch.randperm(len(labels_N))[:BATCH]
            embedded_NE, of_N = projector(hidden_ND[chosen]), labels_N[chosen]
            loss = balanced_cross_entropy(embedded_NE @ projector.boundary, of_N)
            if contrastive_weight:
                loss = loss + contrastive_weight * contrastive_loss(embedded_NE, of_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return projector.eval()


def balanced_cross_entropy(scores_N: Tensor, labels_N: Tensor) -> Tensor:
    """Return the mean over the two kinds of the mean cross entropy of each; of the one that is there, if one is."""
    losses_N = nn.functional.binary_cross_entropy_with_logits(scores_N, labels_N, reduction="none")
    return torch.stack([losses_N[labels_N == kind].mean() for kind in labels_N.unique()]).mean()


def contrastive_loss(embedded_NE: Tensor, labels_N: Tensor) -> Tensor:
    """Return the supervised contrastive loss; prompts without another one of their kind do not count."""
    unit_NE = nn.functional.normalize(embedded_NE, dim=-1)
    is_self_NN = torch.eye(len(labels_N), dtype=torch.bool)
    logits_NN = (unit_NE @ unit_NE.T / TEMPERATURE).masked_fill(is_self_NN, float("-inf"))
    log_shares_NN = logits_NN.log_softmax(-1).masked_fill(is_self_NN, 0)
    is_alike_NN = (labels_N[:, None] == labels_N[None]) & ~is_self_NN
    n_alike_N = is_alike_NN.sum(-1)
    losses_N = -(log_shares_NN * is_alike_NN).sum(-1) / n_alike_N.clamp(min=1)
    return losses_N.sum() / (n_alike_N > 0).sum().clamp(min=1)


def auc(harmful_N: Tensor, harmless_N: Tensor) -> float:
    """Return the share of pairs in which the harmful prompt has the higher score; a tie counts half."""
    difference_NM = harmful_N[:, None] - harmless_N[None]
    return ((difference_NM > 0).double() + (difference_NM == 0).double() / 2).mean().item()
