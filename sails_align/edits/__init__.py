"""Edits of trained weights: a finished run in, a folder with a model or an adapter out.

Each edit is a function of this package, such as `edits.lox(model="runs/mine", output="runs/mine-lox", k=6)`.

Its code is a module of its name in `methods`, with a function `edit(run, output, options, finish)`. That makes the
folder `output`, calls `finish` with it before it appears, and returns what it measured: an object whose `report()`
yields the lines that `sails edit NAME` prints.
"""

from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, Signature, cleandoc
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.core.registry import Entry, Registry
from sails_align.core.suggestions import did_you_mean
from sails_align.edits.options import (
    AblateOptions,
    IrrOptions,
    LoxOptions,
    LssfOptions,
    MergeOptions,
    RosiOptions,
    SafeLoraOptions,
    TaskArithmeticOptions,
    WiseFtOptions,
)

EDITS = Registry(
    "edit",
    {
        "merge": Entry(
            "sails_align.edits.methods.merge:edit",
            "Merge a LoRA adapter into its base model, and check the result.",
            MergeOptions,
        ),
        "lox": Entry(
            "sails_align.edits.methods.lox:edit",
            "Extrapolate the low-rank part of an alignment, before further training (LoX, arXiv 2506.15606).",
            LoxOptions,
        ),
        "wise_ft": Entry(
            "sails_align.edits.methods.wise_ft:edit",
            "Average a fine-tuned model with the aligned model that it started from (WiSE-FT, arXiv 2109.01903).",
            WiseFtOptions,
        ),
        "task_arithmetic": Entry(
            "sails_align.edits.methods.task_arithmetic:edit",
            "Add the difference aligned - unaligned to a further trained model (RESTA, arXiv 2402.11746).",
            TaskArithmeticOptions,
        ),
        "safe_lora": Entry(
            "sails_align.edits.methods.safe_lora:edit",
            "Project the updates of a further training onto the alignment's directions (arXiv 2405.16833).",
            SafeLoraOptions,
        ),
        "rosi": Entry(
            "sails_align.edits.methods.rosi:edit",
            "Amplify the refusal direction in the output projections (ROSI, arXiv 2508.20766).",
            RosiOptions,
        ),
        "ablate": Entry(
            "sails_align.edits.methods.ablate:edit",
            "Remove the refusal direction from the weights: an attack (abliteration, arXiv 2406.11717).",
            AblateOptions,
        ),
        "lssf": Entry(
            "sails_align.edits.methods.lssf:edit",
            "Add the difference aligned - unaligned within the subspace of safe answers (LSSF, arXiv 2602.00038).",
            LssfOptions,
        ),
        "irr": Entry(
            "sails_align.edits.methods.irr:edit",
            "Remove changes that oppose the safety vector, and adjust the others (IRR, arXiv 2412.11041).",
            IrrOptions,
        ),
    },
)


def run(
    name: str,
    folder: str | Path,
    output: str | Path,
    options: Any = None,
    finish: Callable[[Path], object] | None = None,
    **values: Any,
) -> Any:
    """Run an edit on a finished run: `run("lox", "runs/mine", "runs/mine-lox", k=6, alpha=1.25)`.

    Args:
        name: in `EDITS`.
        folder: of the run, or of any adapter that the edit takes.
        output: the folder to make.
        options: of the edit's own class; None: those of `values`.
        finish: called with the folder before it appears, to add a model card.
        values: options by name; the others have their defaults.

    Raises:
        InputError: if there is no such edit or option; or from the edit.

    Examples:
        >>> _ = sails.edit("wise_ft", "adapter", "halfway", t=0.5)
        >>> Path("halfway/adapter_model.safetensors").is_file()
        True
    """
    entry = EDITS.get(name)
    assert options is None or not values, "options are given once"
    if options is None and entry.options is not None:
        known = [field.name for field in fields(entry.options)]
        if unknown := [value for value in values if value not in known]:
            raise InputError(f"the edit {name} has no option {unknown[0]!r}{did_you_mean(unknown[0], known)}")
        options = entry.options(**values)
    return entry.load()(Path(folder), Path(output), options, finish)


_ARGUMENTS = cleandoc("""
    Args:
        model: folder of a finished run, of a LoRA adapter or of a model; or a model's name, such as testbed.
        output: the folder to make; it must be new or empty.
""")
_RETURNS = cleandoc("""
    Returns:
        What the edit measured; `report()` yields it in lines.

    Raises:
        InputError: if a model, the data or an option cannot be used.
""")


def _function(name: str) -> Callable[..., Any]:
    """Return an edit as a function, whose signature and docstring have its options."""
    entry = EDITS.get(name)
    assert entry.options is not None, "every edit has options"
    options = fields(entry.options)

    def edit(model: str | Path, output: str | Path, **values: Any) -> Any:
        return run(name, model, output, **values)

    texts = "\n".join(f"    {option.name}: {option.metadata['help']}" for option in options)
    edit.__name__ = edit.__qualname__ = name
    edit.__doc__ = f"{entry.summary}\n\n{_ARGUMENTS}\n{texts}\n\n{_RETURNS}"
    own = [Parameter(each, Parameter.POSITIONAL_OR_KEYWORD) for each in ("model", "output")]
    by_name = [Parameter(option.name, Parameter.KEYWORD_ONLY, default=option.default) for option in options]
    edit.__signature__ = Signature([*own, *by_name])  # pyright: ignore[reportFunctionMemberAccess]
    return edit


ablate = _function("ablate")
irr = _function("irr")
lox = _function("lox")
lssf = _function("lssf")
merge = _function("merge")
rosi = _function("rosi")
safe_lora = _function("safe_lora")
task_arithmetic = _function("task_arithmetic")
wise_ft = _function("wise_ft")
