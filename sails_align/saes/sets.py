"""Hold the SAEs of several layers, in memory together or loaded on demand.

A Gemma Scope SAE of 16k latents takes 0.3 GB in Gemma-2-2B and 0.5 GB in 9B, one of Llama Scope 1.1 GB.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sails_align.core.errors import InputError
from sails_align.saes.files import ids_of_layers
from sails_align.saes.load import ResidualSAE, SAEInfo, loaded_one_by_one
from sails_align.saes.source import SAESource

Value = TypeVar("Value")
NO_SAES = SAESource()


class _ByLayer(Mapping[int, Value]):
    """A mapping that knows its layers, and asks for a value only when one is wanted."""

    infos: Mapping[int, SAEInfo]

    def __iter__(self) -> Iterator[int]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, layer: object) -> bool:  # Mapping's would load an SAE
        return layer in self.infos


@dataclass(frozen=True)
class SAESet(_ByLayer[ResidualSAE]):
    """SAEs by layer. Those that are not kept are loaded when they are asked for."""

    infos: Mapping[int, SAEInfo]
    """What is known of each; nothing is loaded for it."""
    _kept: Mapping[int, ResidualSAE]
    _source: SAESource = NO_SAES
    _options: Mapping[str, Any] | None = None
    """Of the model, for `saes_by_layer`."""

    @classmethod
    def of(cls, saes: Mapping[int, ResidualSAE]) -> "SAESet":
        """Those that are in memory already."""
        kept = dict(sorted(saes.items()))
        return cls({layer: sae.info for layer, sae in kept.items()}, kept)

    @classmethod
    def load(
        cls, source: SAESource, *, keep: bool, model_config: PreTrainedConfig, model_name: str, device: str = "cpu"
    ) -> "SAESet":
        """Load and check all SAEs, one after the other; none if none are named.

        Args:
            source: of the SAEs.
            keep: hold all of them in memory; else none.
            model_config: as for `saes_by_layer`.
            model_name: as for `saes_by_layer`.
            device: as for `saes_by_layer`.

        Raises:
            InputError: as `saes_by_layer`.
        """
        kept: dict[int, ResidualSAE] = {}
        infos: dict[int, SAEInfo] = {}
        options = {"model_config": model_config, "model_name": model_name, "device": device}
        for sae in loaded_one_by_one(source, **options) if source.named else ():
            infos[sae.info.layer] = sae.info
            if keep:
                kept[sae.info.layer] = sae
            del sae  # before the next one is loaded
        return cls(dict(sorted(infos.items())), kept, source, options)

    def __getitem__(self, layer: int) -> ResidualSAE:
        if layer in self._kept:
            return self._kept[layer]
        one = self.infos[layer].source
        release = self._source.release
        which: dict[str, Any] = {"path": str(Path(one)), "sae_ids": ()}
        if release is not None:
            which = {"sae_ids": (one.removeprefix(f"{release}/"),)}
        return next(loaded_one_by_one(replace(self._source, **which), **(self._options or {})))

    def __repr__(self) -> str:
        lines = [
            f"  layer {layer}: {of.d_sae} latents, {of.architecture}, {of.source}" for layer, of in self.infos.items()
        ]
        return "\n".join([f"SAEs of {len(self)} layer{'' if len(self) == 1 else 's'}", *lines])

    def identity(self) -> dict[str, Any]:
        """What identifies them: the hashes of their weights."""
        return {str(layer): info.sha256 for layer, info in self.infos.items()}


class Decoders(_ByLayer[Tensor]):
    """Decoder directions (F, D) of the SAEs by layer, on the CPU, taken from them when they are asked for."""

    def __init__(self, saes: SAESet) -> None:
        self._saes, self.infos = saes, saes.infos

    def __getitem__(self, layer: int) -> Tensor:
        return self._saes[layer].W_dec_FD.cpu()


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
        layers: l for the output of block l, 0-based. Of a release the narrowest SAE of each layer is taken; of a folder
            None takes all.
        model: that the SAEs are of.
        sae_ids: in place of `layers`, the names of SAEs in the release, or of sub-folders.
        device: where the SAEs go, in float32; None: where the model is.
        allow_mismatch: accept SAEs of a model of another name; width and depth must fit all the same.

    Raises:
        InputError: if there is no such SAE, there are several of a layer, or one does not fit the model.
    """
    if layers is not None and sae_ids:
        raise InputError("both layers and sae_ids are given; give one of them")
    name, local = str(release_or_path), Path(release_or_path).expanduser().exists()
    ids = list(sae_ids) if local or layers is None else ids_of_layers(name, layers)
    path = str(Path(name).expanduser()) if local else None
    source = SAESource(None if local else name, tuple(ids), path, allow_mismatch)
    found = {
        sae.info.layer: sae
        for sae in loaded_one_by_one(
            source,
            model_config=model.config,
            model_name=model.config.name_or_path or type(model).__name__,
            device=str(model.device) if device is None else device,
        )
        if layers is None or sae.info.layer in layers
    }
    if lacking := set(layers or ()) - found.keys():
        raise InputError(
            f"{name} has no SAE of layer {min(lacking)}; it has those of {', '.join(map(str, found)) or 'none'}"
        )
    return SAESet.of(found)
