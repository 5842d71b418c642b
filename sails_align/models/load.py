"""Load models: the only place that calls `from_pretrained`, but for TRL's trainers, which take a name.

A name here is what `from_pretrained` takes, a folder or a hub id; `spec.model_path` makes one of what a user writes.
Always exact attention (see `exact_attention`), safetensors and no pickles.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed
from transformers.utils import logging as transformers_logging

from sails_align.core.errors import InputError, first_line
from sails_align.models import clade, similar
from sails_align.models.spec import ModelSpec

OF_LOADING = (ValueError, KeyError, RuntimeError, ImportError)


def exact_attention(config: PreTrainedConfig) -> str | None:
    """Return the attention implementation that computes what the model was trained with; None: the default.

    transformers' default for Gemma 2, SDPA, leaves out the soft-capping of the attention logits without a word
    (`integrations/sdpa_attention.py` takes no `softcap`, as of 5.17), so hidden states would not be those that the
    SAEs were trained on.
    """
    return "eager" if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) else None


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a model's configuration."""
    with model_errors(name, ValueError):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or of an adapter's folder; a `chat_template` replaces its own."""
    with model_errors(name, *OF_LOADING, what="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    named = tokenizer.chat_template
    if isinstance(named, dict) and (
        only := named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    ):
        tokenizer.chat_template = only
    if isinstance(tokenizer.chat_template, str):  # a byte order mark would come before each BOS token
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer that makes tokens without an embedding, with an `InputError`.

    A special token counts only if it is EOS, BOS, padding or unknown, or stands in the chat template: Gemma 3's
    tokenizer has one for images that its small models lack.
    """
    n, added = config.get_text_config(decoder=True).vocab_size, tokenizer.added_tokens_decoder
    named, template = set(tokenizer.all_special_ids), str(tokenizer.chat_template)
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= n}
    for number, token in sorted(beyond.items()):
        if number in named or token in template or not (number in added and added[number].special):
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} tokens, but the model has embeddings "
                f"for {n}: {token!r} ({number}) has none;\ngive the model's own tokenizer, or a model whose embeddings "
                "were resized"
            )


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype | str | None = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Any = None,
    **more: Any,
) -> PreTrainedModel:
    """Load a causal language model, by default with the checkpoint's own dtype and `exact_attention`.

    Without a device it is on the CPU, or where bitsandbytes wants it. `quantization` is a configuration of bitsandbytes
    (QLoRA), and `more` are options of `from_pretrained`. Raises `InputError` if it cannot be loaded.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name, **where)
    options = {"config": config, "dtype": dtype, **where, "use_safetensors": True, "quantization_config": quantization}
    options |= {"attn_implementation": attn_implementation or exact_attention(config), **more}
    with model_errors(name, *OF_LOADING):
        return AutoModelForCausalLM.from_pretrained(name, **{"device_map": device, **options})


def load_model(spec: ModelSpec, device: str | None = None) -> PreTrainedModel:
    """Load a model with its adapter, for inference; on the accelerator, if there is one and no device is given."""
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    where: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    model = load_causal_lm(spec.base, dtype=spec.dtype, device=device, **where)
    if spec.adapter is not None:
        model = _add_adapter(model, Path(spec.adapter))
    return model.eval()


def load_spec_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model to be evaluated, with its chat template."""
    revision = spec.revision if spec.tokenizer == spec.base else None
    trust, template = spec.trust_remote_code, spec.chat_template
    tokenizer = load_tokenizer(spec.tokenizer, revision=revision, trust_remote_code=trust, chat_template=template)
    check_vocabulary(tokenizer, load_config(spec.base, revision=spec.revision, trust_remote_code=trust))
    return tokenizer


def _add_adapter(model: PreTrainedModel, folder: Path) -> Any:
    if (folder / clade.CONFIG).is_file():
        clade.attach(model, clade.load_clade(folder))
        return model
    from sails_align.models.adapters import check_complete

    check_complete(folder, model.config, read_values=False)  # `resolve_model` has read them
    with model_errors(folder, *OF_LOADING, what="adapter"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        return PeftModel.from_pretrained(model, str(folder))


def load_truncated(
    name: str | Path,
    deepest_layer: int,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model's decoder up to a block, without the deeper blocks and without the head.

    Of a multimodal model (Gemma 3) only the language model is kept. It is whole on every process, under ZeRO-3 too.
    Raises `InputError` if there is no such model, the layer is not in it, or the checkpoint lacks weights.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(str(name), **where)
    _truncate(config.get_text_config(decoder=True), deepest_layer, name)
    options = {"config": config, "dtype": dtype, "attn_implementation": exact_attention(config), **where}
    with no_load_report(), not_partitioned(), model_errors(name):
        model, loading = AutoModel.from_pretrained(name, output_loading_info=True, use_safetensors=True, **options)
    _refuse_missing(name, model, loading)
    return model.get_decoder().to(device).eval()


def check_whole(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint that lacks weights, which transformers would fill with fresh values. Only names are read."""
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    with no_load_report(), not_partitioned(), model_errors(name, RuntimeError, ImportError):
        model, loading = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            name, device_map="meta", output_loading_info=True, use_safetensors=True, **where
        )
    _refuse_missing(name, model, loading)


def _refuse_missing(name: str | Path, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    if loading["missing_keys"]:
        raise InputError(
            f"the checkpoint {name} lacks weights of {type(model).__name__}, such as {min(loading['missing_keys'])};\n"
            "give a complete checkpoint (an adapter must be merged first)"
        )


def _truncate(config: PreTrainedConfig, deepest_layer: int, name: str | Path) -> None:
    n_layers = config.num_hidden_layers
    if not 0 <= deepest_layer < n_layers:
        raise InputError(f"layer {deepest_layer} is out of range; choose 0 to {n_layers - 1}, the blocks of {name}")
    config.num_hidden_layers = deepest_layer + 1
    for field in ("layer_types", "mlp_layer_types"):  # the lists that hold an entry for each block
        if (of_blocks := getattr(config, field, None)) is not None:
            setattr(config, field, of_blocks[: deepest_layer + 1])


@contextmanager
def model_errors(name: str | Path, *more: type[Exception], what: str = "model") -> Iterator[None]:
    """Turn transformers' errors about a missing, unknown or incomplete model into an `InputError` with a remedy.

    `more` are further exceptions to turn; `what` is loaded: a model, a tokenizer, an adapter.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, *more) as error:
        if isinstance(error, ValueError) and "contains custom code" in str(error):
            raise InputError(
                f"the model {name} comes with code of its own, which is not run;\n"
                "read that code, and give --trust_remote_code true if you trust it"
            ) from error
        is_systems = isinstance(error, OSError) and error.errno is not None  # not transformers' own
        if is_systems or not isinstance(error, (OSError, SafetensorError, *more)):
            raise
        cause = first_line(error)
        raise InputError(
            f"cannot load the {what} {name}: {cause}{similar(str(name))}\n"
            "check the name, and that the copy is whole; without network, "
            "download it first (hf download) or give a local folder"
        ) from error


@contextmanager
def not_partitioned() -> Iterator[None]:
    """Make models in the block whole on every process.

    Once training arguments with ZeRO-3 exist, transformers splits the models that it loads; and under FSDP with
    `fsdp_cpu_ram_efficient_loading` only the first process of a machine gets the weights.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref  # there is a setter and no getter
    config = None if reference is None else reference()
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    deepspeed.unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
        os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING")
        if efficient is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient


def empty_model(
    config: PreTrainedConfig, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Make a model without weights, on the meta device; it is whole on every process."""
    with not_partitioned(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype, trust_remote_code=trust_remote_code
        )


@contextmanager
def no_load_report() -> Iterator[None]:
    """Silence the table of unused weights, which here are left out on purpose, and the bar."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
