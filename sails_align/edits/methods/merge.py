"""Merge an adapter into the model it was trained on: a plain model that needs no PEFT.

The weights are merged in float32 whatever the model's type (bfloat16 becomes float32 without loss), and rounded once,
when they are written.

An adapter that was trained on a quantized base (QLoRA) makes up for some of the rounding of its weights. It is merged
into the unrounded weights, which gives another model than the one that was trained: `Merged.from_quantized` says how
far the two are apart.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, is_bitsandbytes_available

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError, first_line
from sails_align.core.files import atomic_folder
from sails_align.edits.apply import check_new
from sails_align.edits.logits import checked_device, loaded, logits_of, random_ids
from sails_align.edits.options import MergeOptions
from sails_align.initializers import leaves_base_alone
from sails_align.models.adapters import AdapterFiles, check_complete, load_base_config, read_adapter
from sails_align.models.generation import end_generation, eos_ids, load_generation_config
from sails_align.models.language_model import copy_processor
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.models.quantized import quantization_of_run, use_one_layout
from sails_align.models.spec import model_path

TOLERANCE = 1e-4
"""Of logits, relative to the largest one if that is above 1. Rounding in float32 stays below it, also where an
adapter's weights are large: after a training that diverged, a correct merge differed by 1.4e-5."""


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
    is_from_quantized: bool
    """Whether the adapter was trained on a quantized base."""
    from_quantized: float | None
    """The same between the quantized base + adapter and what was written; None if the base was not quantized, or
    bitsandbytes is not installed."""

    def report(self) -> Iterator[str]:
        """Yield the lines that the command prints."""
        name = str(self.dtype).removeprefix("torch.")
        yield f"merged    {self.folder}/ ({self.n_parameters:,} parameters, {name}), from {self.base_model}"
        yield (
            f"checked   its logits differ from the unmerged model's by at most {self.difference:.1e} in float32 "
            f"(largest logit {self.largest_logit:.1f}; random tokens)"
        )
        if self.dtype != torch.float32:
            yield f"rounding  to {name} changes logits by up to {self.written:.1e}; --dtype float32 keeps all precision"
        if self.is_from_quantized:
            yield "note      it was trained on a quantized base model, and is merged into the unquantized one:"
            distance = "install bitsandbytes to see how far it is from what was trained"
            if self.from_quantized is not None:
                distance = f"its logits differ from those of what was trained by up to {self.from_quantized:.2g}"
            yield f"          {distance}; evaluate the merged model"


def edit(run: Path, output: Path, options: MergeOptions, finish: Callable[[Path], object] | None = None) -> Merged:
    """Merge as `merge_adapter`, by options.

    Raises `InputError` as `merge_adapter`; or if the device cannot be used.
    """
    return merge_adapter(
        run,
        output,
        base_model=model_path(options.base_model) if options.base_model else None,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=checked_device(options.device),
        finish=finish,
    )


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

    Examples:
        >>> merged = sails.merge("adapter", "merged")
        >>> Path("merged/model.safetensors").is_file()
        True
    """
    folder, output = Path(folder), Path(output)
    check_new(output)
    adapter = read_adapter(folder)
    name, base_config = load_base_config(adapter, base_model)
    _check_fits(adapter, name, base_config)
    revision = None if base_model else adapter.revision
    own_dtype = base_config.get_text_config(decoder=True).dtype
    dtype = dtype or (own_dtype if isinstance(own_dtype, torch.dtype) else torch.float32)
    ids_BS = random_ids(base_config)
    with atomic_folder(output) as temporary:
        base = loaded(name, torch.float32, device, revision)
        unmerged_BSV, merged_BSV, n_parameters = _merge(base, folder, ids_BS, dtype, temporary)
        # What is written is what is checked: tied weights, shards and names are right only if this model is.
        written_BSV = logits_of(loaded(str(temporary), dtype, device), ids_BS)
        difference = check_logits(merged_BSV, unmerged_BSV)
        written = (written_BSV - unmerged_BSV).abs().max().item()
        if dtype == torch.float32:  # else rounding is reported, not judged
            check_logits(written_BSV, unmerged_BSV)
        _save_tokenizer(folder, name, revision, temporary)
        copy_processor(name, base_config, temporary, revision)
        if finish is not None:
            finish(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes it private
        trained_BSV = _quantized_logits(adapter, name, revision, ids_BS)
    return Merged(
        folder=output,
        base_model=name,
        dtype=dtype,
        n_parameters=n_parameters,
        difference=difference,
        written=written,
        largest_logit=unmerged_BSV.abs().max().item(),
        is_from_quantized=quantization_of_run(adapter.record) is not None,
        from_quantized=None if trained_BSV is None else (written_BSV - trained_BSV).abs().max().item(),
    )


def _check_fits(adapter: AdapterFiles, base_model: str, base_config: PreTrainedConfig) -> None:
    """Refuse an adapter that changed its base or is damaged, and a base that is quantized or another one."""
    if not leaves_base_alone(init := adapter.config.init_lora_weights):
        raise InputError(
            f"the adapter in {adapter.folder} starts from {init}, which changed the base weights, or is subtracted: it "
            "does not fit the model;\nmerge the finished run, whose adapter is converted, and not a checkpoint"
        )
    if getattr(base_config, "quantization_config", None) is not None:
        raise InputError(
            f"{base_model} is quantized, and an adapter cannot be merged into rounded weights;\n"
            "give the model before quantization with --base_model"
        )
    check_complete(adapter.folder, base_config)
    _check_base(adapter, Path(base_model), base_config)


def _check_base(adapter: AdapterFiles, base: Path, base_config: PreTrainedConfig) -> None:
    """Refuse a base model that is not the one which `run.json` says the adapter was trained on."""
    trained_on = adapter.identity.get("model") or {}
    commit, found = trained_on.get("commit"), getattr(base_config, "_commit_hash", None)
    different = [] if not commit or not found or commit == found else [f"commit {commit}, here {found}"]
    hashes = trained_on.get("files", {}) if base.is_dir() else {}
    for name, sha256 in hashes.items():
        own = not name.endswith((".safetensors", ".bin", ".py")) and name != "config.json"  # of the run's tokenizer
        if not own and not ((base / name).is_file() and file_hash(base / name) == sha256):
            different.append(name)
    if different:
        raise InputError(
            f"the adapter in {adapter.folder} was trained on another model than {base} "
            f"(different: {', '.join(different)});\ngive the model it was trained on, with --base_model"
        )


def _merge(
    base: PreTrainedModel, folder: Path, ids_BS: torch.Tensor, dtype: torch.dtype, output: Path
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Merge and write the model's files.

    Returns the logits (B, S, V) of the unmerged and of the merged model, and the number of parameters.
    """
    unmerged = PeftModel.from_pretrained(base, str(folder)).eval()
    unmerged_BSV = logits_of(unmerged, ids_BS)
    try:
        merged: PreTrainedModel = unmerged.merge_and_unload(safe_merge=True)  # pyright: ignore
    except ValueError as error:  # PEFT's word for values that are not finite
        raise InputError(f"the adapter cannot be merged: {first_line(error)}; train again") from error
    except RuntimeError as error:
        if "Impossible to merge" not in str(error):
            raise
        raise InputError(
            f"the adapter in {folder} cannot be merged: {first_line(error)}\n"
            "use it as an adapter, or train one with lora_bias false"
        ) from error
    _untie_trained(merged)
    merged_BSV = logits_of(merged, ids_BS)
    # Of the adapter's run, if it says what ends a response; and a base's file that contradicts itself is not saved.
    has_own = (folder / GENERATION_CONFIG_NAME).is_file()
    end_generation(merged, eos_ids(load_generation_config(str(folder)) if has_own else merged.generation_config))
    merged.to(dtype).save_pretrained(output)  # pyright: ignore
    return unmerged_BSV, merged_BSV, merged.num_parameters()


def _untie_trained(model: PreTrainedModel) -> None:
    """Have both embeddings written if training (PEFT's `modules_to_save`) has made two of one that they shared."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def _save_tokenizer(folder: Path, base_model: str, revision: str | None, output: Path) -> None:
    """Save the run's tokenizer with its chat template; for an adapter without one, that of the base model."""
    has_own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder)) if has_own else load_tokenizer(base_model, revision=revision)
    tokenizer.save_pretrained(output)


def _quantized_logits(
    adapter: AdapterFiles, base_model: str, revision: str | None, ids_BS: torch.Tensor
) -> torch.Tensor | None:
    """Return the logits (B, S, V) of the model as it was trained, computed where bitsandbytes puts it.

    None, if the base model was not quantized, or bitsandbytes is not installed.
    """
    quantization = quantization_of_run(adapter.record)
    if quantization is None or not is_bitsandbytes_available():
        return None
    dtype = adapter.record["options"]["model"].get("dtype")
    base = load_causal_lm(base_model, dtype=dtype, revision=revision, quantization=quantization)
    use_one_layout(base)
    return logits_of(PeftModel.from_pretrained(base, str(adapter.folder)).eval(), ids_BS)


def check_logits(found_BSV: torch.Tensor, expected_BSV: torch.Tensor) -> float:
    """Return the largest absolute difference of logits.

    Raises `InputError` if it is more than float32's rounding explains, or not a number.
    """
    difference = (found_BSV - expected_BSV).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected_BSV.abs().max().item())
    if not difference <= allowed:  # NaN is not
        raise InputError(
            f"the merged model is wrong: its logits differ from the unmerged model's by {difference:.2g}, more than "
            f"{allowed:.2g};\nnothing is written; serve the adapter itself instead"
        )
    return difference
