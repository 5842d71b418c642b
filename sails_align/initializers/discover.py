"""Find the subspace of an initialization, by its name."""

from pathlib import Path

from sails_align.core.errors import InputError
from sails_align.initializers import INITIALIZERS, subspace_initializers
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.basis import Subspace
from sails_align.subspace.discovery import find_subspace
from sails_align.subspace.inputs import DiscoveryData, DiscoveryModel
from sails_align.subspace.options import DiscoveryOptions


def discover_subspace(
    init: str,
    model: DiscoveryModel,
    data: DiscoveryData,
    saes: SAESource | SAESet,
    options: DiscoveryOptions,
    folder: Path | None = None,
) -> Subspace:
    """Run `find_subspace` with the method of an initialization.

    Raises:
        InputError: if it builds no subspace or lacks the SAEs it needs, and as `find_subspace`.
    """
    entry = INITIALIZERS.get(init)
    if not entry.makes_subspace:
        raise InputError(f"init is {init}, which uses no subspace; choose {', '.join(subspace_initializers())}")
    if entry.needs_saes and not (saes.named if isinstance(saes, SAESource) else saes):
        raise InputError(
            f"--init {init} needs SAEs of {model.path or model.name}:\n"
            "give --sae_release and --sae_ids, or --sae_path; "
            "for a model without public SAEs, train some with sails train-sae"
        )
    return find_subspace(model, data, saes, entry.load(), options, folder)
