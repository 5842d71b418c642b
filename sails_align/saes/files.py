"""Load SAEs from a release of sae-lens, folders in sae-lens format, or Gemma Scope's own files.

Only safetensors and npz files are read.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError

from sails_align.core.errors import InputError
from sails_align.saes import gemma_scope

if TYPE_CHECKING:
    from sae_lens import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYER = re.compile(r"(?:layer_|blocks\.|\bl)(\d+)")
"""In the id of an SAE: `layer_5/width_16k/canonical`, `blocks.5.hook_resid_post`, `l5r_8x`."""
WIDTH = re.compile(r"width_(\d+)([km])")
# These loaders of sae-lens call torch.load.
_PICKLED = {"connor_rob_hook_z", "goodfire", "deepseek_r1", "qwen_scope", "dictionary_learning_1"}
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, BadZipFile)


def saes_of_release(release: str, sae_ids: Sequence[str], device: str) -> Iterator[tuple[str, "SAE[Any]"]]:
    """Yield (`release/sae_id`, SAE) for each id, from the hub or its cache, in float32.

    Args:
        release: a release of sae-lens' directory, or the id of a hub repository with SAEs in sae-lens' format.
        sae_ids: at least one.
        device: where the SAEs go.

    Raises:
        InputError: if release or id is unknown, neither cached nor reachable, gated, damaged, or pickled.
    """
    from sae_lens import SAE

    check_release(release, sae_ids)
    converter = gemma_scope.load_gemma_scope_2 if _loader_name(release) == "gemma_3" else None
    for sae_id in sae_ids:
        source = f"{release}/{sae_id}"
        try:
            sae = SAE.from_pretrained(release, sae_id, device=device, converter=converter)
        except InputError:
            raise
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise InputError(
                f"SAE {source} is not in the cache ({constants.HF_HUB_CACHE}) and the hub cannot be reached:\n"
                "run once with network access, or give a local copy with --sae_path"
            ) from error
        except GatedRepoError as error:
            raise InputError(
                f"SAE {source} is behind a licence; accept it on the hub, and log in with `hf auth login`"
            ) from error
        except (*_DAMAGE, EntryNotFoundError) as error:
            raise InputError(f"SAE {source} cannot be loaded ({_first_line(error)}); is the copy whole?") from error
        yield source, sae
        del sae  # before the next one is loaded


def saes_of_path(path: Path, sae_ids: Sequence[str], device: str) -> Iterator[tuple[str, "SAE[Any]"]]:
    """Yield (path, SAE) for each SAE at a local path, in float32.

    Args:
        path: an SAE's folder (cfg.json and sae_weights.safetensors), a Gemma Scope file (params.npz or, of Gemma
            Scope 2, params.safetensors), or a folder with any number of them below it.
        sae_ids: sub-folders to take; all of them if empty.
        device: where the SAEs go.

    Raises:
        InputError: if there is no SAE, or one cannot be read.
    """
    for root in [path / sae_id for sae_id in sae_ids] or [path]:
        found = sorted(_saes_below(root))
        if not found:
            raise InputError(
                f"no SAE at {root};\n"
                f"give a folder with {CONFIG} and {WEIGHTS}, or Gemma Scope's params.npz, or one above such folders"
            )
        for place in found:
            try:
                sae = _sae_at(place, device)
            except InputError:
                raise
            except _DAMAGE as error:
                raise InputError(f"SAE {place} cannot be loaded ({_first_line(error)}); is the copy whole?") from error
            yield str(place), sae
            del sae


def check_release(release: str, sae_ids: Sequence[str]) -> str | None:
    """Return the model of a release's SAEs according to sae-lens' directory; None if unknown.

    Raises:
        InputError: if release or id is unknown, no id is given, or the SAEs are pickles.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory and "/" not in release:
        close = difflib.get_close_matches(release, directory, n=4, cutoff=0.5)
        raise InputError(
            f"--sae_release {release!r} is not a release that sae-lens knows{_suggestion(close) or OTHERWISE}"
        )
    known = list(directory[release].saes_map) if release in directory else []
    if not sae_ids:
        some = f": {release} has {_some(known)}" if known else ""
        raise InputError(f"--sae_release {release!r} needs --sae_ids; give one for each layer{some}")
    for sae_id in sae_ids:
        if known and sae_id not in known:
            close = difflib.get_close_matches(sae_id, known, n=4, cutoff=0.5)
            raise InputError(
                f"--sae_ids: {release!r} has no {sae_id!r}{_suggestion(close) or f'; it has {_some(known)}'}"
            )
    if _loader_name(release) in _PICKLED:
        raise InputError(
            f"the SAEs of {release!r} are stored as pickles, which are not read here: convert them with\n"
            f"sae-lens, SAE.from_pretrained({release!r}, {sae_ids[0]!r}).save_model(FOLDER), and give --sae_path FOLDER"
        )
    return directory[release].model if release in directory else None


def ids_of_layers(release: str, layers: Sequence[int]) -> list[str]:
    """Return an id of a release for each layer; of several SAEs of a layer the narrowest.

    Raises:
        InputError: if the release is unknown, or has none, or several that are equally narrow.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        close = difflib.get_close_matches(release, directory, n=4, cutoff=0.5)
        raise InputError(
            f"{release!r} is no folder, and no release that sae-lens knows{_suggestion(close)};\n"
            "give one of them, or the ids of its SAEs (sae_ids)"
        )
    by_layer: dict[int, list[str]] = {}
    for name in directory[release].saes_map:
        if found := LAYER.search(name):
            by_layer.setdefault(int(found[1]), []).append(name)
    chosen = []
    for layer in layers:
        if layer not in by_layer:
            raise InputError(
                f"{release} has no SAE of layer {layer}; choose of {', '.join(map(str, sorted(by_layer)))}"
            )
        narrowest = min(map(_width, by_layer[layer]))
        fitting = [name for name in by_layer[layer] if _width(name) == narrowest]
        if len(fitting) > 1:
            raise InputError(f"{release} has several SAEs of layer {layer}: {_some(fitting)};\nchoose by sae_ids")
        chosen += fitting
    return chosen


def _width(sae_id: str) -> int:
    found = WIDTH.search(sae_id)
    return 0 if found is None else int(found[1]) * (1000 if found[2] == "m" else 1)


def _loader_name(release: str) -> str:
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name

    return get_conversion_loader_name(release)


OTHERWISE = "; sae-lens' table of pretrained SAEs has their names"


def _suggestion(close: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _some(names: Iterable[str], shown: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _saes_below(root: Path) -> Iterator[Path]:
    """Folders in sae-lens' format, and Gemma Scope's files; not in hidden folders, which are unfinished downloads."""
    if root.name in gemma_scope.FILES and root.is_file():
        yield root
    for pattern in (CONFIG, *gemma_scope.FILES) if root.is_dir() else ():
        for file in root.rglob(pattern):
            if not any(part.startswith(".") for part in file.relative_to(root).parts):
                yield file.parent if pattern == CONFIG else file


def _sae_at(place: Path, device: str) -> "SAE[Any]":
    from sae_lens import SAE

    if place.is_dir():
        return SAE.load_from_disk(place, device=device, dtype="float32")
    return SAE.load_from_disk(place, device=device, dtype="float32", converter=gemma_scope.load_gemma_scope)
