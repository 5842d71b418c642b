"""TRL's head on a CPU: logits where a label is, and nowhere else."""

from typing import Any

import torch
from trl.trainer import utils

_decides: Any = utils._use_triton


def score_labelled_positions_only() -> None:
    """Let TRL's loss compute logits of labelled positions only, on a CPU too. The loss stays the same.

    TRL does so on GPUs. Elsewhere it computes the logits of every position, prompts and padding included, because some
    devices compile code for each shape (`add_fused_lm_head`, trl/trainer/utils.py); CPUs do not. The function that is
    replaced decides only this in that module.
    """
    utils._use_triton = _is_fit  # pyright: ignore[reportPrivateImportUsage]


def _is_fit(device: torch.device) -> bool:
    return device.type == "cpu" or bool(_decides(device))
