"""Train the difference of an adapter from its start, so that the base weights need not change.

Initializations such as PiSSA (arXiv 2404.02948) move a part of the weights into the adapter: W' = W - s B0 A0 is
frozen, and W' + s B A is W at first. Here W stays, and the forward pass subtracts the start:

    y = W x + s (B A - B0 A0) P x

with a projector P = I - N N^T in front, if there is one. As a function of A and B it is the same, with the same
gradients; but nothing is rounded: the first forward pass is the base model's bit for bit, also in bfloat16, and so it
is with the adapter off. What is saved at the end is a plain LoRA adapter of twice the rank: [B, -B0] [A P; A0 P].

Shapes: B batch, S sequence, R rank, I inputs and O outputs of a module, K directions that P removes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

from sails_align.core.artifacts import load_artifact, read_header, save_artifact
from sails_align.core.files import write_json
from sails_align.models.adapters import CONFIG, WEIGHTS

KIND = "start"


@dataclass(frozen=True, eq=False)
class Start:
    """What the adapter of one module starts from."""

    A: Tensor
    """(R, I)"""
    B: Tensor
    """(O, R)"""
    removed: Tensor | None = None
    """(I, K): orthonormal directions that inputs lose; None: the adapter reads them as they are."""


class Difference(LoraVariant):
    """Compute an adapter's difference from its start, in PEFT's linear modules."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def supports_lora_conversion(self) -> bool:
        return False  # PEFT would convert A and B alone

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- PEFT's are static, but called on an object
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add the difference to the base module's result."""
        lora_A: Any = module.lora_A[active_adapter]
        lora_B: Any = module.lora_B[active_adapter]
        x_BSI = self._projected(module.lora_dropout[active_adapter](x))
        # DeepSpeed rounds trained factors to bfloat16: the start must be rounded as they are.
        A_RI, B_OR = (part.to(lora_A.weight) for part in (self.start.A, self.start.B))
        return result + (lora_B(lora_A(x_BSI)) - linear(linear(x_BSI, A_RI), B_OR)) * module.scaling[active_adapter]

    def _projected(self, x_BSI: Tensor) -> Tensor:
        if self.start.removed is None:
            return x_BSI
        # In float32 at least: in bfloat16 a hundredth of what P removes would be left.
        wide = torch.promote_types(x_BSI.dtype, torch.float32)
        with torch.autocast(x_BSI.device.type, enabled=False):
            removed_IK, full_BSI = self.start.removed.to(x_BSI.device, wide), x_BSI.to(wide)
            return (full_BSI - (full_BSI @ removed_IK) @ removed_IK.T).to(x_BSI.dtype)

    @torch.no_grad()
    def delta(self, module: LoraLayer, adapter: str) -> Tensor:
        """Return the change of the module's weights (O, I), in float64."""
        A_RI, B_OR = (part.get_parameter(f"{adapter}.weight") for part in (module.lora_A, module.lora_B))
        A_RI, B_OR = factors(A_RI, B_OR, self.start)
        return B_OR @ A_RI * module.scaling[adapter]

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # pyright: ignore
        return orig_weight + self.delta(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:  # pyright: ignore
        orig_weight.data += self.delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # pyright: ignore
        return orig_weight - self.delta(module, active_adapter).to(orig_weight.dtype)


def factors(A_RI: Tensor, B_OR: Tensor, start: Start) -> tuple[Tensor, Tensor]:
    """Return the factors of the plain adapter of twice the rank that computes the difference, in float64.

    Of lora_A (2 R, I) and lora_B (O, 2 R), with the scaling that the adapter has.
    """
    start_A_RI, start_B_OR = start.A.to(A_RI).double(), start.B.to(B_OR).double()
    stacked_A = torch.cat([A_RI.double(), start_A_RI])
    if start.removed is not None:
        removed_IK = start.removed.to(stacked_A)
        stacked_A = stacked_A - (stacked_A @ removed_IK) @ removed_IK.T
    return stacked_A, torch.cat([B_OR.double(), -start_B_OR], dim=1)


@torch.no_grad()
def start_from(model: PeftModel, starts: Mapping[str, Start], init: str, adapter_name: str = "default") -> None:
    """Start the adapter of each named module as given, and let it compute the difference from there.

    The configuration is marked with the name of the initialization, so that nobody takes the factors of a checkpoint
    for a plain adapter; PEFT itself refuses to load such a one.
    """
    kept: dict[int, Tensor] = {}  # modules that read the same have the same projector
    for name, start in starts.items():
        module: Any = model.get_submodule(name)
        lora_A, lora_B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        lora_A.copy_(start.A)
        lora_B.copy_(start.B)
        removed_IK = start.removed
        if removed_IK is not None:
            wide = torch.promote_types(lora_A.dtype, torch.float32)
            removed_IK = kept.setdefault(id(removed_IK), removed_IK.to(lora_A.device, wide))
        # Of the factors as they are rounded now, so that the difference is zero.
        module.lora_variant[adapter_name] = Difference(Start(lora_A.clone(), lora_B.clone(), removed_IK))
    model.peft_config[adapter_name].init_lora_weights = init  # pyright: ignore[reportAttributeAccessIssue]


def save_starts(model: PeftModel, folder: Path, report: Mapping[str, Any], input_hash: str) -> None:
    """Save what the adapters start from, for resumed runs and other processes (`load_starts`)."""
    tensors: dict[str, Tensor] = {}
    projectors: dict[int, str] = {}
    removed: dict[str, str] = {}
    for name, start in _starts_of(model).items():
        tensors |= {f"{name}.A": start.A, f"{name}.B": start.B}
        if start.removed is not None:
            removed[name] = projectors.setdefault(id(start.removed), f"removed.{len(projectors)}")
            tensors[removed[name]] = start.removed
    save_artifact(folder, KIND, tensors, {"report": dict(report), "removed": removed}, input_hash)


def load_starts(folder: Path, input_hash: str) -> tuple[dict[str, Start], dict[str, Any]] | None:
    """Load what `save_starts` saved, and its report; None if there is nothing, or something else was decided by."""
    header = read_header(folder, KIND)
    if header is None or header["input_hash"] != input_hash:
        return None
    tensors, header = load_artifact(folder, KIND)
    removed = header["provenance"]["removed"]
    names = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
    starts = {
        name: Start(tensors[f"{name}.A"], tensors[f"{name}.B"], tensors.get(removed.get(name, ""))) for name in names
    }
    return starts, header["provenance"]["report"]


def _starts_of(model: PeftModel, adapter_name: str = "default") -> dict[str, Start]:
    variants = {
        name: module.lora_variant.get(adapter_name)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    return {name: variant.start for name, variant in variants.items() if isinstance(variant, Difference)}


def save_difference(model: PeftModel, folder: Path, adapter_name: str = "default") -> None:
    """Replace an adapter that PEFT has saved by the plain LoRA adapter of twice the rank that computes the same."""
    weights = load_file(folder / WEIGHTS)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_variant:
            variant = module.lora_variant[adapter_name]
            assert isinstance(variant, Difference), "other variants of LoRA are refused with the options"
            keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            for key, factor in zip(keys, factors(weights[keys[0]], weights[keys[1]], variant.start), strict=True):
                weights[key] = factor.to(weights[key].dtype).cpu().contiguous()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # The scaling stays: alpha / r, or with rsLoRA alpha / sqrt(r).
    alpha = config["lora_alpha"] * (2**0.5 if config["use_rslora"] else 2)
    config |= {"r": 2 * config["r"], "lora_alpha": alpha, "init_lora_weights": True}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
