"""Estimate what a training needs of each GPU, before it is started."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sails_align.core.command_line import CommandLine
from sails_align.subspace.options import Method
from sails_align.training.dataset import load_model_config
from sails_align.training.memory import FOR_QUANTIZED, Engine, Memory, checkpoint_bytes, estimate
from sails_align.training.options import Gpus
from sails_align.training.run import parse, resolved
from sails_align.training.shapes import meta_model, setup_of, shape_of

GIB = 2**30
RESERVE = 0.1
"""Share of a GPU that is left for what is not counted: CUDA, communication, fragmentation."""
PARTS = ("weights", "gradients", "optimizer", "reference", "buffers", "activations")


def estimate_training(method: Method, argv: Sequence[str], gpus: Gpus) -> dict[str, Any]:
    """Count the memory of a training by engine.

    Args:
        method: of the training.
        argv: the training's options.
        gpus: what it is to run on.

    Raises:
        InputError: for options that cannot be used, an unknown model, or a training that cannot be estimated.
    """
    args = parse(method, as_on_gpu(argv))
    name = args.model.model_name_or_path
    args, _ = resolved(args)
    config = load_model_config(args)
    setup, shape = setup_of(args, config), shape_of(meta_model(args, config))
    notes = ["counted as if every layer had adapters"] if args.sails.layer_map != "nearest" else []
    if setup.quantized_bytes is not None:
        notes.append(f"{setup.quantized_bytes:.3g} bytes for a weight of a linear module")
    engines = {}
    for engine in get_args(Engine) if setup.quantized_bytes is None else FOR_QUANTIZED:
        memory = estimate(engine, shape, setup, gpus.num_gpus, gpus.gpus_per_node)
        is_enough = fits(memory, gpus.gpu_memory_gib)
        written = checkpoint_bytes(engine, shape, setup)
        engines[engine] = {**vars(memory), "total": memory.total, "fits": is_enough, "written": written}
    return {
        "method": args.method,
        "start": args.start,
        "model": name or "testbed",
        **asdict(gpus),
        "shape": vars(shape),
        "setup": vars(setup),
        "engines": engines,
        "notes": notes,
    }


def fits(memory: Memory, gpu_memory_gib: float) -> bool:
    """Return whether a training fits GPUs of that size (GiB), with the `RESERVE` left free."""
    return memory.total <= (1 - RESERVE) * gpu_memory_gib * GIB


def as_on_gpu(options: Sequence[str]) -> list[str]:
    """Add the defaults of a machine with a GPU to a recipe's options, so that a machine without one can read them."""
    line = CommandLine.read(options)
    more = ["--use_cpu", "true"] if line.value("use_cpu") is None else []
    if line.value("bf16") is None and line.value("fp16") is None:
        more += ["--bf16", "true"]  # TRL's default
    return [*options, *more]


def show(result: dict[str, Any]) -> None:
    """Print an estimate."""
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
