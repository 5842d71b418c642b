"""Find the subspace of a training, by its options and data."""

from pathlib import Path
from typing import Any

from sails_align.core.distributed import from_main
from sails_align.core.options import OutputOptions
from sails_align.initializers.discover import discover_subspace
from sails_align.saes.sets import SAESet
from sails_align.subspace.basis import Subspace
from sails_align.subspace.discovery import load_subspace
from sails_align.subspace.inputs import DiscoveryData, DiscoveryModel
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan
from sails_align.training.starts import check_rank


def find_subspace(args: TrainingPlan, source: TrainingSource, folder: Path) -> Subspace:
    """Load the subspace of `--subspace_path`, or discover it, and save it in a folder.

    Raises `InputError` if it does not fit the model, the SAEs cannot be loaded, the data has no contrast, or the folder
    holds another subspace.
    """
    sails, model = args.sails, _model(args, source)
    assert sails.init is not None
    check_rank(args, source.model_config)
    if sails.subspace_path is not None:
        path = Path(sails.subspace_path)
        subspace = load_subspace(path, model, sails.init, allow_mismatch=sails.sae_allow_mismatch)
        from_main(lambda: subspace.save(folder))
        return subspace
    training: dict[str, Any] = {"rank": args.model.lora_r, "seed": args.training.seed}
    options = sails.discovery(
        **training, max_length=args.training.max_length or 1024, progress=not args.training.disable_tqdm
    )
    data = DiscoveryData(source.tokenizer, source.safety, source.helpful, source.dropped)
    overwrite = args.of(OutputOptions).overwrite_output_dir
    return discover_subspace(sails.init, model, data, sails.saes(), options, folder, overwrite=overwrite)


def saes_of(args: TrainingPlan, source: TrainingSource) -> SAESet:
    """Load the SAEs that the options name, or (unless `sae_placement` is `all`) make them ready to be loaded."""
    keep, device = args.sails.sae_placement == "all", str(args.training.device)
    config = source.model_config
    return SAESet.load(args.sails.saes(), keep=keep, model_config=config, model_name=source.name, device=device)


def _model(args: TrainingPlan, source: TrainingSource) -> DiscoveryModel:
    return DiscoveryModel(
        name=source.name,
        config=source.model_config,
        identity=source.identity(),
        path=source.model_name,
        dtype=args.model.dtype or "float32",
        device=str(args.training.device),
        revision=args.model.model_revision,
        trust_remote_code=args.training.trust_remote_code,
    )
