"""A model in a GGUF file (llama.cpp's format), made into a folder that everything else can load.

transformers dequantizes the weights. They are kept as float32 safetensors in the cache folder, under the file's hash,
so that this happens once. The tokenizer's special tokens are checked against the chat template: converted files often
name others than those that the model was trained with.
"""

import importlib.util
import logging
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError, first_line
from sails_align.core.files import atomic_folder, cache_folder, exclusive, write_json
from sails_align.core.log import say
from sails_align.core.suggestions import did_you_mean_path
from sails_align.core.templates import TEMPLATE_ERRORS
from sails_align.models.load import empty_model, no_load_report, not_partitioned

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of the folder in the cache: another one makes it anew."""
SOURCE = "gguf_source.json"
"""In that folder: the name of the file, for model cards."""
MARK = "\ue000answer\ue000"
_ERRORS = (OSError, ValueError, LookupError, RuntimeError, AttributeError, TypeError, struct.error)
"""What the gguf package and transformers raise for files that are damaged, or of an unknown architecture."""


def gguf_folder(file: Path) -> Path:
    """Return the folder of a GGUF file's model and tokenizer, made on first use; raise `InputError` if that fails."""
    if not file.is_file():
        raise InputError(f"there is no file {file}{did_you_mean_path(str(file)) or '; check the path'}")
    folder = cache_folder() / "gguf" / f"{FORMAT}-{file_hash(file)[:32]}"
    if not (folder / "config.json").is_file():
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"reading {file} needs the package gguf;\npip install 'sails-align[gguf]'")
        with exclusive(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "config.json").is_file():  # another process may have made it meanwhile
                _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    say(f"dequantizing {file} into {folder} (once)")
    which: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **which)
        with no_load_report(), not_partitioned():
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **which)
    except _ERRORS as error:
        cause = first_line(error)
        raise InputError(
            f"cannot load the model {file}: {cause}\n"
            "give a whole file of an architecture that transformers can dequantize, or the model's own folder"
        ) from error
    corrected = correct_special_tokens(tokenizer)
    if corrected:
        logger.warning("%s names other tokens than its chat template shows; corrected: %s", file, ", ".join(corrected))
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config: Any = loaded.config
    # transformers (from 5.17 on) saves no model that says it is quantized, though the weights no longer are.
    vars(config).pop("quantization_config", None)
    config.update({**tokens, "dtype": torch.float32})
    model = empty_model(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**tokens)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / SOURCE, {"file": file.name})


def correct_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Use the token that ends an assistant turn in the chat template as EOS, and for padding; return what changed.

    Nothing is changed without a chat template, or where it shows no special token.
    """
    changes: list[str] = []
    ends = _turn_end(tokenizer)
    if ends is not None and tokenizer.eos_token != ends:
        changes.append(f"eos_token {tokenizer.eos_token} -> {ends}")
        tokenizer.eos_token = ends
    # A padding token that opens turns would hide these from the loss.
    if tokenizer.eos_token is not None and tokenizer.pad_token in (None, tokenizer.bos_token):
        changes.append(f"pad_token {tokenizer.pad_token} -> {tokenizer.eos_token}")
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.clean_up_tokenization_spaces:
        changes.append("clean_up_tokenization_spaces true -> false")
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    return changes


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the first special token after an assistant's text."""
    if not tokenizer.chat_template:
        return None
    conversation = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except TEMPLATE_ERRORS:
        return None  # what uses the template says that it fails
    after = text.rpartition(MARK)[2]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [(after.index(token), -len(token), token) for token in special if token in after]
    return min(found)[2] if found else None
