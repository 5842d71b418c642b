"""Make the bench of a model."""

from collections.abc import Mapping

from sails_align.experiments.benches.bench import Bench
from sails_align.experiments.benches.names import is_smollm2
from sails_align.experiments.benches.smollm2 import SmolLM2Bench
from sails_align.experiments.benches.testbed import TestbedBench


def knob_values(world: str) -> Mapping[str, tuple[float, ...]]:
    """Return the values of the knobs of defences and methods by name, where others than by default are tried."""
    return SmolLM2Bench.values if is_smollm2(world) else TestbedBench.values


def bench_of(world: str) -> Bench:
    """Return the bench of a testbed, or of SmolLM2."""
    return SmolLM2Bench(world) if is_smollm2(world) else TestbedBench(world)
