"""Names of models that have a bench."""

from sails_align.testbed.build import is_testbed


def is_bench(world: str) -> bool:
    """Return whether there are rows to train a model on further: the testbed's, or SmolLM2's."""
    return is_testbed(world) or is_smollm2(world)


def is_smollm2(world: str) -> bool:
    """Return whether a name means SmolLM2."""
    return world.partition(":")[0] == "smollm2"
