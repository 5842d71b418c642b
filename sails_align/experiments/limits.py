"""Check, before anything is trained, that the evaluations of a plan can take the models that it trains.

vLLM refuses some adapters and types of weights, and all models have a longest context. These show only after the
training if they are not looked at before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.data.tokens import read_chat_template
from sails_align.evaluation.backends.serving import config_problems, module_problems
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.options import RESPONSE_TOKENS, TESTBED_TOKENS, PromptArguments, ResponseArguments
from sails_align.experiments.commands import OPTIONS, evaluation
from sails_align.experiments.plan import Part, Protocol, Run
from sails_align.models.generation import context_length
from sails_align.models.load import load_config
from sails_align.models.spec import model_path
from sails_align.testbed.build import is_testbed
from sails_align.training.plan import TrainingPlan
from sails_align.training.shapes import meta_model


@dataclass(frozen=True)
class Limits:
    """What the evaluations of a plan are checked against."""

    protocol: Protocol
    trainings: Mapping[str, TrainingPlan]
    """By run."""
    config_of: Callable[[str], PreTrainedConfig | None]
    """Configuration of a model by name; None if it is not known."""
    on_gpu: bool
    """Whether vLLM runs on GPUs, where it computes adapters in 16 bits."""
    gpus_of_evaluation: int | None = None
    """GPUs that an evaluation gets; None: not known."""

    def check(self, runs: Sequence[Run], parts: Sequence[Part] = ("validation", "test")) -> int:
        """Check all evaluations of some runs. Returns their number.

        Raises `InputError` for the first that cannot be done.
        """
        n = 0
        for run in runs:
            args = self.trainings.get(run.name)
            name = args.model_name if args is not None else run.options[1]
            config = self.config_of(name)
            if config is not None and args is not None:
                _check_training(run, args, config)
            for part in parts:
                for kind, options in self.protocol.of_part(part).items():
                    (how, *others) = CommandLine.read(evaluation(kind, options, run, name)[2:]).parse(OPTIONS[kind])
                    n_new = _response_tokens(how, others)
                    for problem, remedy in self._problems(how, n_new, args, name, config):
                        raise InputError(f"evaluate: {part}: {kind} cannot evaluate {run.name}: {problem};\n{remedy}")
                    n += 1
        return n

    def _problems(
        self, how: Any, n_new: int, args: TrainingPlan | None, name: str, config: PreTrainedConfig | None
    ) -> Iterator[tuple[str, str]]:
        """Yield what keeps an evaluation from being done, and what to do about it."""
        assert isinstance(how, ResponseArguments | HarnessArguments)
        if isinstance(how, ResponseArguments) and how.chat_template_path is not None:
            read_chat_template(how.chat_template_path)  # which says itself what is wrong
        n_gpus = self.gpus_of_evaluation
        if how.backend == "vllm" and n_gpus is not None and how.tensor_parallel_size > max(1, n_gpus):
            yield (
                f"tensor_parallel_size is {how.tensor_parallel_size}, but each evaluation gets {n_gpus} GPU",
                "take it out",
            )
        if config is None:
            return
        yield from _context_problems(how, n_new, config)
        if how.backend == "vllm" and args is not None and args.model.use_peft:
            if self.on_gpu and weights_dtype(how.dtype, config) == torch.float32:
                yield f"{name} is float32, and on GPUs vLLM computes adapters in 16 bits", "add dtype: bfloat16"
            adapted = meta_model(args, config)
            assert isinstance(adapted, PeftModel)
            modules = set(adapted.targeted_module_names)
            found = [*config_problems(adapted.peft_config["default"]), *module_problems(modules, config)]  # pyright: ignore
            yield from ((f"of the adapter, {problem.what}", problem.remedy) for problem in found if problem.blocking)


def _check_training(run: Run, args: TrainingPlan, config: PreTrainedConfig) -> None:
    longest, wanted = context_length(config), args.training.max_length
    if wanted is not None and wanted > longest:
        raise InputError(
            f"{run.name} has max_length {wanted}, but {args.model_name} takes {longest} tokens; give {longest} or less"
        )


def _response_tokens(how: Any, others: Sequence[Any]) -> int:
    """Return the longest response that an evaluation asks for, in tokens."""
    if not isinstance(how, ResponseArguments):
        return 0
    prompts = [name for options in others if isinstance(options, PromptArguments) for name in options.prompts]
    default = TESTBED_TOKENS if all(map(is_testbed, prompts)) else RESPONSE_TOKENS
    return how.max_new_tokens or default


def _context_problems(
    how: ResponseArguments | HarnessArguments, n_new: int, config: PreTrainedConfig
) -> Iterator[tuple[str, str]]:
    longest = context_length(config)
    given = how.max_model_len if how.backend == "vllm" else None
    if given is not None and given > longest:
        yield f"max_model_len is {given}, but the model takes {longest} tokens", f"give {longest} or less"
    if n_new >= (given or longest):
        yield (
            f"max_new_tokens is {n_new}, which leaves no room for a prompt in a context of {given or longest}",
            "give a smaller max_new_tokens, or a larger max_model_len",
        )


def weights_dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    """Return the type that `--dtype` loads weights in for an evaluation: for `auto` the checkpoint's own."""
    dtype = getattr(torch, name) if name != "auto" else config.dtype or config.get_text_config(decoder=True).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@cache
def known_config(model: str) -> PreTrainedConfig | None:
    """Return the configuration of a model by its name, if it is here or the hub can be reached."""
    try:
        return load_config(model_path(model))
    except InputError:
        return None
