"""The commands `sails merge` and `sails check-adapter`: what becomes of a finished run.

sails merge runs/mine --output runs/mine-merged      adapter + base model -> a plain model
sails check-adapter runs/mine                        can vLLM serve it as it is, and by which command?
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sails_align.core.errors import CommandParser, InputError

DTYPES = ("float32", "bfloat16", "float16")


def merge(argv: Sequence[str]) -> None:
    """`sails merge`: merge an adapter into its base model, check the result, and write it with tokenizer and card.

    Raises:
        InputError: as `merge_adapter`; or if the device is not there.
    """
    parser = CommandParser(
        allow_abbrev=False, prog="sails merge", description="Merge the adapter of a finished run into its base model."
    )
    parser.add_argument("run", type=Path, help="the directory of a finished run, or any folder with a LoRA adapter")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: the base model's)")
    parser.add_argument("--device", help="where to merge, such as cpu or cuda:1 (default: a GPU if there is one)")
    _add_base_model(parser)
    options = parser.parse_args(argv)

    import torch

    from sails_align.edits.merge import merge_adapter
    from sails_align.export.card import write_card
    from sails_align.models.adapters import read_json

    merged = merge_adapter(
        options.run,
        options.output,
        base_model=_resolved(options.base_model),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=_checked_device(options.device),
        finish=lambda folder: write_card(options.run, folder, merged=True),
    )
    name = str(merged.dtype).removeprefix("torch.")
    print(f"merged    {merged.folder}/ ({merged.n_parameters:,} parameters, {name}), from {merged.base_model}")
    print(
        f"checked   its logits differ from the unmerged model's by at most {merged.difference:.1e} in float32 "
        f"(largest logit {merged.largest_logit:.1f}; random tokens)"
    )
    if merged.dtype != torch.float32:
        print(f"rounding  to {name} changes logits by up to {merged.written:.1e}; --dtype float32 keeps all precision")
    trained_with = read_json(options.run / "run.json").get("options", {}).get("model", {})
    if trained_with.get("load_in_4bit") or trained_with.get("load_in_8bit"):
        print("note      it was trained on a quantized base model, and is merged into the one that is not quantized:")
        far = "install bitsandbytes to see how far it is from what was trained"
        if merged.from_quantized is not None:
            far = f"its logits differ from those of what was trained by up to {merged.from_quantized:.2g}"
        print(f"          {far}; evaluate the merged model")
    print(f"card      {merged.folder}/README.md")


def check(argv: Sequence[str]) -> None:
    """`sails check-adapter`: say whether vLLM can serve an adapter as it is. Ends with exit code 1 if it cannot.

    Raises:
        InputError: if there is no LoRA adapter, its files cannot be read, or its base model is not there.
    """
    parser = CommandParser(
        allow_abbrev=False, prog="sails check-adapter", description="Can vLLM serve the adapter as it is?"
    )
    parser.add_argument("run", type=Path, help="the directory of a finished run, or any folder with a LoRA adapter")
    _add_base_model(parser)
    options = parser.parse_args(argv)

    from sails_align.evaluation.backends.serving import serve_command, serving_report
    from sails_align.models.adapters import load_base_config, read_adapter

    adapter = read_adapter(options.run)
    base_model, base_config = load_base_config(adapter, _resolved(options.base_model))
    problems = serving_report(options.run, base_config)
    blocking = [problem for problem in problems if problem.blocking]
    print(f"adapter   {options.run}/ (rank {adapter.config.r}, {len(adapter.tensors)} tensors), for {base_model}")
    for problem in problems:
        print(f"{'problem' if problem.blocking else 'note':<10}{problem.what}\n{'':<10}-> {problem.remedy}")
    if blocking:
        print("vLLM cannot serve it as it is")
        raise SystemExit(1)
    print(f"vLLM can serve it:\n{serve_command(adapter, base_model)}")


def _add_base_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_model", help="the model it was trained on, if that is no longer where it was")


def _resolved(base_model: str | None) -> str | None:
    """A model's path or id; the testbed can be named as everywhere."""
    from sails_align.models.spec import model_path

    return model_path(base_model) if base_model else base_model


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
