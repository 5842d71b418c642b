"""What a comparison's time goes into: forward passes, backward passes, generation, optimizer; and the rest.

    python benchmarks/comparison_profile.py [--runs sft-sails dpo-lora ...]

One cell of each run, as `sails compare` makes it, in this process and on one thread. Time counts for the outermost of
`generate`, a model's forward pass, `backward` and the optimizer's step; what a generation does besides the model's
forward passes is a part of it. Imports are not counted, nor does the garbage collector look through what they made:
the processes of `sails compare` are forked from one that has imported everything.
"""

import argparse
import contextlib
import gc
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sails_align.core.files import write_json

WORK = ("generate", "forward", "backward", "optimizer")


class Clock:
    """Seconds by kind of work; work inside work is not counted again."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(WORK, 0.0)
        self._inside = False

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[kind] += time.perf_counter() - started
                self._inside = False

        return wrapper


@contextlib.contextmanager
def clocked() -> Iterator[Clock]:
    """Within the block, all model work of this process is timed."""
    from transformers import GenerationMixin, PreTrainedModel

    clock = Clock()
    call = torch.nn.Module.__call__
    forward = clock.timed("forward", call)

    def model_call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Decoders inside DPO and discovery, too; adapters and wrappers around a model are not of this class.
        return (forward if isinstance(self, PreTrainedModel) else call)(self, *args, **kwargs)

    replaced = [
        (torch.nn.Module, "__call__", model_call),
        (GenerationMixin, "generate", clock.timed("generate", GenerationMixin.generate)),
        (torch.Tensor, "backward", clock.timed("backward", torch.Tensor.backward)),
        (torch.autograd, "grad", clock.timed("backward", torch.autograd.grad)),
        (torch.optim.AdamW, "step", clock.timed("optimizer", torch.optim.AdamW.step)),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield clock
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def main() -> None:
    from sails_align.experiments.plan import RUNS, Cell, Measures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", default=["sft-lora", "sft-sails", "sft-full", "dpo-sails"], choices=RUNS)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--n_attacked", type=int, default=Measures().n_attacked)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    import lm_eval.models.huggingface  # noqa: F401 -- imported before the clock starts, as the fork server does
    import sae_lens  # noqa: F401

    from sails_align.evaluation.attacks import gcg  # noqa: F401
    from sails_align.experiments.cells import run_cell
    from sails_align.training import run as align  # noqa: F401
    from sails_align.training.rlhf import run as rlhf  # noqa: F401

    gc.freeze()
    table = Table(title="one cell of each run, seconds of one thread")
    for heading in ("run", "all", *WORK, "rest", "share of model work"):
        table.add_column(heading)
    rows = []
    for name in args.runs:
        rate = args.learning_rate if RUNS[name].is_tuned else None
        cell = Cell(RUNS[name], rate, 1, "test", "testbed", Measures(n_attacked=args.n_attacked))
        with contextlib.redirect_stdout(io.StringIO()), clocked() as clock:
            started = time.perf_counter()
            result = run_cell(cell)
            total = time.perf_counter() - started
        share = sum(clock.seconds.values()) / total
        rows.append({"run": name, "seconds": total, **clock.seconds, "share": share, **result["cost"]["seconds"]})
        rest = total - sum(clock.seconds.values())
        of_work = (f"{clock.seconds[kind]:.1f}" for kind in WORK)
        table.add_row(name, f"{total:.1f}", *of_work, f"{rest:.1f}", f"{share:.0%}")
    Console(width=120).print(table)
    if args.output:
        write_json(args.output, rows)


if __name__ == "__main__":
    main()
