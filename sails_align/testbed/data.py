"""The testbed's alignment data: preference pairs."""

from datasets import Dataset

from sails_align.testbed.world import World


def alignment_data(world: World, *, harmful: bool, n: int | None = None, seed: int = 0, part: str = "train") -> Dataset:
    """Make preference pairs: refusal over compliance for harmful requests, the right answer over a refusal for others.

    Columns: prompt (messages), chosen, rejected, category, harmful.

    Args:
        world: the world.
        harmful: which of the two.
        seed: of the choice.
        n: how many, at random, at most; None is all there are.
        part: `train`, or `validation` for the loss on held-out pairs.
    """
    split = f"{part}_{'harmful' if harmful else 'benign'}"
    n_all = world.n_requests(split)
    requests = world.requests(split, n_all if n is None else min(n, n_all), seed=seed)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": request.prompt}],
                "chosen": request.refusal if harmful else request.answer,
                "rejected": request.answer if harmful else request.refusal,
                "category": request.category,
                "harmful": harmful,
            }
            for request in requests
        ]
    )
