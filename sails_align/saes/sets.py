"""Hold the SAEs of several layers, in memory together or loaded on demand.

A Gemma Scope SAE of 16k latents takes 0.3 GB in Gemma-2-2B and 0.5 GB in 9B, one of Llama Scope 1.1 GB.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from sails_align.core.errors import InputError
from sails_align.saes.files import ids_of_layers, names_of
from sails_align.saes.load import ResidualSAE, SAEInfo, load_sae
from sails_align.saes.source import SAESource


@dataclass(frozen=True)
class SAESet(Mapping[int, ResidualSAE]):
    """SAEs by layer, in order. Those that are not kept are loaded on access."""

    infos: Mapping[int, SAEInfo]
    """Metadata of each SAE."""
    _kept: Mapping[int, ResidualSAE]
    _load: Callable[[str], ResidualSAE] | None = None
    """Loads an SAE by its name."""

    @classmethod
    def of(cls, saes: Mapping[int, ResidualSAE]) -> "SAESet":
        """Make a set of SAEs in memory."""
        kept = dict(sorted(saes.items()))
        return cls({layer: sae.info for layer, sae in kept.items()}, kept)

    @classmethod
    def load(
        cls,
        source: SAESource,
        *,
        model_config: PreTrainedConfig,
        model_name: str,
        device: str = "cpu",
        keep: bool | Collection[int] = True,
    ) -> "SAESet":
        """Load and check all SAEs of a source, one after the other; none if none are named.

        The model is the one whose activations will be encoded; `model_name` is its hub id or path, as the user gave it.
        With `keep`, all SAEs stay in memory, or those of the given layers; others are loaded again on access. Raises
        `InputError` as `names_of` and `load_sae`, or if two SAEs are of one layer.
        """
        load = partial(load_sae, source, model_config=model_config, model_name=model_name, device=device)
        kept: dict[int, ResidualSAE] = {}
        infos: dict[int, SAEInfo] = {}
        for name in names_of(source) if source.named else ():
            sae = load(name)
            layer = sae.info.layer
            if layer in infos:
                raise InputError(
                    f"{infos[layer].source} and {name} are both SAEs of layer {layer};\n"
                    "give one for each layer (with --sae_path, --sae_ids names the sub-folders to take)"
                )
            infos[layer] = sae.info
            if keep is True or (keep and layer in keep):
                kept[layer] = sae
            del sae  # before the next one is loaded
        return cls(dict(sorted(infos.items())), kept, load)

    def __getitem__(self, layer: int) -> ResidualSAE:
        if layer in self._kept:
            return self._kept[layer]
        info = self.infos[layer]
        assert self._load is not None, "a set without it has all SAEs in memory"
        return self._load(info.source)

    def __iter__(self) -> Iterator[int]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, layer: object) -> bool:  # Mapping's would load an SAE
        return layer in self.infos

    def __repr__(self) -> str:
        lines = [f"SAEs of {len(self)} layer{'' if len(self) == 1 else 's'}"]
        for layer, info in self.infos.items():
            lines.append(f"  layer {layer}: {info.d_sae} latents, {info.architecture}, {info.source}")
        return "\n".join(lines)

    def identity(self) -> dict[str, Any]:
        """Return the hashes of their weights."""
        return {str(layer): info.sha256 for layer, info in self.infos.items()}


def load_saes(
    release_or_path: str | Path,
    layers: Sequence[int] | None = None,
    *,
    model: PreTrainedModel,
    sae_ids: Sequence[str] = (),
    device: str | None = None,
    allow_mismatch: bool = False,
) -> SAESet:
    """Load SAEs of a model that is in memory.

    Args:
        release_or_path: a folder or file of SAEs, a release of sae-lens (`gemma-scope-2b-pt-res-canonical`), or a hub
            repository in sae-lens' format.
        layers: l for the output of block l (0-based): of a release, each one's narrowest SAE; None: all of a folder.
        model: that the SAEs are of.
        sae_ids: in place of `layers`, the names of SAEs in the release, or of sub-folders.
        device: where the SAEs go, in float32; None: where the model is.
        allow_mismatch: accept SAEs of a model of another name; width and depth must fit all the same.

    Raises:
        InputError: if there is no such SAE, there are several of a layer, or one does not fit the model.

    Examples:
        >>> saes = sails.load_saes(testbed.sae_path, layers=[1, 3], model=model)
        >>> {layer: tuple(sae.W_dec_FD.shape) for layer, sae in saes.items()}
        {1: (512, 96), 3: (512, 96)}
    """
    if layers is not None and sae_ids:
        raise InputError("both layers and sae_ids are given; give one of them")
    name, local = str(release_or_path), Path(release_or_path).expanduser().exists()
    ids = list(sae_ids) if local or layers is None else ids_of_layers(name, layers)
    path = str(Path(name).expanduser()) if local else None
    source = SAESource(None if local else name, tuple(ids), path, allow_mismatch)
    found = SAESet.load(
        source,
        model_config=model.config,
        model_name=model.config.name_or_path or type(model).__name__,
        device=str(model.device) if device is None else device,
        keep=True if layers is None else layers,  # a folder may hold SAEs of many more layers
    )
    if lacking := set(layers or ()) - found.keys():
        raise InputError(
            f"{name} has no SAE of layer {min(lacking)}; it has those of {', '.join(map(str, found)) or 'none'}"
        )
    return SAESet.of({layer: found[layer] for layer in (found if layers is None else layers)})
