"""Look at what an earlier run left in a training's output folder: refuse to replace it, or find it finished."""

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from sails_align.core.distributed import from_main
from sails_align.core.earlier import REMEDY, holds_other
from sails_align.core.errors import InputError
from sails_align.core.files import read_record
from sails_align.core.log import show
from sails_align.core.options import OutputOptions, listed
from sails_align.core.suggestions import did_you_mean_path
from sails_align.training.dataset import TrainingSource
from sails_align.training.identity import differences, known_early, run_identity
from sails_align.training.plan import TrainingPlan

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
"""In the output folder, written last."""
WEIGHTS = ("adapter_model.safetensors", "model*.safetensors", "clade.safetensors")
REPLACED = (
    *("checkpoint-*", METRICS_FILE, "base.json", "responses.jsonl", "features.json", "sparse_delta.safetensors"),
    *(
        *WEIGHTS,
        "adapter_config.json",
        "clade.json",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    ),
)
"""What a run is known by, and what would make a model of two runs."""


def check_folder(args: TrainingPlan, source: TrainingSource, output_dir: Path) -> dict[str, Any] | None:
    """Refuse a folder that holds another run or a model, before anything in it is changed.

    Returns:
        the `metrics.json` of a finished run with the same options, which need not be done again; else None.

    Raises:
        InputError: if the folder holds something else, and `--overwrite_output_dir` is not given.
    """
    sources = (args.model_name, args.sails.adapter_path, args.dpo.ref_model_name_or_path, args.sails.sae_path)
    refuse_source(output_dir, sources)
    identity = run_identity(args, source, None)  # by all processes: they hash the model together
    return check_earlier(known_early(identity), output_dir, args.training, args.of(OutputOptions))


def refuse_source(output_dir: Path, sources: Iterable[str | None]) -> None:
    """Refuse an output folder that the training itself starts from, with an `InputError`; it would be replaced."""
    for path in (Path(name) for name in sources if name is not None):
        if output_dir.is_dir() and path.exists() and output_dir.samefile(path):
            raise InputError(f"the output folder {output_dir} is also an input ({path}); choose another --output_dir")


def check_earlier(
    identity: Mapping[str, Any], output_dir: Path, training: TrainingArguments, output: OutputOptions
) -> dict[str, Any] | None:
    """Return the metrics of an earlier run of the same identity that has finished; None if there is none.

    The identity may be a part of it, as far as it is known. Raises `InputError` if the folder holds another run or a
    model of unknown origin that would be replaced, or the checkpoint to resume from is missing.
    """
    checkpoint = str(training.resume_from_checkpoint or "false")
    if checkpoint.lower() not in ("true", "false") and not Path(checkpoint).is_dir():
        hint = did_you_mean_path(str(output_dir / Path(checkpoint).name)) or ";"
        raise InputError(
            f"cannot resume from {checkpoint}: there is no such folder{hint}\n"
            "give a checkpoint of this run, or --resume_from_checkpoint true for its last one"
        )
    if output.overwrite_output_dir:
        return None
    resumes = checkpoint.lower() != "false"
    return from_main(lambda: _check_earlier(identity, output_dir, resumes))


def _check_earlier(identity: Mapping[str, Any], output_dir: Path, resumes: bool) -> dict[str, Any] | None:
    run, metrics = read_record(output_dir / "run.json"), read_record(output_dir / METRICS_FILE)
    weights = next((path.name for pattern in WEIGHTS for path in output_dir.glob(pattern)), None)
    if (weights is not None or run) and not isinstance(run.get("identity"), dict):
        holds = "a run.json that does not say" if weights is None else f"a model ({weights}), and no run.json says"
        raise InputError(f"{output_dir} holds {holds} how it was made;\n{REMEDY}")
    if run and (found := differences(identity, run["identity"])):
        raise holds_other(f"{output_dir} holds another run", found)
    of_metrics = metrics.get("provenance", {}).get("identity", {})
    if weights is None or not of_metrics or differences(identity, of_metrics):
        return None
    if not (found := differences(identity, of_metrics, length=True)):
        show(f"{output_dir} holds this run, finished: nothing is done (--overwrite_output_dir true trains again)")
        return metrics
    if resumes:
        return None
    raise InputError(
        f"{output_dir} holds a finished run (different: {listed(found)});\n"
        f"train it further with --resume_from_checkpoint true, or {REMEDY}"
    )


def clear(output_dir: Path) -> None:
    """Delete what an earlier run left that the new one might not replace; the subspace is checked by its own hash."""
    left = [path for pattern in REPLACED for path in output_dir.glob(pattern)]
    if left:
        logger.warning("what the earlier run left in %s is replaced", output_dir)
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
