"""A model of one's own, loaded for inference with its adapter, and conversations as it reads them."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.evaluation.records import Completion, Conversation, ModelSpec
from sails_align.models.attention import exact_attention


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        InputError: if there is none.
    """
    from transformers import AutoTokenizer

    revision = spec.revision if spec.tokenizer == spec.base else None
    with _load_errors(f"the tokenizer {spec.tokenizer}"):
        tokenizer = AutoTokenizer.from_pretrained(
            spec.tokenizer, revision=revision, trust_remote_code=spec.trust_remote_code
        )
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    return tokenizer


def load_model(spec: ModelSpec, device: str | None = None) -> PreTrainedModel:
    """A model with its adapter, for inference.

    Raises:
        InputError: if one of them cannot be loaded, or the adapter does not fit the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    where = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    with _load_errors(f"the model {spec.base}"):
        config = AutoConfig.from_pretrained(spec.base, **where)
        options = {"config": config, "dtype": spec.dtype, "attn_implementation": exact_attention(config), **where}
        options["use_safetensors"] = True  # no pickles
        model = AutoModelForCausalLM.from_pretrained(spec.base, device_map=device, **options)
    if spec.adapter is not None:
        model = _add_adapter(model, Path(spec.adapter))
    return model.eval()


def _add_adapter(model: PreTrainedModel, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights} is missing; give the folder of a LoRA adapter in safetensors format")
    with _load_errors(f"the adapter {folder}"), warnings.catch_warnings():
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


@contextmanager
def _load_errors(what: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load {what}: {cause}\ncheck the name, and that the copy is whole") from error


def context_length(config: PreTrainedConfig) -> int:
    """Tokens of a prompt and its response together, at most."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], context: int
) -> list[list[int] | Completion]:
    """Token ids of each conversation up to where the response begins; or the error, if there is no way to respond.

    A text is not given a second BOS if it begins with one.

    Args:
        tokenizer: of the model.
        conversations: messages or texts.
        context: tokens of a prompt and its response together, at most.

    Raises:
        InputError: if messages are given and there is no chat template.
    """
    if tokenizer.chat_template is None and any(not isinstance(conversation, str) for conversation in conversations):
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, so the model cannot be asked anything;\n"
            "give a model that was tuned for chats, an adapter whose folder has a tokenizer with a template, or a\n"
            "template by --chat_template_path (human_assistant suits base models)"
        )
    encoded: list[list[int] | Completion] = []
    for conversation in conversations:
        try:
            ids = _ids(tokenizer, conversation)
        except TemplateError as error:  # Gemma's has no system role, for one
            encoded.append(Completion(None, error=f"the chat template does not take this conversation: {error}"))
            continue
        if not 0 < len(ids) < context:
            error = f"the conversation is {len(ids)} tokens long, and the model's context is {context}"
            encoded.append(Completion(None, error=error))
        else:
            encoded.append(ids)
    return encoded


def _ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    if isinstance(conversation, str):
        # Without truncation, but also without the warning that the text is longer than the model takes.
        ids: Any = tokenizer(conversation, verbose=False)["input_ids"]
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in conversation], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids
