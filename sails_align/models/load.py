"""Load only as many blocks of a model as are to be run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import logging as transformers_logging

from sails_align.core.errors import InputError
from sails_align.models.attention import exact_attention


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
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    with model_errors(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path, **where)
    _truncate(config.get_text_config(decoder=True), deepest_layer, model_name_or_path)
    options = {"config": config, "dtype": dtype, "attn_implementation": exact_attention(config), **where}
    options["use_safetensors"] = (
        True  # else transformers opens pytorch_model.bin, a pickle, where there is nothing else
    )
    with _no_load_report(), not_partitioned(), model_errors(model_name_or_path):
        model, loading = AutoModel.from_pretrained(model_name_or_path, output_loading_info=True, **options)
    _refuse_missing(model_name_or_path, model, loading)
    return model.get_decoder().to(device).eval()


def check_whole(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint that lacks weights, which transformers would fill with fresh values. Only names are read.

    Raises:
        InputError: then, or if there is no such model.
    """
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _no_load_report(), not_partitioned(), model_errors(name, RuntimeError):
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


@contextmanager
def model_errors(name: str | Path, *more: type[Exception]) -> Iterator[None]:
    """Turn transformers' errors about a model that is missing, unknown or not whole into one that says what to do.

    Args:
        name: of the model.
        more: further exceptions, whose first line then is the cause.
    """
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        if "contains custom code" in str(error):
            raise InputError(
                f"the model {name} comes with code of its own, which is not run;\n"
                "read that code, and give --trust_remote_code true if you trust it"
            ) from error
        if not isinstance(error, more):
            raise
        raise _cannot_load(name, error) from error
    except (OSError, SafetensorError, *more) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not transformers' own
            raise
        raise _cannot_load(name, error) from error


def _cannot_load(name: str | Path, error: Exception) -> InputError:
    cause = str(error).strip().splitlines()[0]
    return InputError(
        f"cannot load the model {name}: {cause}\ncheck the name, and that the copy is whole; without network, "
        "download it first (hf download) or give a local folder"
    )


@contextmanager
def not_partitioned() -> Iterator[None]:
    """Models made in the block are whole on every process.

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


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Without the table of the unused weights, which here are the ones left out on purpose, and without a bar."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
