"""Make the testbed's alignment data: preference pairs."""

from pathlib import Path

from datasets import Dataset

from sails_align.data.messages import user
from sails_align.testbed import MARKER
from sails_align.testbed.build import is_testbed, resolve_testbed
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


def of_model(name: str) -> tuple[Dataset, Dataset] | None:
    """Return the pairs of harmful and of harmless requests for a testbed's name or the folder of its model."""
    is_its_folder = Path(name).is_dir() and (Path(name).parent / MARKER).is_file()
    testbed = str(Path(name).parent) if is_its_folder else name
    if not is_testbed(testbed):
        return None
    world = resolve_testbed(testbed).world
    return alignment_data(world, harmful=True), alignment_data(world, harmful=False)
