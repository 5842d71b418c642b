"""Check that an SAE fits the model: the block it reads, its width, and the model it was trained on."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import PretrainedConfig

from sails_align.core.errors import InputError

if TYPE_CHECKING:
    from sails_align.saes.load import SAEInfo

logger = logging.getLogger(__name__)

# TransformerLens: `blocks.12.hook_resid_post`. Hugging Face module paths (Gemma Scope 2): `model.layers.12.output`.
_HOOKS = (
    re.compile(r"blocks\.(?P<block>\d+)\.hook_resid_(?P<side>pre|post)"),
    re.compile(r"(?:\w+\.)*layers\.(?P<block>\d+)(?:\.(?P<side>input|output))?"),
)
_INSTRUCT_MARKERS = {"it", "instruct", "chat", "pt", "base"}
_ALIASES = {"mistral-7b": "mistral-7b-v0.1"}  # the name TransformerLens gives it
_SIZE = re.compile(r"\d+(\.\d+)?[bmk]")


def layer_of_hook(hook_name: str) -> int | None:
    """Return the block whose output a hook point is; -1 for embeddings, None outside the residual stream.

    The input of block l (`hook_resid_pre`) is the output of block l - 1.
    """
    for pattern in _HOOKS:
        if match := pattern.fullmatch(hook_name):
            return int(match["block"]) - (match["side"] in ("pre", "input"))
    return None


def layer_of_sae(source: str, hook_names: list[str]) -> int:
    """Return the block (0-based) whose output an SAE reads; raise `InputError` if its hooks name no single one."""
    layers = {layer_of_hook(name) for name in hook_names}
    if len(layers) != 1 or None in layers or -1 in layers:
        raise InputError(
            f"SAE {source} has hook point {' / '.join(hook_names) or 'unknown'}, which is not the output of a block;\n"
            "use an SAE of hook_resid_post: in Gemma Scope the `-res` releases, in Llama Scope `lxr`"
        )
    layer = layers.pop()
    assert layer is not None
    return layer


def check_fits(info: "SAEInfo", model_config: PretrainedConfig, model_name: str, allow_mismatch: bool) -> None:
    """Raise `InputError` if the width, depth or name of an SAE's model does not fit the model.

    A model of the same family and size that differs by an instruct suffix, or that is named after the SAE's model, is
    accepted with a warning, as is a local path whose name says nothing. `allow_mismatch` accepts any name.
    """
    config = model_config.get_text_config()
    trained_on = f"SAE {info.source} was trained on layer {info.layer} of {info.model_name or 'an unnamed model'}"
    if info.d_model != config.hidden_size:
        raise InputError(
            f"{trained_on}, whose width is {info.d_model},\nbut {model_name} has d_model {config.hidden_size}: "
            "use an SAE of this model (`sails train-sae` trains one)"
        )
    if info.layer >= config.num_hidden_layers:
        raise InputError(
            f"{trained_on},\nbut {model_name} has only layers 0 to {config.num_hidden_layers - 1}: use an SAE of it"
        )
    verdicts = {compare_names(info.model_name, name) for name in (model_name, model_config.name_or_path) if name}
    if "same" in verdicts:
        return
    if "variant" in verdicts:
        logger.warning("%s; it is used on %s, a variant of that model", trained_on, model_name)
    elif "unknown" in verdicts:
        logger.warning("%s; that %s descends from it could not be checked by name", trained_on, model_name)
    elif allow_mismatch:
        logger.warning("%s; it is used on %s because a mismatch was allowed", trained_on, model_name)
    else:
        raise InputError(
            f"{trained_on}, but the model is {model_name};\nuse an SAE of this model, or, if it is a fine-tune of "
            f"{info.model_name}, allow the mismatch (--sae_allow_mismatch)"
        )


def compare_names(sae_model: str | None, model: str) -> Literal["same", "variant", "unknown", "different"]:
    """Compare by name the model an SAE was trained on with another model (ids, or local paths).

    Returns:
        "variant": the same up to -it, -instruct, -chat, -pt, -base, or `model` is named `<sae_model>-something`;
        "unknown": the SAE names no model, or `model` is a local folder without a size (`7b`, `270m`) in its name.
    """
    if sae_model is None:
        return "unknown"
    ours, theirs = _tokens(sae_model), _tokens(model)
    if ours == theirs:
        return "same"
    ours_base, theirs_base = _without_markers(ours), _without_markers(theirs)
    if theirs_base[: len(ours_base)] == ours_base:
        return "variant"
    if Path(model).is_dir() and not any(_SIZE.fullmatch(token) for token in theirs):
        return "unknown"
    return "different"


def _tokens(name: str) -> list[str]:
    """Split a name; `google/gemma-2-2b`, `gemma-2-2b` and a hub cache's folder of it are all alike."""
    parts = Path(name).parts
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    short = (cached or [parts[-1] if parts else ""])[0].lower().replace("_", "-").removeprefix("meta-")
    return [token for token in _ALIASES.get(short, short).split("-") if token != "hf"]


def _without_markers(tokens: list[str]) -> list[str]:
    return [token for token in tokens if token not in _INSTRUCT_MARKERS]
