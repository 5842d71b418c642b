"""Options of `sails eval harness`."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import OVERWRITE, check_choice, check_least, option
from sails_align.models import DTYPES


@dataclass(frozen=True)
class HarnessArguments:
    """Model, base model and tasks."""

    tasks: list[str] = option(["testbed"], "lm-eval tasks, groups or tags (a,b or a b), YAML files, or testbed.")
    model: str = option("testbed", "testbed, testbed:N, a model's folder, a finished run or adapter, or a hub id.")
    base_model: str | None = option(None, "Base model of an adapter, if it has moved.")
    base: str | None = option(None, "Model to compare with, or none; default: an adapter's base model, else none.")
    backend: str = option("hf", "Backend: hf or vllm.")
    dtype: str = option("auto", f"Type of the weights: {', '.join(DTYPES)}.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.")
    trust_remote_code: bool = option(False, "Run custom code that comes with the model.")
    apply_chat_template: str = option("auto", "true, false, or auto: if the model's tokenizer has one.")
    fewshot_as_multiturn: bool = option(True, "With a chat template: few-shot examples are turns of the conversation.")
    system_instruction: str | None = option(None, "A system message before each request.")
    num_fewshot: int | None = option(None, "Number of few-shot examples; default: the task's.")
    limit: int | None = option(None, "Number of items per task, for a quick trial; default: all.")
    batch_size: str = option("8", "A number, or auto.")
    tensor_parallel_size: int = option(1, "Number of GPUs that share the model (vllm).")
    max_model_len: int | None = option(None, "Maximum context length (vllm).")
    device: str | None = option(None, "Such as cuda:1 (hf); default: a GPU, if there is one.")
    include_path: str | None = option(None, "Folder with your own tasks in YAML files.")
    testbed: str | None = option(None, "Testbed whose facts the testbed's tasks ask for; default: the model's own.")
    seed: int = option(0, "Seed for few-shot examples and sampling.")
    output_dir: str | None = option(None, "Output folder; default: runs/eval-harness-..., named after the model.")
    overwrite_output_dir: bool = option(False, OVERWRITE)

    def __post_init__(self) -> None:
        # `a,b` and `a b` are the same list; YAML's true is no text.
        object.__setattr__(self, "tasks", [name for names in self.tasks for name in names.split(",") if name])
        object.__setattr__(self, "apply_chat_template", str(self.apply_chat_template).lower())
        check_choice("backend", self.backend, ("hf", "vllm"))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("apply_chat_template", self.apply_chat_template, ("auto", "true", "false"))
        if not self.tasks:
            raise InputError("no tasks are given; give --tasks, such as testbed or mmlu,gsm8k")
        check_least(self, num_fewshot=0, limit=1, tensor_parallel_size=1, max_model_len=1, seed=0)
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"batch_size is {self.batch_size!r}; choose auto, or 1 or more")
