"""Name SAEs, of a release or in a folder, without loading them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAE_FILES = ("cfg.json", "sae_weights.safetensors", "params.npz", "params.safetensors")
"""Files of a local SAE, in sae-lens' format and Gemma Scope's."""


@dataclass(frozen=True)
class SAESource:
    """SAEs by name: of a release, or at a path."""

    release: str | None = None
    """A release of sae-lens' directory (`gemma-scope-2b-pt-res-canonical`), or a hub repository in sae-lens' format."""
    sae_ids: tuple[str, ...] = ()
    """Ids in the release (`layer_12/width_16k/canonical`); with a path, sub-folders (all if empty)."""
    path: str | None = None
    allow_mismatch: bool = False
    """Accept SAEs of a model of another name; width and depth must fit all the same."""

    @property
    def named(self) -> bool:
        """Return whether any SAEs are named."""
        return self.release is not None or self.path is not None

    def identity(self) -> dict[str, Any]:
        """Return the hashes of local files, or a release and its ids."""
        from sails_align.core.artifacts import file_hash

        if not self.named:
            return {}
        named: dict[str, Any] = {"ids": list(self.sae_ids) or None, "allow_mismatch": self.allow_mismatch}
        if self.path is None:
            return {**named, "release": self.release}
        path = Path(self.path)
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        of_saes = [file for file in files if file.name in SAE_FILES]
        return {**named, "files": {str(file.relative_to(path)): file_hash(file) for file in of_saes}}
