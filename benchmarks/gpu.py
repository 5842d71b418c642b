"""What each stage costs on a GPU: models of Gemma-2-2B's and 9B's shape with random weights in bfloat16.

    python benchmarks/gpu.py [--shapes gemma-2-2b gemma-2-9b] [--output docs/results/gpu.json]
    python benchmarks/gpu.py --shapes tiny        # any machine: that the benchmark itself works
    python benchmarks/gpu.py --everything --minutes 9 --folder FOLDER    # and the tests, and SmolLM2: see everything.py

Every measurement is a process of its own. Ratios are of turns in one run:

    discovery   against a bare forward pass through the same blocks        target: at most 1.10
    SFT, DPO    a step of SAILS against one of TRL's plain LoRA            target: at most 1.02
    merge, generation (base, adapter, merged; transformers, one batch)

with tokens/s, peak memory, and model FLOPs utilization (MFU): the model's own operations, without what gradient
checkpointing computes again, as a share of `--peak_tflops`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import discovery_at_scale
import everything
from train_step import QUIET, STARTS, launch, ratios, words_of

from sails_align.core.files import write_json

TARGETS = {"discovery": 1.10, "sft": 1.02, "dpo": 1.02}
SIZES = {  # rows and tokens of a batch, steps, and new tokens: of real shapes, and of the tiny one
    "real": {"rows": 4, "length": 1024, "steps": 12, "new_tokens": 128},
    "tiny": {"rows": 2, "length": 64, "steps": 3, "new_tokens": 8},
}


def size_of(shape: str) -> dict[str, int]:
    return SIZES["tiny" if shape == "tiny" else "real"]


# -- in processes of their own ----------------------------------------------------------------------------------------


def peak_gib() -> float:
    from sails_align.core.cost import peak_memory_mb

    return peak_memory_mb() / 1024


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(compute: Callable[[], Any]) -> float:
    """Seconds, with all that was started on the GPU."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    compute()
    wait()
    return time.perf_counter() - started


def prepare(folder: Path, shape: str) -> dict[str, Any]:
    """Write model, SAEs and data."""
    import torch
    from random_models import config_of, write_model, write_pairs, write_saes
    from transformers import AutoModelForCausalLM

    write_model(folder / "model", shape, device_name())
    write_saes(folder / "saes", shape)
    size = size_of(shape)
    write_pairs(folder / "pairs.jsonl", size["rows"] * size["steps"] + 5, size["length"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    return {"parameters": sum(p.numel() for p in model.parameters())}


def discovery(folder: Path, shape: str, turns: int) -> dict[str, Any]:
    """Discovery and bare forward passes over the same batches, by turns."""
    import torch
    from random_models import SAES

    from sails_align.data.tokens import TokenizedSide, padded
    from sails_align.models.load import load_truncated
    from sails_align.saes.sets import SAESet
    from sails_align.saes.source import SAESource
    from sails_align.subspace.forward import batches, discover
    from sails_align.subspace.selection import FeatureFitter

    size, device = size_of(shape), device_name()
    layers = SAES[shape][0]
    model = load_truncated(folder / "model", max(layers), dtype="bfloat16", device=device)
    source = SAESource(path=str(folder / "saes"), allow_mismatch=True)
    saes = SAESet.load(source, keep=True, model_config=model.config, model_name="gemma", device=device)
    length, generator = size["length"] // 4, torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 8 * size["rows"], length), generator=generator).tolist()
    mask = [at >= length // 2 for at in range(length)]  # half of them are a response
    sides = {
        side: [TokenizedSide(row, mask) for row in rows]
        for side, rows in zip(("aligned", "unaligned"), ids, strict=True)
    }

    def ours() -> None:
        discover(model, {"response": sides}, [FeatureFitter(saes)], layers)

    @torch.no_grad()
    def bare() -> None:
        for rows in sides.values():
            for batch in batches(rows, 16, 4096):
                input_ids_BS, attention_mask_BS, _ = padded(batch)
                model(input_ids=input_ids_BS.to(device), attention_mask=attention_mask_BS.to(device), use_cache=False)

    ways = {"ours": ours, "bare": bare}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            taken = timed(ways[name])
            seconds[name] += [taken] if turn else []  # the first turn warms up
    n_tokens = 2 * len(ids[0]) * length
    blocks = sum(parameter.numel() for parameter in model.layers.parameters())
    return {
        "ratio": ratios(list(zip(seconds["ours"], seconds["bare"], strict=True))),
        "tokens_per_second": n_tokens / median(seconds["ours"]),
        "flops_per_token": 2 * blocks,
        "peak_gib": peak_gib(),
    }


def merge(run: Path, output: Path) -> dict[str, Any]:
    from sails_align.cli.edit import main

    return {"seconds": timed(lambda: main(["merge", str(run), "--output", str(output)])), "peak_gib": peak_gib()}


def generation(model: str, shape: str) -> dict[str, Any]:
    """New tokens a second, all rows at a time."""
    import torch

    from sails_align.models.load import load_model
    from sails_align.models.resolve import resolve_model

    size = size_of(shape)
    loaded: Any = load_model(resolve_model(model), device_name())
    rows, n_new = 8 * size["rows"], size["new_tokens"]
    ids_BS = torch.randint(3, 1000, (rows, size["length"] // 8), generator=torch.Generator().manual_seed(0))
    ids_BS = ids_BS.to(device_name())
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}

    def generate() -> None:
        loaded.generate(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), **options)

    timed(generate)  # warms up
    return {"tokens_per_second": rows * n_new / timed(generate), "peak_gib": peak_gib()}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare": lambda folder, shape: prepare(Path(folder), shape),
    "discovery": lambda folder, shape, turns: discovery(Path(folder), shape, int(turns)),
    "merge": lambda run, output: merge(Path(run), Path(output)),
    "generation": generation,
}


# -- the whole --------------------------------------------------------------------------------------------------------


def child(name: str, *words: object) -> dict[str, Any]:
    """What one of the functions above gives, in a process of its own."""
    command = [sys.executable, __file__, "--child", name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("MEASURED "))
    return json.loads(line.removeprefix("MEASURED "))


def training(folder: Path, shape: str, method: str, pairs: int, n_parameters: int) -> dict[str, Any]:
    """Steps of SAILS and of plain LoRA, by turns."""
    size = size_of(shape)
    given = {
        **{"model_name_or_path": folder / "model", "dataset_name": folder / "pairs.jsonl", "dtype": "bfloat16"},
        **{"max_length": size["length"], "per_device_train_batch_size": size["rows"], "max_steps": size["steps"]},
        **{"eval_examples": 2, "logging_steps": 1, "learning_rate": 1e-4},
    }
    common = [*QUIET, *words_of(given)]
    own = {"SAILS": ["--subspace_path", str(folder / "found" / "subspace")], "LoRA": []}
    taken: dict[str, list[dict[str, float]]] = {start: [] for start in STARTS}
    for turn in range(pairs):
        for start in list(STARTS) if turn % 2 else list(STARTS)[::-1]:
            output = ["--init", STARTS[start], *own[start], "--output_dir", str(folder / f"{method}-{start}")]
            taken[start].append(launch(method, [*common, *output]))
    ours, theirs = taken["SAILS"], taken["LoRA"]
    # A token costs 2 FLOPs a parameter forward and 2 backward through frozen weights, whose own gradient is not
    # computed. DPO reads two responses, and the reference reads them, too.
    n_tokens = size["rows"] * size["length"] * (2 if method == "dpo" else 1)
    seconds = median(run["seconds_per_step"] for run in ours)
    return {
        "ratio": ratios([(a["seconds_per_step"], b["seconds_per_step"]) for a, b in zip(ours, theirs, strict=True)]),
        "memory_ratio": ratios([(a["peak_memory_mb"], b["peak_memory_mb"]) for a, b in zip(ours, theirs, strict=True)]),
        "tokens_per_second": n_tokens / seconds,
        "flops_per_token": (6 if method == "dpo" else 4) * n_parameters,
        "peak_gib": max(run["peak_memory_mb"] for run in ours) / 1024,
    }


def found_subspace(folder: Path) -> None:
    """Discover once, for all trainings."""
    command = discovery_at_scale.discovery(folder, folder / "found", "all", 8)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"discover: {done.stderr[-3000:]}")


def against_target(stage: str, measured: dict[str, Any], peak_tflops: float) -> dict[str, Any]:
    """The measured figures with MFU and whether the stage's target is met."""
    flops = measured["tokens_per_second"] * measured["flops_per_token"]
    is_met = measured["ratio"]["median"] <= TARGETS[stage]
    return measured | {"mfu": flops / (peak_tflops * 1e12), "target": TARGETS[stage], "met": is_met}


def stages(folder: Path, shape: str, pairs: int, peak_tflops: float) -> Iterator[tuple[str, Any]]:
    """Each figure's name and value, as soon as it is measured."""
    n_parameters = child("prepare", folder, shape)["parameters"]
    yield "parameters", n_parameters
    yield "discovery", against_target("discovery", child("discovery", folder, shape, pairs), peak_tflops)
    found_subspace(folder)
    for method in ("sft", "dpo"):
        yield method, against_target(method, training(folder, shape, method, pairs, n_parameters), peak_tflops)
    yield "merge", child("merge", folder / "sft-SAILS", folder / "merged")
    models = {"base": folder / "model", "adapter": folder / "sft-SAILS", "merged": folder / "merged"}
    yield "generation", {name: child("generation", model, shape) for name, model in models.items()}


def show(shape: str, result: dict[str, Any]) -> None:
    print(f"{shape}, {result['parameters']:,} parameters")
    for stage, target in TARGETS.items():
        of = result[stage]
        ratio = of["ratio"]
        print(
            f"  {stage:10} ratio {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}, "
            f"n={len(ratio['pairs'])}; target {target}: {'met' if of['met'] else 'NOT met'}), "
            f"{of['tokens_per_second']:,.0f} tokens/s, MFU {of['mfu']:.1%}, peak {of['peak_gib']:.1f} GiB"
        )
    print(f"  {'merge':10} {result['merge']['seconds']:.1f} s, peak {result['merge']['peak_gib']:.1f} GiB")
    for name, of in result["generation"].items():
        print(f"  generation, {name}: {of['tokens_per_second']:,.0f} tokens/s, peak {of['peak_gib']:.1f} GiB")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print("\nMEASURED " + json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
        return
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=["tiny", "gemma-2-2b", "gemma-2-9b"], default=["gemma-2-2b", "gemma-2-9b"]
    )
    parser.add_argument("--pairs", type=int, default=3, help="turns of each comparison")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU in bfloat16 (H100, H200: 989)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--everything", action="store_true", help="all that a GPU is to measure: see everything.py")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--processes", type=int, default=6, help="trainings of SmolLM2 at a time")
    parser.add_argument("--folder", type=Path, help="holds the weights of SmolLM2 (GGUF), and gets the results")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs is {args.pairs}; choose 1 or more")
    if args.everything:
        if args.folder is None or not (args.folder / everything.GGUF).is_file():
            parser.error(f"--folder is {args.folder}; give one that holds {everything.GGUF}")
        steps = everything.everything(args.folder, args.minutes, args.pairs, args.processes)["steps"]
        raise SystemExit(any(step["ended"].startswith("failed") for step in steps.values()))
    if "tiny" not in args.shapes and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here; --shapes tiny tries the benchmark out without one")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    results = {"device": card, "torch": torch.__version__, "peak_tflops": args.peak_tflops, "shapes": {}}
    for shape in args.shapes:
        figures = results["shapes"][shape] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, value in stages(Path(folder), shape, args.pairs, args.peak_tflops):
                print(f"{shape}: {name} {json.dumps(value)}", file=sys.stderr, flush=True)
                figures[name] = value
                if args.output:  # after each, since those that follow take long
                    write_json(args.output, results)
    print(f"on {card}")
    for shape, result in results["shapes"].items():
        show(shape, result)


if __name__ == "__main__":
    main()
