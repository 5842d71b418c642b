"""The SAEs of several layers, in memory together or loaded anew each time one is asked for.

A Gemma Scope SAE of 16k latents takes 0.3 GB in Gemma-2-2B and 0.5 GB in 9B, one of Llama Scope 1.1 GB.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from sails_align.saes.load import ResidualSAE, SAEInfo, load_saes, loaded_one_by_one

Value = TypeVar("Value")


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
    _options: Mapping[str, Any]
    """Of `load_saes`."""

    @classmethod
    def load(cls, *, keep: bool, **options: Any) -> "SAESet":
        """Load and check all SAEs, one after the other.

        Args:
            keep: hold all of them in memory; else none.
            options: of `load_saes`.

        Raises:
            InputError: as `load_saes`.
        """
        kept: dict[int, ResidualSAE] = {}
        infos: dict[int, SAEInfo] = {}
        for sae in loaded_one_by_one(**options):
            infos[sae.info.layer] = sae.info
            if keep:
                kept[sae.info.layer] = sae
            del sae  # before the next one is loaded
        return cls(dict(sorted(infos.items())), kept, options)

    def __getitem__(self, layer: int) -> ResidualSAE:
        if layer in self._kept:
            return self._kept[layer]
        source = self.infos[layer].source
        release = self._options.get("release")
        which: dict[str, Any] = {"path": Path(source), "sae_ids": ()}
        if release is not None:
            which = {"sae_ids": [source.removeprefix(f"{release}/")]}
        return load_saes(**{**self._options, **which})[layer]

    def some(self, layers: list[int]) -> dict[int, ResidualSAE]:
        """The SAEs of some layers, loaded."""
        return {layer: self[layer] for layer in layers}


class Decoders(_ByLayer[Tensor]):
    """Decoder directions (F, D) of the SAEs by layer, on the CPU, taken from them when they are asked for."""

    def __init__(self, saes: SAESet) -> None:
        self._saes, self.infos = saes, saes.infos

    def __getitem__(self, layer: int) -> Tensor:
        return self._saes[layer].W_dec_FD.cpu()
