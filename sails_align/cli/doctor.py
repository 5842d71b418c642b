"""The command `sails doctor`: what this machine and this environment have, and what is missing for which feature.

sails doctor            # a report to read
sails doctor --json     # the same for a bug report

Exit code 1 if something that the core needs is missing or of a wrong version. Keys and tokens are never read out: only
whether they are there.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sails_align.core.errors import CommandParser
from sails_align.core.machine import NAME, OPTIONAL, devices, environment, hub, installed_version, packages

# Of the package little is imported, not even its parser of options, and of the libraries as little as can be: the
# more is broken, the more this command is needed.
ASSETS = Path(__file__).parents[1] / "testbed" / "assets"


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
    version = installed_version(NAME)
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
