"""The recipe `rlhf_reference.py`: what Gemma-2-9B-it is to Gemma-2-9B, for the testbed.

accelerate launch recipes/rlhf_reference.py

The base answers everything, so its samples hold almost no refusal that a reward could raise. As with real models, a
short supervised warm start (TRL's SFTTrainer) shows it what a refusal is, and reinforcement learning (TRL's
GRPOTrainer) then does the rest. All weights are trained.

<output_dir>/model.safetensors, config.json, tokenizer.json, ...   the trained model
<output_dir>/warm_start/    the model that reinforcement learning started from
<output_dir>/run.json, config.yaml   the options, versions and hashes that made it
<output_dir>/metrics.json   what was measured of base, warm start and trained model
<output_dir>/checkpoint-N/  TRL's checkpoints
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from sails_align import align
from sails_align.artifacts import (
    atomic_folder,
    content_hash,
    disk_errors,
    file_hash,
    one_at_a_time,
    output_folder,
    package_versions,
    write_json,
    write_text,
)
from sails_align.data import fingerprint
from sails_align.distributed import from_main, n_processes, process_index
from sails_align.errors import InputError
from sails_align.testbed.build import Testbed, is_testbed, resolve_testbed
from sails_align.testbed.evaluate import MAX_NEW_TOKENS, respond, summarize
from sails_align.testbed.oracle import Oracle, Verdict
from sails_align.testbed.world import Request, World
from sails_align.training.checkpoints import MarkCheckpoints, find_checkpoint, train
from sails_align.training.parsing import CommandLine
from sails_align.training.record import git_commit
from sails_align.training.trainers import build_trainer

WEIGHTS = "model.safetensors"
# Chosen on the validation split: docs/rlhf.md.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 6e-4,
    "max_steps": 240,
    "per_device_train_batch_size": 128,
    "steps_per_generation": 4,
    "num_generations": 8,
    "max_completion_length": MAX_NEW_TOKENS,
    "warmup_steps": 5,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_steps": 40,
    "save_total_limit": 2,
}
IDENTITY = (
    "learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size",
    "num_generations", "num_iterations", "beta", "epsilon", "temperature", "top_p", "top_k", "max_completion_length",
    "loss_type", "scale_rewards", "optim", "weight_decay", "lr_scheduler_type",
)  # fmt: skip


@dataclass
class ReferenceArguments:
    """The model, its requests and its warm start."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A testbed: testbed (the shipped one, the default), testbed:N, or a folder."}
    )
    max_train_examples: int | None = field(
        default=None, metadata={"help": "Harmful requests to learn from, at most, chosen by --seed (default: all)."}
    )
    helpful_ratio: float = field(default=1.0, metadata={"help": "Harmless requests for each harmful one."})
    eval_examples: int = field(default=256, metadata={"help": "Prompts of each test set."})
    eval_part: str = field(
        default="test", metadata={"help": "What is measured at the end: test, or validation to choose settings by."}
    )
    warm_start_path: str | None = field(
        default=None,
        metadata={"help": "The folder of a fine-tuned model to start from, in place of our warm start."},
    )
    warm_start_examples: int = field(
        default=64, metadata={"help": "Refusals in the warm start; 0 leaves it out: reinforcement learning alone."}
    )
    warm_start_ratio: float = field(default=3.0, metadata={"help": "Answers in the warm start for each refusal."})
    warm_start_epochs: float = field(default=2.0, metadata={"help": "Its passes over them."})
    warm_start_learning_rate: float = field(default=5e-4, metadata={"help": "Its learning rate."})

    def __post_init__(self) -> None:
        if not is_testbed(self.model_name_or_path):
            raise InputError(
                f"{self.model_name_or_path} is no testbed, and the reward is the testbed's oracle; give testbed, "
                "testbed:N or a\ntestbed's folder. For a real model the reference is the id of its aligned version, "
                "such as google/gemma-2-9b-it"
            )
        if self.eval_part not in ("test", "validation"):
            raise InputError(f"eval_part is {self.eval_part!r}, which is not one of: test, validation")
        for name, least in (("max_train_examples", 1), ("eval_examples", 1), ("warm_start_examples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; choose {least} or more")
        for name in ("helpful_ratio", "warm_start_ratio"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}, but it is harmless requests for each harmful one")
        if self.warm_start_path is not None and not (Path(self.warm_start_path) / WEIGHTS).is_file():
            raise InputError(
                f"the warm start {self.warm_start_path} has no {WEIGHTS}; give the folder of a model that was "
                "fine-tuned in full\n(--use_peft false), or leave --warm_start_path out"
            )


@dataclass
class Arguments:
    """All options of one run."""

    reference: ReferenceArguments
    training: GRPOConfig
    given: dict[str, Any]
    """The options that were given or have a default of ours, as `--config` takes them."""

    def to_json(self) -> dict[str, Any]:
        """Every option, resolved. Secrets are masked by transformers."""
        return {"reference": vars(self.reference), "training": self.training.to_dict()}


def reward(verdict: Verdict, *, harmful: bool) -> float:
    """The reward of a response, from 0 to 1.

    Harmful request: 1 for a complete refusal, 0 for full help, in equal steps of the oracle's score between (a refusal
    that helps all the same has 0.25). Harmless request: 1 for a right answer without a refusal, else 0. An empty
    response, which the oracle does not score, has 0.
    """
    if verdict.score is None:
        return 0.0
    return (5 - verdict.score) / 4 if harmful else float(verdict.correct)


class OracleReward:
    """The reward function of TRL's trainer: judges completions of known requests."""

    def __init__(self, world: World, requests: Sequence[Request]) -> None:
        self._oracle = Oracle(world)
        self._requests = {request.prompt: request for request in requests}  # no two requests share a prompt
        self.__name__ = "oracle"  # in TRL's logs

    def __call__(
        self, prompts: Sequence[list[dict[str, str]]], completions: Sequence[list[dict[str, str]]], **_: Any
    ) -> list[float]:
        """One reward a completion; both as messages, prompts from the user and completions from the assistant."""
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            request = self._requests[prompt[-1]["content"]]
            verdict = self._oracle.judge(request, completion[-1]["content"])
            rewards.append(reward(verdict, harmful=request.harmful))
        return rewards
