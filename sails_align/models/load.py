"""Load models: the only place that calls `from_pretrained`, but for TRL's trainers, which take a name.

A name here is what `from_pretrained` takes, a folder or a hub id; `spec.model_path` makes one of what a user writes.
Always exact attention (see `attention`), safetensors and no pickles.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sails_align.core.errors import InputError
from sails_align.models.attention import exact_attention
from sails_align.models.loading import model_errors, no_load_report, not_partitioned
from sails_align.models.spec import ModelSpec

OF_LOADING = (ValueError, KeyError, RuntimeError, ImportError)


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's configuration.

    Raises:
        InputError: if there is no such model, or it is not cached and the hub cannot be reached.
    """
    with model_errors(name, ValueError):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Args:
        name: of the model, or of the folder of an adapter.
        revision: of a model on the hub.
        trust_remote_code: run code that comes with the model.
        chat_template: in place of its own.

    Raises:
        InputError: if there is none.
    """
    with model_errors(name, *OF_LOADING, what="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


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
    """A causal language model.

    Args:
        name: of the model.
        dtype: of the weights; "auto" is the checkpoint's own.
        device: where it is put; None: on the CPU, or where bitsandbytes wants it.
        revision: of a model on the hub.
        trust_remote_code: run code that comes with the model.
        attn_implementation: of attention; None: the one that computes what the model was trained to.
        quantization: a configuration of bitsandbytes (QLoRA).
        more: options of `from_pretrained`.

    Raises:
        InputError: if it cannot be loaded.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name, **where)
    options = {"config": config, "dtype": dtype, **where, "use_safetensors": True, "quantization_config": quantization}
    options |= {"attn_implementation": attn_implementation or exact_attention(config), **more}
    with model_errors(name, *OF_LOADING):
        return AutoModelForCausalLM.from_pretrained(name, **{"device_map": device, **options})


def load_model(spec: ModelSpec, device: str | None = None) -> PreTrainedModel:
    """A model with its adapter, for inference; on the accelerator, if there is one and no device is given.

    Raises:
        InputError: if one of them cannot be loaded, or the adapter does not fit the model.
    """
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    where: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    model = load_causal_lm(spec.base, dtype=spec.dtype, device=device, **where)
    if spec.adapter is not None:
        model = _add_adapter(model, Path(spec.adapter))
    return model.eval()


def load_spec_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model to be evaluated, with its chat template.

    Raises:
        InputError: if there is none.
    """
    revision = spec.revision if spec.tokenizer == spec.base else None
    trust, template = spec.trust_remote_code, spec.chat_template
    return load_tokenizer(spec.tokenizer, revision=revision, trust_remote_code=trust, chat_template=template)


def _add_adapter(model: PreTrainedModel, folder: Path) -> Any:
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights} is missing; give the folder of a LoRA adapter in safetensors format")
    with model_errors(folder, *OF_LOADING, what="adapter"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # they are an error, below
        adapted = PeftModel.from_pretrained(model, str(folder))
        with safe_open(weights, framework="pt") as file:
            found = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118 -- it is no dict
    expected = {name for name in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in name}
    if different := sorted(expected ^ found):
        what = "is not in its file" if different[0] in expected else "is of no module of the model that it adapts"
        raise InputError(
            f"the adapter {folder} does not fit the model: {different[0]} {what} ({len(different)} such);\n"
            "give the model it was trained on; or it is damaged: copy it again"
        )
    return adapted


def load_truncated(
    model_name_or_path: str | Path,
    deepest_layer: int,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model's decoder up to a block, without the deeper blocks and without the head.

    Of a multimodal model (Gemma 3) only the language model is kept. It is whole on every process, under ZeRO-3 too.

    Args:
        model_name_or_path: of any decoder model that `decoder_layers` supports.
        deepest_layer: index of the last block that is loaded.
        dtype: "auto" is the checkpoint's own.
        device: where it is put.
        revision: of a model on the hub.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: if there is no such model, the layer is not in it, or the checkpoint lacks weights.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(str(model_name_or_path), **where)
    _truncate(config.get_text_config(decoder=True), deepest_layer, model_name_or_path)
    options = {"config": config, "dtype": dtype, "attn_implementation": exact_attention(config), **where}
    options["use_safetensors"] = (
        True  # else transformers opens pytorch_model.bin, a pickle, where there is nothing else
    )
    with no_load_report(), not_partitioned(), model_errors(model_name_or_path):
        model, loading = AutoModel.from_pretrained(model_name_or_path, output_loading_info=True, **options)
    _refuse_missing(model_name_or_path, model, loading)
    return model.get_decoder().to(device).eval()


def check_whole(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint that lacks weights, which transformers would fill with fresh values. Only names are read.

    Raises:
        InputError: then, or if there is no such model.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    with no_load_report(), not_partitioned(), model_errors(name, RuntimeError):
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


def _truncate(config: PreTrainedConfig, deepest_layer: int, model_name_or_path: str | Path) -> None:
    n_layers = config.num_hidden_layers
    if not 0 <= deepest_layer < n_layers:
        raise InputError(
            f"layer {deepest_layer} is out of range; choose 0 to {n_layers - 1}, the blocks of {model_name_or_path}"
        )
    config.num_hidden_layers = deepest_layer + 1
    for name in ("layer_types", "mlp_layer_types"):  # the lists that hold an entry for each block
        if (of_blocks := getattr(config, name, None)) is not None:
            setattr(config, name, of_blocks[: deepest_layer + 1])
