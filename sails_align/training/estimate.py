"""The command `sails estimate`: what a training needs of each GPU, before it is started.

sails estimate --config recipes/configs/gemma-2-9b/dpo_full.yaml --num_gpus 8
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sails_align.core.errors import CommandParser, InputError

if TYPE_CHECKING:
    from sails_align.training.memory import Memory

GIB = 2**30
RESERVE = 0.1
"""Share of a GPU that is left for what is not counted: CUDA, communication, fragmentation."""
NUMBERS = ("num_gpus", "gpus_per_node", "gpu_memory_gib")
PARTS = ("weights", "gradients", "optimizer", "reference", "buffers", "activations")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, count, print. Returns what `--output` holds.

    Raises:
        InputError: for options that cannot be used, an unknown model, or a training that cannot be estimated.
    """
    options, rest = _parse(argv, prog or "sails estimate")
    result = _estimate(options, rest)
    if options.output is not None:
        from sails_align.core.artifacts import write_json

        write_json(options.output, result)
    _show(result)
    return result


def _parse(argv: Sequence[str] | None, prog: str) -> tuple[argparse.Namespace, list[str]]:
    """The estimator's own options, and those of the recipe."""
    parser = CommandParser(
        prog=prog,
        allow_abbrev=False,
        description="Memory on each GPU and size of checkpoints, for every configuration in accelerate_configs/. Takes "
        "the options of a recipe (--config FILE, --max_length, ...: see sails train sft --help), and:",
    )
    parser.add_argument("--method", choices=("sft", "dpo"), help="default: how the name of the --config file begins")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of all machines together (default 1)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of one machine, at most (default 8)")
    parser.add_argument("--gpu_memory_gib", type=float, default=80.0, help="memory of a GPU in GiB (default 80)")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures, in bytes")
    options, rest = parser.parse_known_args(argv)
    for name in NUMBERS:
        if not 0 < getattr(options, name) < float("inf"):
            raise InputError(f"{name} is {getattr(options, name)}; choose more than 0")
    return options, rest


def _estimate(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from sails_align.training.dataset import load_model_config
    from sails_align.training.memory import FOR_QUANTIZED, Engine, checkpoint_bytes, estimate
    from sails_align.training.run import parse, resolved
    from sails_align.training.shapes import meta_model, setup_of, shape_of

    args = parse(*_recipe(options.method, rest))
    name = args.model.model_name_or_path
    args, _ = resolved(args)
    config = load_model_config(args.model, args.training)
    setup, shape = setup_of(args, config), shape_of(meta_model(args, config))
    engines = {}
    for engine in get_args(Engine) if setup.quantized_bytes is None else FOR_QUANTIZED:
        memory = estimate(engine, shape, setup, options.num_gpus, options.gpus_per_node)
        is_enough = fits(memory, options.gpu_memory_gib)
        written = checkpoint_bytes(engine, shape, setup)
        engines[engine] = {**vars(memory), "total": memory.total, "fits": is_enough, "written": written}
    return {
        "method": args.method,
        "start": args.start,
        "model": name or "testbed",
        **{name: getattr(options, name) for name in NUMBERS},
        "shape": vars(shape),
        "setup": vars(setup),
        "engines": engines,
        "notes": [
            *(["counted as if every layer had adapters"] if args.sails.layer_map != "nearest" else []),
            *([f"{setup.quantized_bytes:.3g} bytes for a weight of a linear module"] if setup.quantized_bytes else []),
        ],
    }


def fits(memory: "Memory", gpu_memory_gib: float) -> bool:
    """Whether a training fits GPUs of that size (GiB), with the `RESERVE` left free."""
    return memory.total <= (1 - RESERVE) * gpu_memory_gib * GIB


def _recipe(method: str | None, rest: list[str]) -> tuple[Any, list[str]]:
    """The method, and the recipe's command line as it is on a GPU, though there may be none here."""
    from sails_align.core.command_line import CommandLine

    line = CommandLine.read(rest)
    if method is None:
        prefix = Path(line.path).name.partition("_")[0] if line.path else ""
        if prefix not in ("sft", "dpo"):
            given = f"the name {Path(line.path).name} begins with neither sft_ nor dpo_" if line.path else "no --config"
            raise InputError(f"cannot infer the method ({given}); pass --method sft or --method dpo")
        method = prefix
    return method, as_on_gpu(rest)


def as_on_gpu(options: Sequence[str]) -> list[str]:
    """A recipe's options, with the defaults of a machine with a GPU, so that another one can read them."""
    from sails_align.core.command_line import CommandLine

    line = CommandLine.read(options)
    more = ["--use_cpu", "true"] if line.value("use_cpu") is None else []
    if line.value("bf16") is None and line.value("fp16") is None:
        more += ["--bf16", "true"]  # TRL's default
    return [*options, *more]


def _show(result: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    shape, setup = result["shape"], result["setup"]
    n, memory = result["num_gpus"], result["gpu_memory_gib"]
    console = Console()
    console.print(
        f"{result['model']}, {result['method'].upper()}, {result['start']}: {shape['n_parameters']:,} parameters, "
        f"{shape['n_trainable']:,} trained ({shape['n_trainable'] / shape['n_parameters']:.2%}).\n"
        f"{setup['rows']} sequences of {setup['length']} tokens at a time on each GPU, "
        + "; ".join([f"{'with' if setup['checkpointing'] else 'without'} gradient checkpointing", *result["notes"]]),
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title=f"GiB on each of {n} GPU{'s' if n > 1 else ''} of {memory:g} GiB (single: on one)", box=SIMPLE)
    table.add_column("")
    for engine in result["engines"]:
        table.add_column(engine.replace("_", "\n"), justify="right", vertical="bottom")
    of_engines = list(result["engines"].values())
    for part in (*PARTS, "total"):
        table.add_row(part, *(f"{values[part] / GIB:.1f}" for values in of_engines), end_section=part == PARTS[-1])
    table.add_row("fits", *("yes" if values["fits"] else "no" for values in of_engines), end_section=True)
    table.add_row("machine", *(f"{values['cpu'] / GIB:.1f}" for values in of_engines))
    table.add_row("checkpoint", *(f"{values['written']['checkpoint'] / GIB:.2f}" for values in of_engines))
    console.print(table)
    console.print(
        f"fits: {RESERVE:.0%} of the GPU stay free for CUDA, communication and fragmentation\n"
        f"machine: memory of a machine with {min(n, result['gpus_per_node'])} of the GPUs, mostly to load weights\n"
        "checkpoint: on disk",
        highlight=False,
    )
