"""Merge an adapter into the model it was trained on: a plain model that needs no PEFT.

The weights are merged in float32 whatever the model's type (bfloat16 becomes float32 without loss), and rounded once,
when they are written.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError
from sails_align.core.files import atomic_folder
from sails_align.edits.options import MergeOptions
from sails_align.edits.quantized_base import quantized_logits
from sails_align.initializers import leaves_base_alone
from sails_align.models.adapters import AdapterFiles, check_complete, load_base_config, read_adapter
from sails_align.models.language_model import copy_processor
from sails_align.models.load import load_causal_lm, load_tokenizer

TOLERANCE = 1e-5
"""Of logits, relative to the largest one if that is above 1. float32 is no finer: one and the same testbed model
differs by 2e-5 between float32 and float64, at a largest logit of 16, and a correct merge differs by as much."""
PROMPTS, PROMPT_LENGTH = 4, 16
"""Sequences of random tokens on which the merged model is compared."""


@dataclass(frozen=True)
class Merged:
    """A merged model, and how far it is from the unmerged one."""

    folder: Path
    base_model: str
    dtype: torch.dtype
    n_parameters: int
    difference: float
    """Largest absolute difference of logits, in float32, between base + adapter and the merged weights."""
    written: float
    """The same between base + adapter in float32 and what was written, loaded again and run in its own type."""
    largest_logit: float
    from_quantized: float | None
    """The same between the quantized base + adapter, which is what was trained, and what was written; None if the base
    was not quantized, or bitsandbytes is not here."""


def edit(run: Path, output: Path, options: MergeOptions, finish: Callable[[Path], object] | None = None) -> Merged:
    """Merge as `merge_adapter`, by options."""
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    where = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return merge_adapter(run, output, base_model=options.base_model, dtype=dtype, device=where, finish=finish)


def merge_adapter(
    folder: str | Path,
    output: str | Path,
    *,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    finish: Callable[[Path], object] | None = None,
) -> Merged:
    """Merge the adapter in a folder into its base model, check the result, and write it with its tokenizer.

    Args:
        folder: of a finished run, or of any LoRA adapter.
        output: the folder to make; it appears when all is written and checked.
        base_model: in place of the one that the adapter names.
        dtype: of the weights that are written; None: the base model's own.
        device: where the models are run; it must hold the model in float32.
        finish: called with the folder before it appears, to add a model card.

    Raises:
        InputError: if the adapter is damaged, not plain LoRA, or of another model; the base model is missing or
            quantized; the output folder is not empty; or the merged model does not compute what the unmerged one does.
    """
    folder, output = Path(folder), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty; give a new folder with --output")
    adapter = read_adapter(folder)
    if not leaves_base_alone(init := adapter.config.init_lora_weights):
        raise InputError(
            f"the adapter in {folder} starts from {init}, which changed the base weights: it does not fit the model;\n"
            "merge the finished run, whose adapter is converted, and not a checkpoint"
        )
    name, base_config = load_base_config(adapter, base_model)
    if getattr(base_config, "quantization_config", None) is not None:
        raise InputError(f"{name} is quantized, and an adapter cannot be merged into rounded weights;\n"
                         "give the model before quantization with --base_model")  # fmt: skip
    check_complete(folder, base_config)
    _check_base(adapter, Path(name), base_config)
    revision = None if base_model else adapter.revision
    own_dtype = base_config.get_text_config(decoder=True).dtype
    dtype = dtype or (own_dtype if isinstance(own_dtype, torch.dtype) else torch.float32)
    ids_BS = _random_ids(base_config)
    with atomic_folder(output) as temporary:
        unmerged = PeftModel.from_pretrained(load_for_logits(name, torch.float32, device, revision), str(folder)).eval()
        merged, written_BSV = _merge(unmerged, ids_BS, dtype, device, temporary)
        _save_tokenizer(folder, name, revision, temporary)
        copy_processor(name, base_config, temporary, revision)
        if finish is not None:
            finish(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes it private
    trained_BSV = quantized_logits(adapter, base_model, ids_BS)
    from_quantized = None if trained_BSV is None else (written_BSV - trained_BSV).abs().max().item()
    return Merged(output, name, dtype, **merged, from_quantized=from_quantized)


def _random_ids(config: PreTrainedConfig) -> torch.Tensor:
    """Token ids (B, S), the same in every run."""
    generator = torch.Generator().manual_seed(0)
    n_tokens = config.get_text_config(decoder=True).vocab_size
    return torch.randint(n_tokens, (PROMPTS, PROMPT_LENGTH), generator=generator)


def _check_base(adapter: AdapterFiles, base: Path, base_config: PreTrainedConfig) -> None:
    """Refuse a base model that is not the one which `run.json` says the adapter was trained on."""
    trained_on = adapter.identity.get("model") or {}
    commit, found = trained_on.get("commit"), getattr(base_config, "_commit_hash", None)
    different = [] if not commit or not found or commit == found else [f"commit {commit}, here {found}"]
    hashes = trained_on.get("files", {}) if base.is_dir() else {}
    for name, sha256 in hashes.items():
        own = name.startswith("tokenizer")  # the run has one of its own
        if not own and not ((base / name).is_file() and file_hash(base / name) == sha256):
            different.append(name)
    if different:
        raise InputError(
            f"the adapter in {adapter.folder} was trained on another model than {base} "
            f"(different: {', '.join(different)});\ngive the model it was trained on, with --base_model"
        )


def _merge(
    unmerged: PeftModel, ids_BS: torch.Tensor, dtype: torch.dtype, device: str, output: Path
) -> tuple[dict[str, Any], torch.Tensor]:
    """Merge, write the model's files, and compare. Returns the measured fields of `Merged`, and the logits (B, S, V) of
    what was written."""
    expected_BSV = logits(unmerged, ids_BS)
    try:
        merged: Any = unmerged.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT's word for values that are not finite
        raise InputError(f"the adapter cannot be merged: {str(error).splitlines()[0]}; train again") from error
    difference = check_logits(logits(merged, ids_BS), expected_BSV)
    merged.to(dtype).save_pretrained(output)
    # What is written is what is checked: tied weights, shards and names are right only if this model is.
    written_BSV = logits(load_for_logits(output, dtype, device), ids_BS)
    if dtype == torch.float32:
        written = check_logits(written_BSV, expected_BSV)
    else:
        written = (written_BSV - expected_BSV).abs().max().item()  # rounding: told, not judged
    largest = expected_BSV.abs().max().item()
    measured = {
        "n_parameters": merged.num_parameters(),
        "difference": difference,
        "written": written,
        "largest_logit": largest,
    }
    return measured, written_BSV


def _save_tokenizer(folder: Path, base_model: str, revision: str | None, output: Path) -> None:
    """The run's tokenizer with its chat template; that of the base model for an adapter without one."""
    has_own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder)) if has_own else load_tokenizer(base_model, revision=revision)
    tokenizer.save_pretrained(output)


def load_for_logits(
    name: str | Path, dtype: torch.dtype, device: str = "cpu", revision: str | None = None
) -> PreTrainedModel:
    """A model in evaluation mode, with the attention that computes what it was trained to (see `exact_attention`)."""
    model = load_causal_lm(str(name), dtype=dtype, revision=revision)
    try:
        return model.to(device).eval()  # pyright: ignore[reportArgumentType]
    except torch.OutOfMemoryError as error:
        raise InputError(f"{name} in {dtype} does not fit on {device}; use --device cpu") from error


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, ids_BS: torch.Tensor) -> torch.Tensor:
    """Logits (B, S, V) of a model, on the CPU and in float32."""
    return model(input_ids=ids_BS.to(model.device)).logits.float().cpu()


def check_logits(found_BSV: torch.Tensor, expected_BSV: torch.Tensor) -> float:
    """The largest absolute difference of logits.

    Raises:
        InputError: if it is more than float32's rounding explains, or not a number.
    """
    difference = (found_BSV - expected_BSV).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected_BSV.abs().max().item())
    if not difference <= allowed:  # NaN is not
        raise InputError(
            f"the merged model is wrong: its logits differ from the unmerged model's by {difference:.2g}, more than "
            f"{allowed:.2g};\nnothing is written; serve the adapter itself instead"
        )
    return difference
