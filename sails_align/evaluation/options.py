"""The options of evaluations, but for the judges': model, prompts, output. What they mean is in the modules beside."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sails_align.core.errors import InputError
from sails_align.core.options import check_choice, check_least
from sails_align.evaluation.backends import BACKENDS
from sails_align.evaluation.prompts import is_of_testbed
from sails_align.evaluation.records import Prompt, Sampling
from sails_align.models import DTYPES

COLDEST = 0.01
"""Temperature; lower ones overflow."""
TESTBED_TOKENS = 24
"""Of a response on the testbed, whose answers are short."""
N_MADE = 256
"""Prompts of each split of the testbed."""


@dataclass(frozen=True)
class ResponseArguments:
    """The model, and how it responds."""

    model: str = field(
        default="testbed",
        metadata={
            "help": "testbed, testbed:N, a model's folder, a finished run or adapter, or a hub id; with "
            "--backend openai what the server calls the model."
        },
    )
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "Of an adapter, if it is not where it says; with --backend openai what the server calls it: the "
            "adapter must then change some answers, or is taken to be ignored."
        },
    )
    backend: str = field(default="hf", metadata={"help": "hf, vllm (in this process), or openai (a server)."})
    base_url: str | None = field(default=None, metadata={"help": "Of the server, such as http://localhost:8000/v1."})
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "The environment variable that has the server's key."}
    )
    concurrency: int = field(default=16, metadata={"help": "Requests to the server at the same time."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for an answer of the server."})
    dtype: str = field(default="auto", metadata={"help": f"Of the weights: {', '.join(DTYPES)}."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    batch_size: int = field(
        default=32, metadata={"help": "Conversations at a time (hf); chunks of 8 times that (vllm)."}
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model (vllm)."})
    max_model_len: int | None = field(default=None, metadata={"help": "Longest context (vllm)."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Of a response; default 512, of the testbed {TESTBED_TOKENS}."}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Of sampling, and of the choice of prompts."})
    system_prompt: str | None = field(default=None, metadata={"help": "A system message before each conversation."})
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "A Jinja file, or human_assistant: the chat template of a model without one."},
    )

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, BACKENDS.names())
        check_choice("dtype", self.dtype, DTYPES)
        check_least(self, concurrency=1, batch_size=1, tensor_parallel_size=1, max_model_len=1, max_new_tokens=1)
        check_least(self, temperature=0, seed=0, timeout=1)
        if 0 < self.temperature < COLDEST:
            raise InputError(f"temperature is {self.temperature}; choose 0 (greedy), or {COLDEST} or more")
        if not self.model:
            raise InputError("no model is given; give --model, such as testbed, a folder or the id of a model")
        if (self.backend == "openai") != (self.base_url is not None):
            given = "--backend openai" if self.base_url is None else "--base_url"
            other = "--base_url" if self.base_url is None else "--backend openai"
            raise InputError(f"{given} is given without {other}; give both, or none to run the model here")
        if self.backend == "openai" and self.chat_template_path is not None:
            raise InputError("chat_template_path is given, but a server has its own template; leave it out")

    def sampling(self, prompts: Sequence[Prompt]) -> Sampling:
        """How responses to the prompts are drawn."""
        n_tokens = self.max_new_tokens or (TESTBED_TOKENS if is_of_testbed(prompts) else 512)
        return Sampling(n_tokens, self.temperature, self.seed)


@dataclass(frozen=True)
class PromptArguments:
    """What the model is asked."""

    prompts: list[str] = field(
        default_factory=lambda: ["testbed"],
        metadata={
            "help": "Prompt sets by name, files, data sets of the hub, or testbed; docs/prompt_sets.md lists them."
        },
    )
    n_prompts: int | None = field(
        default=None,
        metadata={"help": f"Of each set, balanced over categories; default: all ({N_MADE} of each of testbed's)."},
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Of a file with other names than usual."})
    category_column: str | None = field(default=None, metadata={"help": "Likewise."})
    kind: str | None = field(
        default=None, metadata={"help": "harmful, benign or dual_use: what all prompts of a file without `kind` are."}
    )
    split: str | None = field(default=None, metadata={"help": "Of a folder or a data set on the hub; default: train."})
    part: str = field(default="test", metadata={"help": "Of the testbed: test, or validation to choose settings by."})

    def __post_init__(self) -> None:
        check_least(self, n_prompts=1)
        if not self.prompts or not all(self.prompts):
            raise InputError("no prompts are given; give --prompts, such as testbed or hex-phi")
        if len(set(self.prompts)) < len(self.prompts):
            raise InputError(f"a prompt set is given twice ({' '.join(self.prompts)}); give each once")
        check_choice("part", self.part, ("test", "validation"))
        if self.kind is not None:
            check_choice("kind", self.kind, ("harmful", "benign", "dual_use"))


@dataclass(frozen=True)
class RunArguments:
    """Where results go, and what is taken from earlier ones."""

    output_dir: str | None = field(default=None, metadata={"help": "Default: runs/eval-..., named by the model."})
    cache_path: str | None = field(
        default=None, metadata={"help": "The file of earlier responses and verdicts; several processes can share it."}
    )
    retry_unscored: bool = field(default=False, metadata={"help": "Ask again for what failed; all else stays."})
    max_unscored: float = field(
        default=0.02, metadata={"help": "Share of unscored verdicts from which the command ends with exit code 1."}
    )
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})

    def __post_init__(self) -> None:
        if not 0 <= self.max_unscored <= 1:
            raise InputError(f"max_unscored is {self.max_unscored}, but it is a share: choose 0 to 1")
