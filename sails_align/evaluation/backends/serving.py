"""Check whether vLLM can serve an adapter: what it would refuse, and what it would silently compute wrongly.

From vLLM's sources (up to 0.31): `config/lora.py` (ranks), `lora/peft_helper.py` (what it reads of
adapter_config.json), `lora/lora_model.py` (modules), `lora/ops/triton_ops` (types). vLLM itself is not needed here.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.vllm_options import MAX_LORA_RANKS, max_lora_rank
from sails_align.initializers import leaves_base_alone
from sails_align.models.adapters import AdapterFiles, read_adapter, tensor_faults
from sails_align.models.hooks import decoder_layers
from sails_align.models.load import empty_model, load_config
from sails_align.models.spec import ModelSpec

DTYPES = ("F32", "F16", "BF16")
UNREAD = (
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_qalora",
    "use_bdlora",
)
"""Options of PEFT that change what the adapter computes, and that vLLM does not read."""
MIN_CPU_HEAD_DIM = 32
MERGE = "serve the merged model: sails merge"


@dataclass(frozen=True)
class Problem:
    """A reason why vLLM cannot serve an adapter."""

    what: str
    remedy: str
    blocking: bool = True
    """Whether vLLM cannot serve it on any device."""


def check_serving(spec: ModelSpec) -> None:
    """Refuse an adapter that vLLM would serve wrongly or not at all; raise `InputError` with what to do about it."""
    if spec.adapter is None:
        return
    config = load_config(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    for problem in serving_report(Path(spec.adapter), config):
        if problem.blocking:
            raise InputError(f"vLLM cannot serve {spec.adapter}: {problem.what};\n{problem.remedy}")


def serving_report(folder: Path, base_config: PreTrainedConfig) -> list[Problem]:
    """Return all that keeps vLLM from serving an adapter on its base model.

    Args:
        folder: of the adapter.
        base_config: of the base model.

    Raises:
        InputError: if there is no LoRA adapter, or its files cannot be read.
    """
    adapter = read_adapter(folder)
    return [
        *config_problems(adapter.config),
        *_init_problems(adapter.config),
        *_tensor_problems(adapter, base_config),
        *_device_problems(base_config),
    ]


def config_problems(config: LoraConfig) -> Iterator[Problem]:
    """Yield what keeps vLLM from serving adapters with this configuration."""
    if max_lora_rank(config.r) is None:
        yield Problem(f"its rank is {config.r}, and vLLM takes at most {MAX_LORA_RANKS[-1]}", MERGE)
    if config.use_dora:
        yield Problem("it is DoRA, which vLLM does not load", MERGE)
    if config.bias != "none" or config.lora_bias:
        # PEFT cannot merge biases of an adapter into modules that have none, as is the rule.
        remedy = "serve it with transformers and PEFT" if config.lora_bias else MERGE
        yield Problem("it has trained biases, which vLLM does not load", remedy)
    if config.modules_to_save:
        names = ", ".join(sorted(config.modules_to_save))
        yield Problem(f"it holds whole modules ({names}: modules_to_save), which vLLM does not load", MERGE)
    others = {value for value in config.rank_pattern.values() if value != config.r}  # pyright: ignore[reportOptionalMemberAccess]
    if others:
        ranks = ", ".join(map(str, sorted(others)))
        yield Problem(f"rank_pattern gives some modules another rank ({ranks}): vLLM would scale these wrongly", MERGE)
    if any(value != config.lora_alpha for value in config.alpha_pattern.values()):  # pyright: ignore[reportOptionalMemberAccess]
        yield Problem("alpha_pattern gives some modules another scale, which vLLM does not read", MERGE)
    unread = [name for name in UNREAD if config.to_dict().get(name)]
    if unread:
        yield Problem(f"it uses {', '.join(unread)}, which vLLM does not read", MERGE)


def _init_problems(config: LoraConfig) -> Iterator[Problem]:
    if not leaves_base_alone(config.init_lora_weights):
        yield Problem(
            f"its initialization ({config.init_lora_weights}) changed the base weights, or is subtracted; "
            "vLLM has the published ones",
            "use the finished run, whose adapter is converted, and not a checkpoint; or train with another --init",
        )


def _tensor_problems(adapter: AdapterFiles, base_config: PreTrainedConfig) -> Iterator[Problem]:
    faults = tensor_faults(adapter, base_config)
    if damage := faults.damage:
        yield Problem(f"it is not whole: {damage}", "copy it again, or train again")
    if mismatch := faults.mismatch:
        yield Problem(f"it is of another model: {mismatch}", "give the model it was trained on, with --base_model")
    types = sorted({dtype for dtype, _ in adapter.tensors.values()} - set(DTYPES))
    if types:
        yield Problem(f"its weights are {', '.join(types)}; vLLM reads {', '.join(DTYPES)}", "save it in bfloat16")
    yield from module_problems({_module(name) for name in adapter.tensors if "lora_" in name}, base_config)


def module_problems(modules: set[str], base_config: PreTrainedConfig) -> Iterator[Problem]:
    """Yield a problem if vLLM does not serve adapters of some of these modules."""
    others = sorted(modules - _linear_modules(base_config))
    if others:
        yield Problem(
            f"it adapts {', '.join(others[:3])}{', ...' * (len(others) > 3)}; "
            "vLLM serves adapters of the linear modules of decoder blocks",
            MERGE,
        )


def _module(tensor: str) -> str:
    """Return the module: base_model.model.model.layers.0.mlp.up_proj.lora_A.weight -> model.layers.0.mlp.up_proj"""
    return tensor.removeprefix("base_model.model.").partition(".lora_")[0]


def _linear_modules(base_config: PreTrainedConfig) -> set[str]:
    model = empty_model(base_config)
    within = {id(module) for block in decoder_layers(model) for module in block.modules()}
    return {name for name, module in model.named_modules() if id(module) in within and isinstance(module, nn.Linear)}


def _device_problems(base_config: PreTrainedConfig) -> Iterator[Problem]:
    config = base_config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim < MIN_CPU_HEAD_DIM:
        yield Problem(
            f"the model's heads are {head_dim} wide, and vLLM for CPUs needs {MIN_CPU_HEAD_DIM}",
            "serve it on a GPU, or with transformers",
            blocking=False,
        )
    if config.dtype == torch.float32:
        yield Problem(
            "the model is float32, and on GPUs vLLM computes adapters in 16 bits",
            "leave --dtype out (vLLM converts both), or serve the merged model with --dtype float32",
            blocking=False,
        )


def serve_command(adapter: AdapterFiles, base_model: str, place: str | None = None) -> str:
    """Return the command line that serves an adapter with vLLM, under the name of its folder.

    Args:
        adapter: that vLLM can serve.
        base_model: its name or path.
        place: what to write for the folder; None: its path.
    """
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in adapter.folder.resolve().name)
    place = place or str(adapter.folder)
    words = ["vllm", "serve", base_model, "--enable-lora", "--max-lora-rank", str(max_lora_rank(adapter.config.r))]
    words += ["--lora-modules", f"{name}={place}"]
    # Of the base's generation_config.json only the EOS tokens; the adapter's file says nothing else, and its own.
    words += ["--generation-config", place if (adapter.folder / GENERATION_CONFIG_NAME).is_file() else "vllm"]
    if adapter.revision not in (None, "main"):
        words += ["--revision", str(adapter.revision)]
    if (adapter.folder / "chat_template.jinja").is_file():  # vLLM takes the base model's, which may have none
        words += ["--chat-template", f"{place}/chat_template.jinja"]
    return shlex.join(words)
