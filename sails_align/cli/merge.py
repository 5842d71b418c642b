"""The command `sails merge`: merge a trained adapter into its base model, which gives a plain model.

sails merge runs/mine --output runs/mine-merged
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.edits.options import MergeOptions


@dataclass(frozen=True)
class MergeFolders:
    """The adapter, and the merged model."""

    run: Path = field(
        metadata={"help": "Folder of a finished run, or any folder with a LoRA adapter.", "positional": True}
    )
    output: Path = field(metadata={"help": "The folder to make."})


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Merge an adapter into its base model, check the result, and write it with tokenizer and card.

    Raises:
        InputError: as `merge_adapter`; or if the device is not there.
    """
    folders, options = CommandLine.read(argv).parse([MergeFolders, MergeOptions], prog=prog)
    import torch

    from sails_align.edits.merge import merge_adapter
    from sails_align.export.card import write_card
    from sails_align.models.adapters import read_json
    from sails_align.models.spec import model_path

    merged = merge_adapter(
        folders.run,
        folders.output,
        base_model=model_path(options.base_model) if options.base_model else None,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=_checked_device(options.device),
        finish=lambda folder: write_card(folders.run, folder, merged=True),
    )
    name = str(merged.dtype).removeprefix("torch.")
    print(f"merged    {merged.folder}/ ({merged.n_parameters:,} parameters, {name}), from {merged.base_model}")
    print(
        f"checked   its logits differ from the unmerged model's by at most {merged.difference:.1e} in float32 "
        f"(largest logit {merged.largest_logit:.1f}; random tokens)"
    )
    if merged.dtype != torch.float32:
        print(f"rounding  to {name} changes logits by up to {merged.written:.1e}; --dtype float32 keeps all precision")
    trained_with = read_json(folders.run / "run.json").get("options", {}).get("model", {})
    if trained_with.get("load_in_4bit") or trained_with.get("load_in_8bit"):
        print("note      it was trained on a quantized base model, and is merged into the one that is not quantized:")
        far = "install bitsandbytes to see how far it is from what was trained"
        if merged.from_quantized is not None:
            far = f"its logits differ from those of what was trained by up to {merged.from_quantized:.2g}"
        print(f"          {far}; evaluate the merged model")
    print(f"card      {merged.folder}/README.md")


def _checked_device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not torch.empty(0, device=device).is_meta:
            return device
        cause = "it holds no values"
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        cause = str(error).splitlines()[0]
    raise InputError(f"device is {device!r}, which cannot be used: {cause}; choose cpu, or cuda")
