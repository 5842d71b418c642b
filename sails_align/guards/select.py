"""Keep the rows of a dataset whose prompts a guard refuses, such as pairs for DPO that are to teach refusals."""

import json
from pathlib import Path

from datasets import Dataset

from sails_align.core.earlier import remedy_of
from sails_align.core.errors import InputError
from sails_align.core.files import write_text
from sails_align.data.loading import load_rows
from sails_align.data.pairs import requests_of
from sails_align.data.tokens import TemplateCheck
from sails_align.guards.guard import Guard, LoadedModel
from sails_align.guards.options import SelectOptions


def select_rows(guard: Guard, model: LoadedModel, options: SelectOptions) -> tuple[int, int]:
    """Write the rows of a dataset that are kept, in one common form. Returns their number and that of all rows.

    Raises:
        InputError: if the dataset cannot be read, no row is kept, the guard has certified nothing, or the output is
            there and may not be replaced.
    """
    if guard.calibrated.about["threshold"] is None:
        raise InputError(f"the guard {guard.folder} has certified nothing: {guard.calibrated.about['reason']}")
    if Path(options.output).exists() and not options.overwrite_output_dir:
        raise InputError(f"{options.output} is there already;\n{remedy_of('--output')}")
    name = options.dataset_name
    rows = requests_of(load_rows(name), name=name, check=TemplateCheck(model.tokenizer))
    kept = rows.select(_kept(guard, model, rows, refused=options.keep == "refused"))
    if not len(kept):
        raise InputError(f"none of the {len(rows)} prompts of {name} is {options.keep}; choose another --keep")
    write_text(Path(options.output), "".join(_lines(kept)))
    return len(kept), len(rows)


def _kept(guard: Guard, model: LoadedModel, rows: Dataset, *, refused: bool) -> list[int]:
    is_refused = guard.refused(model.model, model.tokenizer, list(rows["prompt"]))
    return [place for place, one in enumerate(is_refused) if one == refused]


def _lines(rows: Dataset) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
