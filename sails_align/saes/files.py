"""Load SAEs from a release of sae-lens, folders in sae-lens format, or Gemma Scope's own files; never pickles."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError

from sails_align.core.errors import InputError
from sails_align.core.suggestions import did_you_mean_path, suggestion
from sails_align.saes import gemma_scope
from sails_align.saes.source import SAESource

if TYPE_CHECKING:
    from sae_lens import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYER = re.compile(r"(?:layer_|blocks\.|\bl)(\d+)")
"""Finds the layer in an SAE's id: `layer_5/width_16k/canonical`, `blocks.5.hook_resid_post`, `l5r_8x`."""
MISSHAPEN = re.compile(
    r"size mismatch for ([\w.]+): copying a param with shape torch\.Size\(\[(.*?)\]\) from checkpoint, "
    r"the shape in current model is torch\.Size\(\[(.*?)\]\)"
)
"""Of torch's message."""
WIDTH = re.compile(r"width_(\d+)([km])")
# These loaders of sae-lens call torch.load.
_PICKLED = {"connor_rob_hook_z", "goodfire", "deepseek_r1", "qwen_scope", "dictionary_learning_1"}
# What sae-lens' directory has for other places than the residual stream, and for families that are not supported.
_ELSEWHERE = re.compile(r"-(att|mlp)(-|$)|_lx[am]_|transcoder|[-_]clt[-_]|temporal|attn-out|resid-mid")
_FAMILIES = re.compile(r"(google/|meta-llama/|mistralai/|Qwen/)?(meta-)?(gemma|llama|mistral|qwen)-?\d", re.IGNORECASE)
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, BadZipFile)


def names_of(source: SAESource) -> list[str]:
    """Return the name of each SAE: `release/sae_id`, or its path.

    A path is an SAE's folder, a Gemma Scope file, or a folder above any number of them, of which `sae_ids` chooses
    sub-folders. Raises `InputError` if the release or an id is unknown or pickled, or there is no SAE at a path.
    """
    if (source.release is None) == (source.path is None):
        raise InputError("both or neither of --sae_release and --sae_path are given; give one")
    if source.release is not None:
        check_release(source.release, source.sae_ids)
        return [f"{source.release}/{sae_id}" for sae_id in source.sae_ids]
    path = Path(str(source.path))
    names = []
    for root in [path / sae_id for sae_id in source.sae_ids] or [path]:
        found = sorted(_saes_below(root))
        if not found:
            raise InputError(
                f"no SAE at {root}{did_you_mean_path(str(root)) or ';'}\n"
                f"give a folder with {CONFIG} and {WEIGHTS}, or Gemma Scope's params.npz, or one above such folders"
            )
        names += map(str, found)
    return names


def usable_releases() -> dict[str, list[str]]:
    """Return the releases of sae-lens' directory that may be used, by model.

    These are SAEs of the residual stream in safetensors, for models of supported families. Whether an SAE reads the
    output of a block is checked when it is loaded.
    """
    found: dict[str, list[str]] = {}
    for name, release in sorted(_directory().items()):
        is_usable = release.conversion_func not in _PICKLED and not _ELSEWHERE.search(name)
        if is_usable and _FAMILIES.match(release.model):
            found.setdefault(release.model.rpartition("/")[2], []).append(name)
    return dict(sorted(found.items()))


def read_sae(source: SAESource, name: str, device: str) -> "SAE[Any]":
    """Load an SAE by its name; raise `InputError` if it is gated, damaged, or cannot be downloaded."""
    try:
        return _read_sae(source.release, name, device)
    except InputError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"SAE {name} is not in the cache ({constants.HF_HUB_CACHE}) and the hub cannot be reached;\n"
            "run once with network access, or give a local copy with --sae_path"
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"SAE {name} is behind a licence; accept it on the hub, and log in with `hf auth login`"
        ) from error
    except (*_DAMAGE, EntryNotFoundError) as error:
        if misshapen := MISSHAPEN.search(str(error)):
            tensor, found, implied = misshapen.groups()
            raise InputError(
                f"SAE {name} cannot be loaded: {tensor} has shape ({found}), but its {CONFIG} implies ({implied});\n"
                "copy weights and configuration again, from one SAE"
            ) from error
        # torch's first line says only what failed.
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and "state_dict for" not in line]
        cause = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
        raise InputError(f"SAE {name} cannot be loaded ({cause}); check that the copy is whole") from error


def _read_sae(release: str | None, name: str, device: str) -> "SAE[Any]":
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    if release is not None:
        converter = gemma_scope.load_gemma_scope_2 if _loader_name(release) == "gemma_3" else None
        return SAE.from_pretrained(release, name.removeprefix(f"{release}/"), device=device, converter=converter)
    converter = sae_lens_disk_loader if Path(name).is_dir() else gemma_scope.load_gemma_scope
    return SAE.load_from_disk(name, device=device, dtype="float32", converter=converter)


def check_release(release: str, sae_ids: Sequence[str]) -> str | None:
    """Return the model of a release according to sae-lens' directory; None if unknown.

    Raises `InputError` if the release or an id is unknown, no id is given, or the SAEs are pickles.
    """
    of_release = None if "/" in release and release not in _directory() else _release(release)
    known = [] if of_release is None else list(of_release.saes_map)
    if not sae_ids:
        some = f": {release} has {_some(known)}" if known else ""
        raise InputError(f"--sae_release {release!r} needs --sae_ids; give one for each layer{some}")
    for sae_id in sae_ids:
        if known and sae_id not in known:
            hint = suggestion(sae_id, known) or f"; it has {_some(known)}"
            raise InputError(f"--sae_ids: {release!r} has no {sae_id!r}{hint}")
    if _loader_name(release) in _PICKLED:
        raise InputError(
            f"the SAEs of {release!r} are stored as pickles, which are not read here; convert them with\n"
            f"sae-lens, SAE.from_pretrained({release!r}, {sae_ids[0]!r}).save_model(FOLDER), and give --sae_path FOLDER"
        )
    return None if of_release is None else of_release.model


def ids_of_layers(release: str, layers: Sequence[int]) -> list[str]:
    """Return the id of each layer's narrowest SAE in a release; raise `InputError` if there is not exactly one."""
    by_layer: dict[int, list[str]] = {}
    for name in _release(release).saes_map:
        if found := LAYER.search(name):
            by_layer.setdefault(int(found[1]), []).append(name)
    chosen = []
    for layer in layers:
        if layer not in by_layer:
            choices = ", ".join(map(str, sorted(by_layer)))
            raise InputError(f"{release} has no SAE of layer {layer}; choose from {choices}")
        narrowest = min(map(_width, by_layer[layer]))
        fitting = [name for name in by_layer[layer] if _width(name) == narrowest]
        if len(fitting) > 1:
            raise InputError(f"{release} has several SAEs of layer {layer}: {_some(fitting)};\nchoose by sae_ids")
        chosen += fitting
    return chosen


def _directory() -> dict[str, Any]:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def _release(name: str) -> Any:
    if name not in _directory():
        hint = suggestion(name, _directory()) or "; sae-lens' table of pretrained SAEs has all names"
        if "/" in name:
            hint = "; if it is a repository on the hub, give the ids of its SAEs (sae_ids)"
        raise InputError(f"{name!r} is neither a path nor a release that sae-lens knows{hint}")
    return _directory()[name]


def _width(sae_id: str) -> int:
    found = WIDTH.search(sae_id)
    return 0 if found is None else int(found[1]) * (1000 if found[2] == "m" else 1)


def _loader_name(release: str) -> str:
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name

    return get_conversion_loader_name(release)


def _some(names: Sequence[str]) -> str:
    shown = 6
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")


def _saes_below(root: Path) -> Iterator[Path]:
    """Yield folders in sae-lens' format and Gemma Scope's files; hidden folders are unfinished downloads."""
    if root.name in gemma_scope.FILES and root.is_file():
        yield root
    for pattern in (CONFIG, *gemma_scope.FILES) if root.is_dir() else ():
        for file in root.rglob(pattern):
            if not any(part.startswith(".") for part in file.relative_to(root).parts):
                yield file.parent if pattern == CONFIG else file
