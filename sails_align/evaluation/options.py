"""The options of evaluations, but for the judges' (`eval_judges`): model, prompts, output; and what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sails_align.core.artifacts import cache_folder, content_hash, refuse_trained
from sails_align.core.errors import InputError
from sails_align.core.options import check_choice, check_least
from sails_align.data.tokens import read_chat_template
from sails_align.evaluation.backends.adapter_check import CheckedBackend
from sails_align.evaluation.model import DTYPES, resolve_model
from sails_align.evaluation.prompts.load import load_prompts
from sails_align.evaluation.records import Backend, ModelSpec, Prompt, Sampling
from sails_align.export.serving import serving_report
from sails_align.testbed.build import is_testbed, resolve_testbed
from sails_align.testbed.evaluate import MAX_NEW_TOKENS as TESTBED_TOKENS
from sails_align.testbed.judge import request_prompts

COLDEST = 0.01
"""Temperature; lower ones overflow."""
BACKENDS = ("hf", "vllm", "openai")


@dataclass
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
        check_choice("backend", self.backend, BACKENDS)
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

    def spec(self) -> ModelSpec | None:
        """The model, if it is run here; None if a server does."""
        if self.backend == "openai":
            return None
        spec = resolve_model(
            self.model,
            self.base_model,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        if self.chat_template_path is None:
            return spec
        template = read_chat_template(self.chat_template_path)
        return replace(
            spec, chat_template=template, identity={**spec.identity, "chat_template": content_hash(template)}
        )

    def sampling(self, prompts: Sequence[Prompt]) -> Sampling:
        """How responses to the prompts are drawn."""
        of_testbed = all("testbed" in prompt.meta for prompt in prompts)
        return Sampling(self.max_new_tokens or (TESTBED_TOKENS if of_testbed else 512), self.temperature, self.seed)

    def make_backend(self, spec: ModelSpec | None, prompts: Sequence[Prompt]) -> Backend:
        """What responds to the prompts. In-process models are loaded when they are first asked something."""
        if spec is None:
            served = self._served(self.model)
            if self.base_model is None:
                return served
            return CheckedBackend(served, self._served(self.base_model), [prompt.messages for prompt in prompts])
        return in_process(spec, self.backend, self.batch_size, self.tensor_parallel_size, self.max_model_len)

    def _served(self, model: str) -> Backend:
        from sails_align.evaluation.backends.openai import OpenAIBackend

        assert self.base_url is not None
        options = {"api_key_env": self.api_key_env, "concurrency": self.concurrency, "timeout": self.timeout}
        return OpenAIBackend(self.base_url, model, **options)


def in_process(
    spec: ModelSpec, backend: str, batch_size: int = 32, tensor_parallel_size: int = 1, max_model_len: int | None = None
) -> Backend:
    """A model in this process.

    Raises:
        InputError: if vLLM cannot serve the adapter.
    """
    if backend == "hf":
        from sails_align.evaluation.backends.hf import HFBackend

        return HFBackend(spec, batch_size=batch_size)
    from sails_align.evaluation.backends.vllm_backend import VLLMBackend

    check_serving(spec)
    return VLLMBackend(
        spec,
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=max_model_len,
        chunk_size=8 * batch_size,
    )


def check_serving(spec: ModelSpec) -> None:
    """Refuse an adapter, with an `InputError`, that vLLM would serve wrongly or not at all."""
    if spec.adapter is None:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    blocking = [problem for problem in serving_report(Path(spec.adapter), config) if problem.blocking]
    if blocking:
        raise InputError(f"vLLM cannot serve {spec.adapter}: {blocking[0].what};\n{blocking[0].remedy}")


@dataclass
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
        metadata={"help": "Of each set, balanced over categories; default: all (256 of each of testbed's)."},
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

    def load(self, seed: int, system_prompt: str | None = None) -> list[Prompt]:
        """All prompts, each with the name of its set in its id, if there are several sets.

        Raises:
            InputError: if a set cannot be loaded.
        """
        prompts = []
        for name in self.prompts:
            loaded = self._set(name, seed)
            prefix = f"{name}:" if len(self.prompts) > 1 else ""
            prompts += [_changed(prompt, name, prefix, system_prompt) for prompt in loaded]
        return prompts

    def _set(self, name: str, seed: int) -> list[Prompt]:
        if is_testbed(name):
            return request_prompts(resolve_testbed(name), name, self.n_prompts or 256, part=self.part, seed=seed)
        columns = {"prompt": self.prompt_column, "category": self.category_column}
        return load_prompts(
            name,
            n=self.n_prompts,
            seed=seed,
            columns={role: column for role, column in columns.items() if column is not None} or None,
            split=self.split,
            kind=self.kind,  # pyright: ignore[reportArgumentType] -- checked above
        )


def _changed(prompt: Prompt, name: str, prefix: str, system_prompt: str | None) -> Prompt:
    """A prompt with the name of its set, which is its split if it names none itself."""
    system = () if system_prompt is None else ({"role": "system", "content": system_prompt},)
    meta = {"split": name.partition("=")[0], **prompt.meta}
    return Prompt(prefix + prompt.id, (*system, *prompt.messages), prompt.kind, prompt.category, meta)


@dataclass
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

    def cache_file(self) -> Path:
        """The cache's file."""
        return Path(self.cache_path) if self.cache_path else cache_folder() / "evaluation.sqlite"

    def folder(self, what: str, model: str) -> Path:
        """The output folder."""
        return refuse_trained(Path(self.output_dir or default_folder(what, model)))


def default_folder(what: str, model: str) -> str:
    """Where results go by default: of a checkpoint, the run it is of is named, too."""
    names = [name for name in model.rstrip("/").split("/") if name]
    stem = "-".join(names[-2:] if names[-1].startswith("checkpoint-") else names[-1:]).replace(":", "-")
    return f"runs/eval-{what}-{stem}"
