"""The language model within a multimodal one (Gemma 3): the only part that is trained, since all data is text.

Text gives a vision tower and its projector no gradient. Their linear layers have names of the decoder's (`q_proj`), and
parameters that are trained but get no gradient end a run under DDP.
"""

import re
import shutil
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def outside_decoder(model: PreTrainedModel) -> str | None:
    """Return a regular expression for `LoraConfig.exclude_modules`: all beside the decoder, but for the head.

    None, if there is nothing: the model is a language model alone.
    """
    beside = _beside_decoder(model)
    return rf"({'|'.join(map(re.escape, beside))})(\..*)?" if beside else None


def freeze_outside_decoder(model: PreTrainedModel) -> None:
    """Exclude from training what stands beside the decoder, but for the head; in place."""
    for name in _beside_decoder(model):
        model.get_submodule(name).requires_grad_(False)


def _beside_decoder(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules that share their parent with the decoder, but for the head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is decoder]
    parent = name.rpartition(".")[0]
    children = model.get_submodule(parent).named_children() if name else ()
    return [f"{parent}.{own}".lstrip(".") for own, module in children if module is not decoder and module is not head]


def copy_processor(name: str, config: PreTrainedConfig, folder: Path, revision: str | None = None) -> None:
    """Copy a multimodal model's image processor beside its weights: vLLM does not load them without it.

    `name` is a hub id or a folder. Nothing is copied for a language model alone.
    """
    if config.get_text_config() is config:
        return
    for file in _PROCESSOR_FILES:
        try:
            found = cached_file(name, file, revision=revision)
        except OSError:  # a model has one of them or both
            continue
        if found is not None:
            shutil.copyfile(found, folder / file)
