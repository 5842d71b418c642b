"""Read the folder of a trained adapter, as PEFT writes it, and check it against the model it is for."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from sails_align.core.errors import InputError, first_line
from sails_align.core.options import HUB_ID
from sails_align.core.suggestions import did_you_mean_path
from sails_align.models import clade
from sails_align.models.load import empty_model, model_errors

KNOWN: dict[str, Any] = {
    "r": int,
    "lora_alpha": (int, float),
    "base_model_name_or_path": (str, NoneType),
    "target_modules": (str, list, NoneType),
    "rank_pattern": (dict, NoneType),
    "alpha_pattern": (dict, NoneType),
}
"""Types of what decides the model, in adapter_config.json; PEFT takes others, or a default, without a word."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter on the disk; of its weights only names, types and shapes."""

    folder: Path
    config: LoraConfig
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Name -> type as safetensors calls it (F32, BF16), and shape."""
    record: dict[str, Any]
    """`run.json`; empty if there is none, since the adapter need not be of one of our runs."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the run was made from. In a checkpoint, `run.json` is this and no more."""
        return self.record.get("identity", self.record)

    @property
    def revision(self) -> str | None:
        """Of the base model on the hub."""
        return self.record.get("options", {}).get("model", {}).get("model_revision") or self.config.revision


@dataclass(frozen=True)
class TensorFaults:
    """What is wrong with an adapter's tensors, in words."""

    damage: str | None
    """Tensors that are lost."""
    mismatch: str | None
    """Tensors that do not fit the model."""


def _damaged(path: Path, cause: object) -> InputError:
    return InputError(f"{path} is damaged ({cause}); copy the folder again, or train again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of named values ({} without a file); raise `InputError` if it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from error
    if not isinstance(value, dict):
        raise _damaged(path, "no mapping of names to values")
    return value


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter's configuration and the header of its weights; raise `InputError` if it is no LoRA adapter."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}{did_you_mean_path(str(folder)) or ';'}\n"
            "give the folder of a finished run, or of a LoRA adapter"
        )
    if (folder / clade.CONFIG).is_file():
        raise InputError(
            f"the adapter in {folder} is a CLADE adapter, whose norms depend on the input: it cannot be merged, edited "
            "or trained further, and vLLM cannot serve it;\nuse it with --backend hf, or train a LoRA adapter"
        )
    if not (folder / CONFIG).is_file():
        holds = "a whole model, and no adapter" if (folder / "config.json").is_file() else f"no adapter (no {CONFIG})"
        raise InputError(f"{folder} holds {holds};\ngive the folder of a finished run with an adapter")
    values = read_json(folder / CONFIG)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(f"the adapter in {folder} is of the kind {kind!r}; give a LoRA adapter")
    wrong = [name for name, types in KNOWN.items() if not isinstance(values.get(name), types)]
    if wrong:
        raise _damaged(folder / CONFIG, f"{wrong[0]} is {values.get(wrong[0])!r}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise _damaged(folder / CONFIG, first_line(error)) from error
    assert isinstance(config, LoraConfig)
    return AdapterFiles(folder, config, _read_header(folder / WEIGHTS), read_json(folder / "run.json"))


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    if not path.is_file():
        pickle = " (adapter_model.bin is a pickle, which is not read)" * path.with_name("adapter_model.bin").is_file()
        raise InputError(f"{path} is missing{pickle};\ngive the folder of a finished run, with its weights")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- it is no dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def load_base_config(adapter: AdapterFiles, base_model: str | None = None) -> tuple[str, PreTrainedConfig]:
    """Return the name and configuration of an adapter's base model, or of `base_model` in its place.

    Raises `InputError` if there is no such model, or it is not cached and the hub cannot be reached.
    """
    name = base_model or base_named_by(adapter)
    if name is None:
        raise InputError(f"{adapter.folder / CONFIG} does not name the base model; give it with --base_model")
    if not Path(name).exists() and (not HUB_ID.fullmatch(name) or name.startswith(".")):
        raise InputError(
            f"there is no model {name}, which the adapter in {adapter.folder} was trained on;\n"
            "if it was moved, give its folder with --base_model"
        )
    revision = None if base_model else adapter.revision
    with model_errors(name, ValueError):
        return name, AutoConfig.from_pretrained(name, revision=revision)


def base_named_by(adapter: AdapterFiles) -> str | None:
    """Return the name of an adapter's base model; a relative path also from another folder than that of the training.

    The path may begin in any folder above the adapter's, also above the one that a link to the adapter leads to.
    """
    return found_from(adapter.folder, adapter.config.base_model_name_or_path)


def found_from(folder: Path, name: str | None, config: str = "config.json") -> str | None:
    """Return a model's name, or the path that it has from one of the folders above a folder (`base_named_by`).

    Args:
        folder: of what names the model.
        name: the model's name or path.
        config: a file that the model's folder holds; that of an adapter is `CONFIG`.
    """
    if name is None or Path(name).is_absolute() or Path(name).exists():
        return name
    above = (*folder.absolute().parents, *folder.resolve().parents)
    return next((str(each / name) for each in above if (each / name / config).is_file()), name)


def expected_shapes(config: LoraConfig, base_config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors an adapter must have; raise `InputError` as `adapted_model`."""
    state = get_peft_model_state_dict(adapted_model(config, base_config), save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def adapted_model(config: LoraConfig, base_config: PreTrainedConfig) -> PeftModel:
    """Return the model with the adapter as PEFT makes it, without weights.

    Raises `InputError` if none of the modules it names is in the model.
    """
    config = copy.deepcopy(config)
    config.init_lora_weights = False  # values do not matter, and some initialisations need real weights
    try:
        with torch.device("meta"):
            return get_peft_model(empty_model(base_config), config)  # pyright: ignore[reportReturnType]
    except ValueError as error:
        cause = first_line(error)
        raise InputError(
            f"the adapter does not fit the model {config.base_model_name_or_path} ({cause});\n"
            "give the model that it was trained on with --base_model"
        ) from error


def tensor_faults(adapter: AdapterFiles, base_config: PreTrainedConfig, *, read_values: bool = True) -> TensorFaults:
    """Compare an adapter's tensors with what its configuration and the model's shapes imply.

    Without `read_values`, tensors that are not finite are not found, and only the header of the file is read.
    """
    expected = expected_shapes(adapter.config, base_config)
    found = {name: shape for name, (_, shape) in adapter.tensors.items()}
    empty = [name for name, shape in found.items() if 0 in shape]
    misshapen = [
        f"{name}: {found[name]}, the model implies {shape}"
        for name, shape in expected.items()
        if name in found and name not in empty and found[name] != shape
    ]
    # PEFT adds a copy of embeddings that have an adapter; it is no part of what the adapter needs.
    copies = ("embed_tokens.weight", "lm_head.weight", ".base_layer.weight")
    unexpected = [name for name in found if name not in expected and not name.endswith(copies)]
    not_finite = []
    if read_values:
        with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
            not_finite = [name for name in found if not torch.isfinite(file.get_tensor(name)).all()]
    missing = [name for name in expected if name not in found]
    return TensorFaults(
        _in_words({"missing": missing, "empty": empty, "not finite": not_finite}),
        _in_words({"of another shape": misshapen, "not of this model": unexpected}),
    )


def _in_words(faults: dict[str, list[str]]) -> str | None:
    found = []
    for what, names in faults.items():
        if names:
            tensors = f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"
            found.append(f"{tensors} {what} ({names[0]}{', ...' if len(names) > 1 else ''})")
    return "; ".join(found) or None


def check_complete(folder: Path, base_config: PreTrainedConfig | None = None, *, read_values: bool = True) -> None:
    """Refuse an adapter with tensors that are missing, empty, not finite, or not of the model's shapes.

    The model is the one that the adapter names, unless a configuration is given. See `tensor_faults` for `read_values`.
    """
    adapter = read_adapter(folder)
    faults = tensor_faults(adapter, base_config or load_base_config(adapter)[1], read_values=read_values)
    if mismatch := faults.mismatch:  # first: of another model some are missing, too
        raise InputError(
            f"the adapter in {folder} does not fit the model: {mismatch};\n"
            "if it was trained on another one, give that with --base_model; else it is damaged: copy it again"
        )
    if damage := faults.damage:
        raise InputError(f"the adapter in {folder} is not whole: {damage};\ncopy it again, or train again")
