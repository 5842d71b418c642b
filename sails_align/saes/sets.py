"""Hold the SAEs of several layers, in memory together or loaded on demand.

A Gemma Scope SAE of 16k latents takes 0.3 GB in Gemma-2-2B and 0.5 GB in 9B, one of Llama Scope 1.1 GB.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedConfig

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
    """Of the model, for `load_saes`."""

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
            model_config: as for `load_saes`.
            model_name: as for `load_saes`.
            device: as for `load_saes`.

        Raises:
            InputError: as `load_saes`.
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
