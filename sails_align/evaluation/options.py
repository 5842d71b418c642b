"""Options of evaluations: model, prompts, output, comparison, reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from sails_align.core.errors import InputError
from sails_align.core.options import OVERWRITE, check_choice, check_least, option
from sails_align.core.trackers import REPORT_TO, services_of
from sails_align.evaluation.backends import BACKENDS
from sails_align.evaluation.prompts import is_of_testbed
from sails_align.evaluation.records import Prompt, Sampling
from sails_align.models import DTYPES

HARMLESS: Mapping[str, frozenset[str]] = {
    "where results go, and what is shown and repeated": frozenset(
        ("output_dir", "overwrite_output_dir", "progress", "retry_unscored", "max_unscored", "cache_path", "report_to")
    ),
    "how the machine does it, with the same result": frozenset(
        (
            *("batch_size", "concurrency", "timeout", "tensor_parallel_size", "device", "judge_concurrency"),
            *("judge_timeout", "api_key_env", "judge_api_key_env"),
        )
    ),
    "known by what they name": frozenset(
        (
            *("model", "base_model", "base", "revision", "base_url", "chat_template_path", "judge_model"),
            *("server_template", "guard"),
            *("judge_base_url", "steer_subspace", "gate", "reference", "compare", "include_path", "suffixes", "labels"),
        )
    ),
}
"""Options that evaluations with the same results may differ in, by the reason."""
NOT_IN_IDENTITY = frozenset().union(*HARMLESS.values())
COLDEST = 0.01
"""The lowest temperature besides 0; lower ones overflow."""
RESPONSE_TOKENS = 512
"""Default maximum length of a response."""
TESTBED_TOKENS = 24
"""Maximum length of a response on the testbed."""
N_MADE = 256
"""Default number of prompts from each split of the testbed."""


@dataclass(frozen=True)
class ResponseArguments:
    """Model and sampling."""

    model: str = option(
        "testbed",
        "Model: testbed, testbed:N, a model's folder, a finished run or adapter, or a hub id; with "
        "--backend openai the model's name on the server.",
    )
    base_model: str | None = option(
        None,
        "Base model of an adapter, if it has moved; with --backend openai its name on the server: if "
        "the adapter then changes no answer, the command stops.",
    )
    backend: str = option("hf", "Backend: hf or vllm (in this process), or openai (a server).")
    base_url: str | None = option(None, "URL of the server, such as http://localhost:8000/v1.")
    api_key_env: str = option("OPENAI_API_KEY", "Environment variable that holds the server's API key.")
    concurrency: int = option(16, "Number of parallel requests to the server.")
    timeout: float = option(120.0, "Time-out for a response of the server, in seconds.")
    dtype: str = option("auto", f"Type of the weights: {', '.join(DTYPES)}.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.")
    trust_remote_code: bool = option(False, "Run custom code that comes with the model.")
    batch_size: int = option(32, "Conversations per batch (hf); with vllm, chunks of 8 times this number.")
    tensor_parallel_size: int = option(1, "Number of GPUs that share the model (vllm).")
    max_model_len: int | None = option(None, "Maximum context length (vllm).")
    clade_oracle: bool = option(
        False, "Give a run with --clade categories the true category of each prompt, in place of a predicted one (hf)."
    )
    max_new_tokens: int | None = option(
        None, f"Maximum length of a response in tokens; default {RESPONSE_TOKENS}, on the testbed {TESTBED_TOKENS}."
    )
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.")
    seed: int = option(0, "Seed for sampling and for the selection of prompts.")
    system_prompt: str | None = option(None, "A system message before each conversation.")
    chat_template_path: str | None = option(
        None, "Chat template for a model without one: a Jinja file, or human_assistant."
    )
    guard: str | None = option(
        None,
        "Folder of a calibrated guard of the model (`sails guard`): it refuses prompts before the model responds (hf).",
    )
    server_template: str | None = option(
        None,
        "The chat template that a server was started with, likewise (openai): if it begins turns with plain text, "
        "responses end there, as they do without a server.",
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
        if self.guard is not None and self.backend != "hf":
            raise InputError(
                f"guard is given, but a guard reads hidden states, which are out of reach with backend "
                f"{self.backend!r};\nuse --backend hf"
            )
        if self.backend == "openai" and self.chat_template_path is not None:
            raise InputError(
                "chat_template_path is given, but a server has its own template;\n"
                "leave it out, or say which one it was started with: --server_template"
            )
        if self.backend != "openai" and self.server_template is not None:
            raise InputError("server_template is given without --backend openai; give both, or --chat_template_path")

    def sampling(self, prompts: Sequence[Prompt]) -> Sampling:
        """Return how to draw responses to the prompts."""
        n_tokens = self.max_new_tokens or (TESTBED_TOKENS if is_of_testbed(prompts) else RESPONSE_TOKENS)
        return Sampling(n_tokens, self.temperature, self.seed)


@dataclass(frozen=True)
class ChatArguments:
    """Model and sampling of a conversation."""

    model: str = option(
        "testbed", "Model: testbed, testbed:N, a model's folder, a finished run or adapter, a GGUF file, or a hub id."
    )
    base: bool = option(False, "Answer each prompt twice, side by side: without adapter and steering, and with them.")
    prompt: str | None = option(None, "Answer this prompt and end.")
    system_prompt: str | None = option(None, "A system message before the conversation.")
    max_new_tokens: int = option(512, "Maximum length of an answer in tokens.")
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.")
    seed: int = option(0, "Seed for sampling.")
    dtype: str = option("auto", f"Type of the weights: {', '.join(DTYPES)}.")
    device: str | None = option(None, "Such as cpu or cuda:1; default: a GPU, if there is one.")
    base_model: str | None = option(None, "Base model of an adapter, if it has moved.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.")
    trust_remote_code: bool = option(False, "Run custom code that comes with the model.")
    chat_template_path: str | None = option(
        None, "Chat template for a model without one: a Jinja file, or human_assistant."
    )

    def __post_init__(self) -> None:
        self.response()
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("prompt is empty; give a text, or leave it out to talk in the terminal")

    def response(self) -> ResponseArguments:
        """Return the options that evaluations have, too; this checks them."""
        shared = {option.name for option in fields(self)} & {option.name for option in fields(ResponseArguments)}
        return ResponseArguments(**{name: getattr(self, name) for name in shared})


@dataclass(frozen=True)
class PromptArguments:
    """Prompts."""

    prompts: list[str] = field(
        default_factory=lambda: ["testbed"],
        metadata={
            "help": "Prompt sets: names, files, datasets on the hub, or testbed; docs/prompt_sets.md lists the names."
        },
    )
    n_prompts: int | None = option(
        None, f"Prompts from each set, balanced over categories; default: all (testbed: {N_MADE})."
    )
    prompt_column: str | None = option(None, "Column of the prompts, if a file does not use a common name.")
    category_column: str | None = option(None, "Column of the categories, if a file does not use a common name.")
    kind: str | None = option(
        None, "Kind of all prompts in a file without a column `kind`: harmful, benign or dual_use."
    )
    split: str | None = option(None, "Split of a folder or a dataset on the hub; default: train.")
    on_bad_rows: str = option(
        "error", "Rows of a file that cannot be read, such as ones that are not UTF-8: error, or skip (counted)."
    )
    part: str = option(
        "test", "Part of a set that comes with the package: test, validation (to choose settings), or train."
    )

    def __post_init__(self) -> None:
        check_least(self, n_prompts=1)
        if not self.prompts or not all(self.prompts):
            raise InputError("no prompts are given; give --prompts, such as testbed or hex-phi")
        if len(set(self.prompts)) < len(self.prompts):
            raise InputError(f"a prompt set is given twice ({' '.join(self.prompts)}); give each once")
        check_choice("part", self.part, ("test", "validation", "train"))
        check_choice("on_bad_rows", self.on_bad_rows, ("error", "skip"))
        if self.kind is not None:
            check_choice("kind", self.kind, ("harmful", "benign", "dual_use"))


@dataclass(frozen=True)
class RunArguments:
    """Output and cache."""

    output_dir: str | None = option(None, "Output folder; default: runs/eval-..., named after the model.")
    cache_path: str | None = option(None, "File that caches responses and verdicts; several processes can share it.")
    retry_unscored: bool = option(False, "Repeat failed requests only.")
    max_unscored: float = option(0.02, "Maximum share of unscored verdicts; above it, the command exits with code 1.")
    progress: bool = option(True, "Show progress bars.")
    overwrite_output_dir: bool = option(False, OVERWRITE)

    def __post_init__(self) -> None:
        if not 0 <= self.max_unscored <= 1:
            raise InputError(f"max_unscored is {self.max_unscored}, but it is a share: choose 0 to 1")


@dataclass(frozen=True)
class TrackerArguments:
    """Trackers."""

    report_to: list[str] = option([], REPORT_TO)

    def __post_init__(self) -> None:
        services_of(self.report_to)


@dataclass(frozen=True)
class AnswerArguments:
    """Output."""

    output: str | None = option(None, "File of JSON lines to write; default: runs/answers-..., named after the model.")
    progress: bool = option(True, "Show progress bars.")
    overwrite_output_dir: bool = option(False, "Replace the output file, if it is there.")

    def __post_init__(self) -> None:
        if self.output is not None and not self.output.endswith(".jsonl"):
            raise InputError(f"output is {self.output}; name a file that ends in .jsonl")


@dataclass(frozen=True)
class ComparedArguments:
    """Comparison."""

    compare: str | None = option(
        None,
        "Another model to evaluate on the same prompts, with the same judges and seed, and to subtract: `base` (the "
        "model without its adapter, steering and guard), or a model like --model, on the same backend.",
    )

    def __post_init__(self) -> None:
        if self.compare == "":
            raise InputError("compare is empty; give base, or a model such as testbed or the folder of a run")


@dataclass(frozen=True)
class ReferenceArguments:
    """Reference."""

    reference: str | None = option(
        None,
        "Answers to compare with, each pair judged in both orders: a model (like --model, same "
        "backend), the responses.jsonl of an earlier evaluation, or `set` (the answers that come with "
        "the prompts).",
    )


@dataclass(frozen=True)
class DivergenceArguments:
    """Divergence."""

    base: str | None = option(None, "Model to compare with (like --model); default: an adapter's base model.")
    reference: str | None = option(
        None,
        "Answers that the models are compared on: a model's (like --model), those of a responses.jsonl, or `set` (they "
        "come with the prompts); default: the base model's own.",
    )

    def __post_init__(self) -> None:
        for name in ("base", "reference"):
            if getattr(self, name) == "":
                raise InputError(f"{name} is empty; give a model, such as testbed or a run's folder, or leave it out")
