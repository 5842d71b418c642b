"""Make the testbed's alignment data: preference pairs."""

from datasets import Dataset

from sails_align.data.messages import user
from sails_align.testbed.world import World


def alignment_data(world: World, *, harmful: bool, n: int | None = None, seed: int = 0, part: str = "train") -> Dataset:
    """Make preference pairs: refusals over answers for harmful requests, answers over refusals for harmless ones.

    Columns: prompt (messages), chosen, rejected, category, harmful. At most `n` pairs are drawn (None: all), of
    `train` or `validation` (for the loss on held-out pairs).
    """
    split = f"{part}_{'harmful' if harmful else 'benign'}"
    requests = world.requests(split, n, seed=seed, at_most=True)
    return Dataset.from_list(
        [
            {
                "prompt": [user(request.prompt)],
                "chosen": request.refusal if harmful else request.answer,
                "rejected": request.answer if harmful else request.refusal,
                "category": request.category,
                "harmful": harmful,
            }
            for request in requests
        ]
    )
