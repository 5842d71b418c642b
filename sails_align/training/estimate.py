"""Estimate what a training needs of each GPU, before it is started."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from torch import zeros
from transformers import PretrainedConfig

from sails_align.core import log
from sails_align.core.command_line import CommandLine
from sails_align.core.machine import GIB
from sails_align.core.tables import FittedTable
from sails_align.initializers.options import InitializerOptions
from sails_align.saes.files import LAYER
from sails_align.subspace.basis import Subspace
from sails_align.subspace.options import Method
from sails_align.testbed.build import Testbed
from sails_align.training.checks import writing_option
from sails_align.training.dataset import load_model_config, load_source
from sails_align.training.memory import WHOLE_WEIGHTS, Engine, Memory, checkpoint_bytes, estimate
from sails_align.training.options import Gpus
from sails_align.training.plan import TrainingPlan, changed
from sails_align.training.run import parse, resolved
from sails_align.training.shapes import meta_model, setup_of, shape_of
from sails_align.training.subspace import find_subspace

RESERVE = 0.1
"""Share of a GPU that is left for what is not counted: CUDA, communication, fragmentation."""
AT_MOST = (
    "discovery decides which blocks have adapters: for the exact number, run sails discover with these options, and "
    "give its folder subspace/ as --subspace_path"
)
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
    args, testbed = resolved(args)
    config = load_model_config(args)
    subspace = _subspace(args, config, testbed)
    setup, shape = setup_of(args, config), shape_of(meta_model(args, config, subspace))
    is_exact = subspace is not None or not args.sails.uses_subspace or args.sails.layer_map == "nearest"
    notes = [] if is_exact else [AT_MOST]
    if setup.quantized_bytes is not None:
        notes.append(f"{setup.quantized_bytes:.3g} bytes for a weight of a linear module")
    engines = {}
    needs_whole = setup.quantized_bytes is not None or writing_option(args) is not None
    for engine in WHOLE_WEIGHTS if needs_whole else get_args(Engine):
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


def _subspace(args: TrainingPlan, config: PretrainedConfig, testbed: Testbed | None) -> Subspace | None:
    """Return a subspace with the layers and the onset of the training's: saved, or the testbed's; None if unknown."""
    sails = args.sails
    if not sails.uses_subspace or sails.layer_map == "nearest":
        return None
    if sails.subspace_path is not None:
        return Subspace.load(sails.subspace_path)
    if testbed is not None:
        quiet = replace(args, training=changed(args.training, disable_tqdm=True))
        with TemporaryDirectory() as folder:
            return find_subspace(quiet, load_source(quiet, testbed), Path(folder))
    return _of_sae_layers(sails, config) if sails.layer_map == "sae_only" else None


def _of_sae_layers(sails: InitializerOptions, config: PretrainedConfig) -> Subspace | None:
    """Return a subspace without directions that has the layers in the names of a release's SAEs; None if none are."""
    found = [LAYER.search(name) for name in sails.sae_ids or ()]
    if sails.sae_release is None or None in found:
        return None
    layers, width = [int(match[1]) for match in found if match], config.get_text_config().hidden_size
    return Subspace({layer: zeros(width, 0) for layer in layers}, {layer: zeros(0) for layer in layers}, {})


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
    at_most = "at most " if AT_MOST in result["notes"] else ""
    log.show(
        f"{result['model']}, {result['method'].upper()}, {result['start']}: {shape['n_parameters']:,} parameters, "
        f"{at_most}{shape['n_trainable']:,} trained ({shape['n_trainable'] / shape['n_parameters']:.2%}).\n"
        f"{setup['rows']} sequences of {setup['length']} tokens at a time on each GPU, "
        + "\n".join([f"{'with' if setup['checkpointing'] else 'without'} gradient checkpointing", *result["notes"]])
    )
    title = (
        f"GiB on each of {n} GPUs of {memory:g} GiB (single: on one)" if n > 1 else f"GiB on a GPU of {memory:g} GiB"
    )
    table = FittedTable(title, ("", *(engine.replace("_", " ") for engine in result["engines"])))
    of_engines = list(result["engines"].values())
    for part in (*PARTS, "total"):
        table.add_row(part, *(f"{values[part] / GIB:.1f}" for values in of_engines))
        if part == PARTS[-1]:
            table.add_section()
    table.add_row("fits", *("yes" if values["fits"] else "no" for values in of_engines))
    table.add_section()
    table.add_row("machine", *(f"{values['cpu'] / GIB:.1f}" for values in of_engines))
    table.add_row("checkpoint", *(f"{values['written']['checkpoint'] / GIB:.2f}" for values in of_engines))
    log.show(
        table,
        f"fits: {RESERVE:.0%} of the GPU stay free for CUDA, communication and fragmentation\n"
        f"machine: CPU memory of a machine for its GPUs ({min(n, result['gpus_per_node'])}), mostly to load weights\n"
        "checkpoint: on disk",
    )
