"""Read Gemma Scope's own files: `params.npz`, and `params.safetensors` of Gemma Scope 2. Shapes: D d_model, F d_sae."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from sails_align.core.errors import InputError

FILES = ("params.npz", "params.safetensors")
# Repositories, and folders of Gemma Scope 2, that are not of the residual stream.
_ELSEWHERE = re.compile(r"gemma-scope-\d+b-(pt|it)-(?!res)|/(mlp_out|attn_out|transcoder|clt)[a-z_]*/")


def load_gemma_scope(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Load a JumpReLU SAE from Gemma Scope's own file; a loader for sae-lens (`PretrainedSaeDiskLoader`).

    Layer and model are told by the path: `.../gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz`.
    """
    file = Path(path)
    layers = re.findall(r"layer_(\d+)", file.parent.as_posix())
    if not layers:
        raise InputError(
            f"cannot infer the layer of {file}; keep Gemma Scope's folder names (layer_12/width_16k/.../params.npz)"
        )
    if _ELSEWHERE.search(file.as_posix()):
        raise InputError(f"{file} is not an SAE of the residual stream: use Gemma Scope's `-res` or `resid_post` SAEs")
    tensors = _read_tensors(file)
    d_model, d_sae = tensors["w_enc"].shape
    config = {
        "architecture": "jumprelu",
        "d_in": d_model,
        "d_sae": d_sae,
        "device": device,
        "model_name": _gemma_model(file),
        "hook_name": f"blocks.{layers[-1]}.hook_resid_post",
        "prepend_bos": True,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    state = {ours: tensors[theirs].to(device, torch.float32) for theirs, ours in names.items()}
    return {**config, **(cfg_overrides or {})}, state


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return tensors by lower-case name: the first Gemma Scope says `W_enc`, the second `w_enc`."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    else:
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name.lower(): tensor for name, tensor in tensors.items()}


def _gemma_model(file: Path) -> str | None:
    """Return the model of a Gemma Scope repository (`gemma-scope-2b-pt-res`, `gemma-scope-2-1b-it`), by the path."""
    match = re.search(r"gemma-scope-(2-)?(\d+[bm])-(pt|it)", file.as_posix())
    if match is None:
        return None
    second, size, tuning = match.groups()
    if second is None:
        return f"gemma-2-{size}" + ("-it" if tuning == "it" else "")
    return f"gemma-3-{size}" + ("" if (size, tuning) == ("270m", "pt") else f"-{tuning}")


def load_gemma_scope_2(
    repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], None]:
    """Load an SAE of Gemma Scope 2 from the hub or its cache (`PretrainedSaeHuggingfaceLoader`).

    sae-lens' own asks the hub for the tensors' shapes even if the file is cached (`get_safetensors_tensor_shapes` in
    6.54), so it cannot work offline.
    """
    file = hf_hub_download(repo_id, f"{folder_name}/params.safetensors", force_download=force_download)
    config, state = load_gemma_scope(file, device, cfg_overrides)
    return config, state, None
