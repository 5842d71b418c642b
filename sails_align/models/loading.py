"""What surrounds the loading of a model: errors that say what to do, whole weights, no reports."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.integrations import deepspeed
from transformers.utils import logging as transformers_logging

from sails_align.core.errors import InputError


@contextmanager
def model_errors(name: str | Path, *more: type[Exception], what: str = "model") -> Iterator[None]:
    """Turn transformers' errors about a model that is missing, unknown or not whole into one that says what to do.

    Args:
        name: of the model.
        more: further exceptions, whose first line then is the cause.
        what: it is: a model, a tokenizer, an adapter.
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
        raise _cannot_load(what, name, error) from error
    except (OSError, SafetensorError, *more) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not transformers' own
            raise
        raise _cannot_load(what, name, error) from error


def _cannot_load(what: str, name: str | Path, error: Exception) -> InputError:
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"cannot load the {what} {name}: {cause}\ncheck the name, and that the copy is whole; without network, "
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


@contextmanager
def no_load_report() -> Iterator[None]:
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
