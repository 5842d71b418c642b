"""The command `sails doctor`: check this machine and environment, and say what is missing for which feature.

sails doctor            # a report to read
sails doctor --json     # the same for a bug report

Exit code 1 if something that the core needs is missing or has a wrong version. Values of keys and tokens are never
shown, only whether they are set.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from sails_align.core import machine
from sails_align.core.errors import CommandParser, first_line
from sails_align.core.tables import FittedTable

# This imports as little as it can, not even the package's parser of options: it must work where libraries are broken.
ASSETS = Path(__file__).parents[1] / "testbed" / "assets"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print the report. Ends the process with exit code 1 if the core cannot work."""
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
    """Return the report; JSON-able."""
    core, optional = machine.packages()
    version, devices, hub = machine.installed_version(machine.NAME), machine.devices(), machine.hub()
    broken_assets = testbed_problem()
    problems = machine.package_problems(core)
    if version is None:
        problems.append(f"{machine.NAME} is not installed, so its requirements are unknown: pip install -e .")
    problems += [text for text in (devices["problem"], broken_assets) if text]
    return {
        "version": version,
        "environment": machine.environment([Path.cwd()] + ([] if hub is None else [Path(hub["cache"])])),
        "devices": devices,
        "packages": core,
        "optional": optional,
        "hub": hub,
        "keys": sorted(name for name, value in os.environ.items() if name.endswith("_API_KEY") and value),
        "compiler": next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        "testbed": "whole" if broken_assets is None else "damaged",
        "problems": problems,
    }


def testbed_problem() -> str | None:
    """Return what is wrong with the testbed's files; None if nothing is."""
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
        return f"the testbed's files are not whole ({first_line(error)}): install {machine.NAME} again"
    return None


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the report."""

    def say(name: str, text: object) -> None:
        console.print(f"{name:<10}{escape(str(text))}", highlight=False, soft_wrap=True)

    system, devices, hub = found["environment"], found["devices"], found["hub"]
    say(machine.NAME, f" {found['version'] or 'not installed'}")
    say("system", f"Python {system['python']}, {system['platform']}")
    memory = f"{system['memory_available_gib']} of {system['memory_gib']} GiB memory free"
    say("machine", f"{system['cpu_cores']} cores, {memory}")
    for folder, free in system["disk_free_gib"].items():
        say("disk", f"{free} GiB free at {folder}")
    for gpu in devices["gpus"]:
        say("GPU", f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}")
    bf16 = "bf16" if devices["bf16"] else "no bf16"
    say("CUDA", f"{devices['cuda']}, {bf16}" if devices["gpus"] else "no GPU: everything runs on the CPU (bf16 off)")
    if hub is not None:
        say("hub", f"{'off' if hub['offline'] else 'on'}line, {'a' if hub['token'] else 'no'} token, {hub['cache']}")
    say("keys", ", ".join(found["keys"]) or "none set (NAME_API_KEY, for judges on servers)")
    say("compiler", found["compiler"] or "none: DeepSpeed's and torch.compile's kernels cannot be built")
    say("testbed", found["testbed"])
    console.print(_table("what the core needs", found["packages"]))
    console.print(_table("what features need", found["optional"], machine.OPTIONAL))
    for problem in found["problems"]:
        say("problem", problem)
    say("result", "the core cannot work as it is" if found["problems"] else "the core has what it needs")


def _table(title: str, rows: Mapping[str, Mapping[str, Any]], features: Mapping[str, str] | None = None) -> FittedTable:
    headings = ("package", "installed", "wanted", "tested", *([] if features is None else ["for"]))
    table = FittedTable(title, headings, n_texts=len(headings))
    for name, package in rows.items():
        installed = package["version"] or "missing"
        if package["version"] is not None and not package["ok"]:
            installed += " (does not fit)"
        last = [] if features is None else [features[name]]
        table.add_row(name, installed, package["wanted"], package["tested"] or "", *last)
    return table
