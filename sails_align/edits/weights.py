"""Read and write the weights of a model tensor by tensor, without building the model.

An adapter counts as its base model with the adapter merged, so that an edit need not know which of the two it is given.
Written is what the edit returns, in the types and files of the model that was read (in more files, if one is larger
than 1 GiB): at no time is more than one file in memory.

Shapes: O outputs and I inputs of a linear layer, R rank.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.models.adapters import (
    CONFIG,
    WEIGHTS,
    AdapterFiles,
    adapted_model,
    found_from,
    load_base_config,
    read_adapter,
)
from sails_align.models.language_model import copy_processor
from sails_align.models.load import load_config, load_tokenizer, model_errors
from sails_align.models.resolve import resolve_model, without_adapter
from sails_align.models.spec import ModelSpec, identity_of, is_same_model, model_path

PREFIX = "base_model.model."
"""PEFT's, of an adapter's tensors."""
PART = 2**24
"""Elements of a tensor that are copied to float64 at a time."""
FILE_BYTES = 2**30
"""A model with a larger file is written in files of at most this size (one tensor at least), to spare memory."""
TensorChange = Callable[[str, Tensor], Tensor | None]
"""From a tensor's name and its values (float32) to new ones; None: it stays as it is, bit for bit."""


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a weight: scaling * lora_B @ lora_A, in float32."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float

    def dense(self) -> Tensor:
        """Return the update (O, I)."""
        return self.scaling * (self.B_OR @ self.A_RI)


class Weights:
    """The weights of a model or of an adapter on its base, by the names of the model's safetensors files."""

    def __init__(self, spec: ModelSpec) -> None:
        """Take a model as `resolve_model` found it; raise `InputError` as `open_weights`."""
        self.spec = spec
        self.config = load_config(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        _refuse_quantized(spec.base, self.config)
        self.folder = _folder_of(spec)
        self.files = _files_of(self.folder)
        self.adapter = None if spec.adapter is None else read_adapter(Path(spec.adapter))
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self.updated = {} if self.adapter is None else _updated(self.adapter, self.config, self.files)
        """Names of the tensors that the adapter updates, with its module and scaling; empty without an adapter."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the model, in order."""
        return list(self.files)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the model is stored in: that of its first matrix."""
        return self.stored(next(name for name in self.files if len(self.shape(name)) == 2)).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading it."""
        return tuple(self._file(self.folder / self.files[name]).get_slice(name).get_shape())

    def stored(self, name: str) -> Tensor:
        """Return a tensor of the base model as it is stored."""
        return self._file(self.folder / self.files[name]).get_tensor(name)

    def get(self, name: str, *, copy: bool = False) -> Tensor:
        """Return a tensor of the model in float32, with the adapter's update; with `copy` it may be changed in place.

        Otherwise it may be the file's own values, which all readers share.
        """
        weight = self.stored(name).to(torch.float32, copy=copy)
        return weight + self.update(name).dense() if name in self.updated else weight

    def update(self, name: str) -> Update:
        """Return what the adapter adds to a tensor that it updates."""
        assert self.adapter is not None, "only an adapter updates"
        module, scaling = self.updated[name]
        file = self._file(self.adapter.folder / WEIGHTS)
        A_RI, B_OR = (file.get_tensor(f"{PREFIX}{module}.lora_{side}.weight").float() for side in "AB")
        return Update(A_RI, B_OR, scaling)

    def _file(self, path: Path) -> Any:
        if str(path) not in self._open:
            self._open[str(path)] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[str(path)]


def open_weights(name: str | Path, base_model: str | None = None) -> Weights:
    """Open a model's weights: of a folder, a run, an adapter (on `base_model`, if that moved), a GGUF file, or the hub.

    Raises `InputError` if there is no such model, it is quantized, or the adapter is of a kind that cannot be edited.
    """
    folder = Path(name)
    # Before `resolve_model`, which needs a library for some kinds of quantization.
    if (folder / CONFIG).is_file():
        base = None if base_model is None else model_path(base_model)
        _refuse_quantized(*load_base_config(read_adapter(folder), base))
    elif (folder / CONFIG_NAME).is_file():
        _refuse_quantized(str(folder), load_config(str(folder)))
    return Weights(resolve_model(str(name), base_model))


def _refuse_quantized(name: str, config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{name} is quantized, and rounded weights cannot be edited;\n"
            "give the model before quantization (for an adapter with --base_model)"
        )


def open_required(weights: Weights, option: str, name: str | None) -> Weights:
    """Open another model of the same architecture; raise `InputError` if the option that names it is missing."""
    if name is None:
        raise InputError(f"no {option} given; pass --{option}")
    other = open_weights(name)
    check_same_shapes(weights, other)
    return other


def open_aligned(run: Path, base_model: str | None, aligned_model: str | None) -> tuple[Weights, Weights | None]:
    """Open a further trained model, and the aligned model that it was trained from.

    The second is None for an adapter on the aligned model, whose update is all that was trained. An adapter that was
    continued from an earlier one (`--adapter_path`) was trained from its base with the earlier adapter.

    Raises `InputError` as `open_weights`; if no aligned model is given, and it is no adapter; or if the adapter that it
    was continued from is not where its record says, or has changed.
    """
    weights = open_weights(run, base_model)
    if aligned_model is None:
        if weights.adapter is None:
            raise InputError(f"{run} is no adapter, so the model before is not known; give it with --aligned_model")
        earlier = _continued_from(weights.adapter)
        return weights, None if earlier is None else open_weights(earlier, base_model)
    aligned = open_required(weights, "aligned_model", aligned_model)
    is_on_aligned = weights.adapter is not None and aligned.spec.identity == weights.spec.identity["base"]
    return weights, None if is_on_aligned else aligned


def _continued_from(adapter: AdapterFiles) -> str | None:
    """Return the folder of the adapter that an adapter's training continued from; None if it began as a new one.

    Raises `InputError` if that folder is not there, or holds another adapter by now.
    """
    identity = adapter.identity.get("adapter")
    if identity is None:
        return None
    # A checkpoint's record has no options, and so no path.
    name = adapter.record.get("options", {}).get("sails", {}).get("adapter_path")
    folder = found_from(adapter.folder, name, CONFIG)
    if folder is not None and Path(folder).is_dir() and is_same_model(identity, identity_of(folder)):
        return folder
    raise InputError(
        f"the adapter in {adapter.folder} was continued from another adapter, {name or identity['name']}, which is not "
        "there or has changed: so the model before is not known;\ngive it with --aligned_model"
    )


def open_three(
    run: Path, base_model: str | None, aligned_model: str | None, unaligned_model: str | None
) -> tuple[Weights, Weights, Weights]:
    """Open a further trained model, the aligned one that it was trained from, and the unaligned one.

    Raises `InputError` as `open_aligned` and `open_required`.
    """
    weights, other = open_aligned(run, base_model, aligned_model)
    unaligned = open_required(weights, "unaligned_model", unaligned_model)
    return weights, aligned_of(weights, other), unaligned


def aligned_of(weights: Weights, aligned: Weights | None) -> Weights:
    """Return the aligned model, by what `open_aligned` returned: None stands for the base of an adapter."""
    return Weights(without_adapter(weights.spec)) if aligned is None else aligned


class WeightDifference:
    """The differences of two models' weights, such as a safety vector, read as they are asked for."""

    def __init__(self, one: Weights, other: Weights) -> None:
        self._one, self._other = one, other

    def of(self, name: str) -> Tensor | None:
        """Return one - other of a tensor, float32, which may be changed in place; None if it is zero."""
        is_stored = name not in self._one.updated and name not in self._other.updated
        if is_stored and torch.equal(self._one.stored(name), self._other.stored(name)):
            return None  # without copies in float32: embeddings are large, and mostly the same
        delta = self._one.get(name, copy=True).sub_(self._other.get(name))
        return delta if delta.any() else None


def relative_change(one: Weights, other: Weights) -> float:
    """Return the norm of the difference of all weights, as a share of the norm of the other's.

    One tensor of each is in memory at a time. Raises `InputError` if they are not of one architecture.
    """
    check_same_shapes(one, other)
    changes, changed, whole = WeightDifference(one, other), 0.0, 0.0
    for name in other.names:
        whole += squared_norm(other.get(name))
        delta = changes.of(name)
        changed += 0.0 if delta is None else squared_norm(delta)
    return (changed / whole) ** 0.5 if whole else 0.0


def squared_norm(weight: Tensor) -> float:
    """Return the sum of squares, in float64, of which copies are of a part at a time."""
    return sum(part.double().square().sum().item() for part in weight.reshape(-1).split(PART))


def check_same_shapes(one: Weights, other: Weights) -> None:
    """Refuse two models whose tensors differ in names or shapes, with an `InputError`."""
    for name in one.names:
        if name not in other.files or one.shape(name) != other.shape(name):
            found = "lacks it" if name not in other.files else f"has {other.shape(name)}"
            raise InputError(
                f"{one.spec.name} and {other.spec.name} are not of one architecture: {name} is {one.shape(name)} in "
                f"the first, and the second {found};\ngive models that were trained from the same base model"
            )


def write_model(weights: Weights, edit: TensorChange, output: Path) -> None:
    """Write the model with its tensors edited, in its own types and files, with its configuration and tokenizer."""
    files = _files_to_write(weights)
    for file, names in files.items():
        tensors = {}
        for name in names:
            stored, weight = weights.stored(name), weights.get(name)
            new = edit(name, weight)
            if new is None:
                new = weight if name in weights.updated else stored
            tensors[name] = new.to(stored.dtype).contiguous()
        save_file(tensors, output / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
        write_json(output / SAFE_WEIGHTS_INDEX_NAME, index)
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
        own = Path(weights.spec.tokenizer) / name  # a run says what ends its responses
        source = own if name == GENERATION_CONFIG_NAME and own.is_file() else weights.folder / name
        if source.is_file():
            shutil.copyfile(source, output / name)
    _save_tokenizer(weights, output)


def _files_to_write(weights: Weights) -> dict[str, list[str]]:
    """Return the tensors of each file: those of the model that was read, unless one of them is too large."""
    found: dict[str, list[str]] = {}
    for name, file in weights.files.items():
        found.setdefault(file, []).append(name)
    sizes = {name: weights.stored(name).nbytes for name in weights.files}
    if all(sum(sizes[name] for name in names) <= FILE_BYTES for names in found.values()):
        return found
    parts: list[list[str]] = [[]]
    for name, size in sizes.items():
        if parts[-1] and sum(sizes[other] for other in parts[-1]) + size > FILE_BYTES:
            parts.append([])
        parts[-1].append(name)
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, start=1)}


def write_adapter(weights: Weights, edit: Callable[[str, Update], Tensor | None], output: Path) -> None:
    """Write the adapter with some lora_B (O, R) replaced by what `edit` returns; its rank and base stay."""
    assert weights.adapter is not None, "there is an adapter"
    path = weights.adapter.folder / WEIGHTS
    tensors = {name: weights._file(path).get_tensor(name) for name in weights.adapter.tensors}
    for name, (module, _) in weights.updated.items():
        key = f"{PREFIX}{module}.lora_B.weight"
        new_OR = edit(name, weights.update(name))
        if new_OR is not None:
            tensors[key] = new_OR.to(tensors[key].dtype).contiguous()
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    for name in (CONFIG, GENERATION_CONFIG_NAME):
        if (weights.adapter.folder / name).is_file():
            shutil.copyfile(weights.adapter.folder / name, output / name)
    _save_tokenizer(weights, output)


def _save_tokenizer(weights: Weights, output: Path) -> None:
    revision = weights.spec.revision if weights.spec.tokenizer == weights.spec.base else None
    load_tokenizer(weights.spec.tokenizer, revision=revision).save_pretrained(output)
    copy_processor(weights.spec.base, weights.config, output, weights.spec.revision)


def _folder_of(spec: ModelSpec) -> Path:
    """Return the folder with the base model's files: a local one, or that of the hub's cache."""
    if Path(spec.base).is_dir():
        return Path(spec.base)
    with model_errors(spec.base):
        return Path(snapshot_download(spec.base, revision=spec.revision, allow_patterns=["*.safetensors*", "*.json"]))


def _files_of(folder: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise InputError(f"{folder} has no {SAFE_WEIGHTS_NAME}; save the model as safetensors first")
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)


def _updated(adapter: Any, config: Any, files: dict[str, str]) -> dict[str, tuple[str, float]]:
    """Return the tensors that an adapter updates, with its module and scaling."""
    model = adapted_model(adapter.config, config)
    named = {name.removeprefix(PREFIX): layer for name, layer in model.named_modules()}
    layers = {name: layer for name, layer in named.items() if isinstance(layer, LoraLayer)}
    ours = {f"{PREFIX}{name}.lora_{side}.weight" for name in layers for side in "AB"}
    plain = isinstance(adapter.config.use_dora, bool) and not adapter.config.use_dora
    lost = [name for name in layers if f"{name}.weight" not in files]
    if not plain or lost or adapter.config.fan_in_fan_out or set(adapter.tensors) - ours:
        cause = lost or sorted(set(adapter.tensors) - ours) or ["DoRA, or transposed weights"]
        raise InputError(
            f"the adapter in {adapter.folder} is not plain LoRA on linear layers of the model ({cause[0]});\n"
            "merge it (sails merge), and edit the merged model"
        )
    return {f"{name}.weight": (name, float(layer.scaling["default"])) for name, layer in layers.items()}
