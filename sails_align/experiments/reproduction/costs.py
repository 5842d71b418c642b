"""Compute what the steps will take, from shapes and options, before anything is started.

A GPU-hour is an hour of one GPU at `tflops` (10^12 operations a second that are reached, not the peak). Operations are
counted: 2 for each parameter and token forward, 2 backward through frozen weights, 4 through trained ones, and 2 more
where activations are computed again. Generation reaches a smaller share, since it waits for memory.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedConfig

from sails_align.core.command_line import CommandLine
from sails_align.data.options import MixOptions
from sails_align.evaluation.attacks.parse import parse as parse_attack
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.options import RESPONSE_TOKENS
from sails_align.experiments.commands import OPTIONS
from sails_align.experiments.jobs import Job
from sails_align.experiments.limits import weights_dtype
from sails_align.experiments.reproduction.plan import Reproduction, is_hh_rlhf
from sails_align.export.hub import HubConnectionError
from sails_align.subspace.options import BY_EFFECT
from sails_align.training.memory import checkpoint_bytes
from sails_align.training.plan import TrainingPlan
from sails_align.training.shapes import meta_model, setup_of, shape_of

ROWS = {"harmless-base": 42_537, "helpful-base": 43_835}
"""Training rows of HH-RLHF, as its page says."""
TOKENS = 654 / 4
"""Tokens of a transcript: 654 characters on average (2,312 rows of harmless-base's test part), four to a token."""
GENERATION = 1 / 6
"""Share of `tflops` that is reached while responses are generated (assumed)."""
SINGLE = 1 / 15
"""Share of `tflops` that is reached with float32 weights (A100: 19.5 of 312, H100: 67 of 989)."""
PROMPT_TOKENS, ATTACK_TOKENS = 60, 80
"""Tokens of a prompt, and of a prompt with suffix and target (assumed)."""
SET_SIZE = 500
"""Prompts of a set without `--n_prompts` (assumed)."""
TASKS = {"mmlu": (14_042 * 4 * 100, 0), "gsm8k": (1_319 * 900, 1_319 * 256)}
"""Tokens that lm-eval's tasks read and generate (about)."""


@dataclass(frozen=True)
class Costs:
    """What a step is expected to take."""

    gpu_hours: float = 0.0
    disk_gb: float = 0.0
    """10^9 bytes that stay."""
    judge_requests: int = 0
    """Verdicts asked of language models."""


def costs_of(jobs: Sequence[Job], plan: Reproduction, tflops: float) -> list[Costs]:
    """Return the costs of some steps, at 10^12 * tflops operations a second; 0 without the model's configuration."""
    if plan.config is None:
        return [Costs()] * len(jobs)
    rate = _Rate(_n_parameters(plan, plan.config), tflops)
    return [_costs(job, plan, plan.config, rate) for job in jobs]


def _costs(job: Job, plan: Reproduction, config: PreTrainedConfig, rate: "_Rate") -> Costs:
    assert isinstance(job.work, tuple)
    stage, run, *_ = job.name.split("/")
    match stage:
        case "data":
            model = plan.downloads.get(job.name)
            return Costs(disk_gb=0.1 if model is None else _download_bytes(model, plan, rate.n_parameters) / 1e9)
        case "discover":
            args = next(args for args in plan.arguments.values() if args.sails.uses_subspace)
            n = 2 * args.sails.max_discovery_examples
            if args.sails.score in BY_EFFECT:
                n *= 4  # once more forward, and a backward pass of about twice the work
            return Costs(rate.hours(n * TOKENS), sae_bytes(args, config) / 1e9)
        case "train":
            args = plan.arguments[run]
            shape = shape_of(meta_model(args, config))
            written = checkpoint_bytes(plan.engines[run], shape, setup_of(args, config))
            kept = written["model"] + (args.training.save_total_limit or 1) * written["checkpoint"]
            return Costs(rate.hours(operations(args) / 2 * training_tokens(args)), kept / 1e9)
        case "attack":
            args = parse_attack(job.work[2:], "sails attack")
            n = args.asked.n_prompts or SET_SIZE
            forward = n * args.attack.n_steps * args.attack.search_width * ATTACK_TOKENS
            rate = rate.of(args.how.dtype, plan.config_of(args.how.model) or config)
            return Costs(rate.hours(forward, 2 * n * RESPONSE_TOKENS), judge_requests=2 * n * _n_models(args.who))
        case _:
            return _of_evaluation(job.work[2:], rate, plan, config)


@dataclass(frozen=True)
class _Rate:
    """The speed of a model."""

    n_parameters: int
    tflops: float

    def of(self, dtype: str, config: PreTrainedConfig) -> "_Rate":
        """Return the speed with weights of the type that an evaluation loads."""
        slower = SINGLE if weights_dtype(dtype, config) == torch.float32 else 1.0
        return replace(self, tflops=self.tflops * slower)

    def hours(self, read: float, written: float = 0.0) -> float:
        """Return the GPU-hours of tokens that are read in parallel, and of those that are generated."""
        return 2 * self.n_parameters * (read + written / GENERATION) / (self.tflops * 1e12) / 3600


def _n_parameters(plan: Reproduction, config: PreTrainedConfig) -> int:
    """Return the size of the model without adapters."""
    args = next(iter(plan.arguments.values()))
    shape = shape_of(meta_model(args, config))
    return shape.n_parameters - (shape.n_saved if args.model.use_peft else 0)


def operations(args: TrainingPlan) -> int:
    """Return the operations for each parameter and token of an example (DPO: of one of its two responses)."""
    passes = 2 + (2 if args.model.use_peft else 4) + (2 if args.training.gradient_checkpointing else 0)
    return passes if args.method == "sft" else 2 * (passes + 2)  # the reference reads both responses, too


def training_tokens(args: TrainingPlan) -> float:
    """Return the tokens of all epochs; 0 for data of unknown size."""
    safety, helpful = (
        ROWS.get(Path(str(name)).name, 0) if is_hh_rlhf(name) else 0
        for name in (args.script.dataset_name, args.data.helpful_dataset_name)
    )
    safety = min(safety, args.data.max_train_examples or safety)
    n_examples = safety + min(helpful, args.of(MixOptions).helpful_ratio * safety)
    return n_examples * TOKENS * args.training.num_train_epochs


def sae_bytes(args: TrainingPlan, config: PreTrainedConfig) -> int:
    """Return the size of a release's SAEs (fp32 encoders and decoders); 0 for local SAEs."""
    d_model = config.get_text_config().hidden_size
    total = 0
    for sae_id in args.sails.sae_ids or () if args.sails.sae_release else ():
        width = re.search(r"width_(\d+)k", sae_id)
        times = re.search(r"_(\d+)x$", sae_id)
        d_sae = int(width[1]) * 1024 if width else int(times[1]) * d_model if times else 0
        total += 2 * d_sae * d_model * 4
    return total


def _n_models(judges: JudgeArguments) -> int:
    """Return the number of judges that are language models."""
    return len(judges.judge_model or ())


def _download_bytes(model: str, plan: Reproduction, n_parameters: int) -> float:
    """Return the size of a model's weights: as the hub says, else by the type that its configuration names."""
    if size := _hub_bytes(model):
        return size
    config = plan.config_of(model) or plan.config
    return n_parameters * (2 if config is None else weights_dtype("auto", config).itemsize)


def _hub_bytes(model: str) -> int:
    """Return the size of a model's weights, as the hub says; 0 if it cannot be asked."""
    if not constants.HF_HUB_OFFLINE:
        with suppress(HubConnectionError, HfHubHTTPError, OSError):
            files = HfApi().model_info(model, files_metadata=True).siblings or []
            return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    return 0


def evaluations_download_gb(models: Iterable[str]) -> float:
    """Return the size of the models that evaluations download themselves: judges and references not in the cache."""
    missing = [model for model in set(models) if not try_to_load_from_cache(model, "config.json")]
    return sum(map(_hub_bytes, missing)) / 1e9


def _of_evaluation(words: Sequence[str], rate: _Rate, plan: Reproduction, config: PreTrainedConfig) -> Costs:
    """Return the costs of an evaluation: its kind and options."""
    kind, *options = words
    how, *more = CommandLine.read(options).parse(OPTIONS[kind])  # pyright: ignore[reportArgumentType]
    rate = rate.of(how.dtype, plan.config_of(how.model) or config)
    if isinstance(how, HarnessArguments):
        of_tasks = [TASKS[task] for task in how.tasks if task in TASKS]
        return Costs(rate.hours(sum(read for read, _ in of_tasks), sum(written for _, written in of_tasks)))
    asked, n_new = more[0], how.max_new_tokens or RESPONSE_TOKENS
    n = len(asked.prompts) * (asked.n_prompts or SET_SIZE)
    if kind == "divergence":  # the base model answers, and both read the answers
        return Costs(rate.hours(n * (3 * PROMPT_TOKENS + 2 * n_new), n * n_new))
    is_compared = kind == "helpfulness" and more[3].reference is not None
    n_responses = 2 * n if is_compared else n
    n_verdicts = 3 * n if is_compared else n  # pairs are judged in both orders
    hours = rate.hours(n_responses * PROMPT_TOKENS, n_responses * n_new)
    return Costs(hours, judge_requests=n_verdicts * _n_models(more[1]))
