"""The options of the recipe `rlhf_reference.py`: ours and those of TRL's GRPOConfig."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.options import OutputOptions, check_choices, check_least, check_positive, option
from sails_align.evaluation.options import TESTBED_TOKENS
from sails_align.models.spec import stem_of
from sails_align.testbed.build import is_testbed

if TYPE_CHECKING:
    from trl import GRPOConfig

WEIGHTS = "model.safetensors"
# Chosen on the validation split: docs/rlhf.md.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 6e-4,
    "max_steps": 240,
    "per_device_train_batch_size": 128,
    "steps_per_generation": 4,
    "num_generations": 8,
    "max_completion_length": TESTBED_TOKENS,
    "warmup_steps": 5,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_steps": 40,
    "save_total_limit": 2,
}


@dataclass(frozen=True)
class RlhfOptions:
    """The testbed, its requests, and the warm start."""

    model_name_or_path: str | None = option(
        None, "testbed (the shipped one, the default), testbed:N, or the folder of a testbed."
    )
    max_train_examples: int | None = option(
        None, "Maximum number of harmful requests to train on, chosen by --seed; default: all."
    )
    helpful_ratio: float = option(1.0, "Number of harmless requests for each harmful one.")
    eval_examples: int = option(256, "Number of prompts in each of the four sets of the final evaluation.")
    eval_part: str = option("test", "Split of the final evaluation: test, or validation (to choose settings).")
    warm_start_path: str | None = option(
        None, "A fully fine-tuned model of the testbed, instead of the built-in warm start."
    )
    warm_start_examples: int = option(128, "Number of refusals in the warm start; 0: reinforcement learning only.")
    warm_start_ratio: float = option(1.0, "Number of answers in the warm start for each refusal.")
    warm_start_epochs: float = option(4.0, "Epochs of the warm start.")
    warm_start_learning_rate: float = option(1e-3, "Learning rate of the warm start.")

    def __post_init__(self) -> None:
        if not is_testbed(self.model_name_or_path):
            raise InputError(
                f"{self.model_name_or_path} is no testbed, and the reward is the testbed's oracle: give testbed, "
                "testbed:N or a testbed's folder;\nfor a real model the reference is the id of its aligned version, "
                "such as google/gemma-2-9b-it"
            )
        check_choices(self, {"eval_part": ("test", "validation")})
        check_least(self, max_train_examples=1, eval_examples=1)
        check_least(self, warm_start_examples=0, helpful_ratio=0, warm_start_ratio=0)
        check_positive(self, "warm_start_epochs", "warm_start_learning_rate")
        if self.warm_start_path is not None and not (Path(self.warm_start_path) / WEIGHTS).is_file():
            raise InputError(
                f"the warm start {self.warm_start_path} has no {WEIGHTS};\ngive the folder of a model that was "
                "fine-tuned in full (--use_peft false), or leave --warm_start_path out"
            )


@dataclass(frozen=True)
class RlhfPlan:
    """All options of one run."""

    reference: RlhfOptions
    training: "GRPOConfig"
    output: OutputOptions
    given: dict[str, Any]
    """The options that were given or have a default of ours, as `--config` takes them."""


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> RlhfPlan:
    """Read the command line (None: this process's) and `--config` (YAML); `prog` is what `--help` calls the command.

    Raises `InputError` for an unknown option, a value that cannot be used, or a model that is no testbed.
    """
    import torch
    from accelerate.utils import parse_flag_from_env
    from trl import GRPOConfig

    from sails_align.core.distributed import check_devices

    line = CommandLine.read(argv)
    defaults = dict(DEFAULTS)
    if not torch.cuda.is_available():
        defaults |= {"use_cpu": True, "bf16": False}
    check_devices(line.flag("use_cpu", default=False))
    if line.value("num_generations") == "0":  # TRL divides by it before it looks
        raise InputError("num_generations is 0, but GRPO compares the answers to a prompt; choose 2 or more")
    if line.value("generation_batch_size") is not None and line.value("steps_per_generation") is None:
        del defaults["steps_per_generation"]  # TRL takes one of the two
    classes = [RlhfOptions, OutputOptions, GRPOConfig]
    reference, output, training = line.parse(classes, defaults=defaults, prog=prog)
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = f"runs/rlhf-{stem_of(reference.model_name_or_path or 'testbed')}"
    if training.push_to_hub:
        raise InputError("push_to_hub is given, but the testbed's models are toys; leave it out (hf upload can do it)")
    if training.deepspeed_plugin is not None or parse_flag_from_env("ACCELERATE_USE_FSDP") or training.fsdp:
        raise InputError(
            "the testbed's model is too small to be split: DeepSpeed and FSDP are not supported here;\n"
            "launch one process, or several with accelerate_configs/cpu.yaml or multi_gpu.yaml"
        )
    return RlhfPlan(reference, training, output, {**defaults, **line.given(classes)})
