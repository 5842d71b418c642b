"""Draw batches and noise from a secret, by the number of the step, so that a resumed training draws the same.

The noise of a private training must not follow from `--seed`, which is published with the run: whoever knows it could
subtract the noise. So the secret is 256 bits of the operating system. It is kept in checkpoints, and in nothing else.
"""

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Secret:
    """What batches and noise are drawn from."""

    key: str

    @classmethod
    def new(cls, seed: int | None) -> "Secret":
        """Make one from the operating system's randomness, or a known one from a seed."""
        return cls(secrets.token_hex(32) if seed is None else f"known {seed}")

    def rng(self, *names: Any) -> np.random.Generator:
        """Return the generator for what the names stand for, such as the noise of a step."""
        return np.random.default_rng(np.frombuffer(_digest(self.key, *names), dtype=np.uint32))


def torch_generator(*names: Any) -> torch.Generator:
    """Return a generator on the CPU for what the names stand for, which anyone can repeat."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(*names)[:8], "big"))


def _digest(*names: Any) -> bytes:
    return hashlib.sha256(" ".join(map(str, names)).encode()).digest()
