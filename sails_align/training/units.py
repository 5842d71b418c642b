"""Find the units of the model that a training starts from, and check those that one is to freeze."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from sails_align.core.artifacts import content_hash, read_header
from sails_align.core.earlier import differences, holds_other
from sails_align.core.errors import InputError
from sails_align.core.log import say
from sails_align.core.options import to_json
from sails_align.data.pairs import fingerprint
from sails_align.models.spec import identity_of, is_same_model
from sails_align.training.callbacks.options import FreezeUnitsOptions
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan
from sails_align.training.starts import check_adapter, is_few_bits, load_base
from sails_align.units.find import conversations, find_units
from sails_align.units.options import UnitOptions
from sails_align.units.sets import KIND, Units

logger = logging.getLogger(__name__)


def units_of(args: TrainingPlan, source: TrainingSource, options: UnitOptions, folder: Path, overwrite: bool) -> Units:
    """Find the units of a plan's model (with its trained adapter, if any), and save them to a folder.

    They are loaded from there if they were found in the same model with the same data and options. Raises `InputError`
    if the model is quantized or of an unknown architecture, there are no harmless requests, or the folder holds others.
    """
    if source.helpful is None:
        raise InputError("there are no harmless requests to compare harmful ones with;\ngive --helpful_dataset_name")
    if is_few_bits(args, source):
        raise InputError("the model is quantized, and units are scored by weights that are not; leave that out")
    identity = _identity(args, source, options)
    if (header := read_header(folder, KIND)) is not None:
        found = differences(identity, header["provenance"]["identity"])
        if not found:
            say(f"the units in {folder} were found with the same inputs")
            return Units.load(folder)
        if not overwrite:
            raise holds_other(f"{folder} holds other units", found)
    base: Any = load_base(args, source)
    model = base.to(args.training.device)
    if args.sails.adapter_path is not None:
        check_adapter(Path(args.sails.adapter_path), source)
        model = PeftModel.from_pretrained(model, args.sails.adapter_path).merge_and_unload()
    n, length, seed = options.calibration_examples, args.training.max_length or 1024, args.training.seed
    safety, utility = (
        conversations(source.tokenizer, rows, n, length, seed) for rows in (source.safety, source.helpful)
    )
    units = find_units(model, safety, utility, options, say)
    units = replace(units, provenance={**units.provenance, "identity": identity})
    units.save(folder, content_hash(identity))
    return units


def _identity(args: TrainingPlan, source: TrainingSource, options: UnitOptions) -> dict[str, Any]:
    """Return all that decides the units, as JSON values."""
    adapter = args.sails.adapter_path
    assert source.helpful is not None
    return {
        "command": "sails units",
        "model": source.identity(),
        "adapter": None if adapter is None else identity_of(adapter),
        "data": [fingerprint(rows) for rows in (source.safety, source.helpful)],
        "chat_template": content_hash(source.tokenizer.chat_template),
        "options": {**to_json(options), "max_length": args.training.max_length, "seed": args.training.seed},
    }


def check_units(args: TrainingPlan, source: TrainingSource) -> None:
    """Warn if the units to freeze were found in another model than is trained."""
    folder = args.of(FreezeUnitsOptions).freeze_units
    if folder is None:
        return
    found_in: Mapping[str, Any] = Units.load(Path(folder)).provenance.get("identity", {})
    # Of a model with an adapter, the merged one has other files.
    if found_in.get("adapter") is None and not is_same_model(found_in.get("model"), source.identity()):
        name = (found_in.get("model") or {}).get("name")
        logger.warning("the units in %s were found in another model (%s) than %s", folder, name, source.name)
