"""Write what a run directory says of how it was made, so that the run can be repeated.

<output_dir>/config.yaml   every option that was given or has a default of ours: `--config` takes it
<output_dir>/run.json      all options, resolved; versions, git commit, number of processes; hashes of model, data, SAEs
                           and subspace
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import sails_align
from sails_align.core.artifacts import package_versions
from sails_align.core.files import write_json, write_text

NOT_REPEATED = ("hub_token", "push_to_hub_token", "overwrite_output_dir")
"""Options that `config.yaml` leaves out: secrets, and what would replace the run."""


def write_record(output_dir: Path, command: str, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write `config.yaml` and `run.json`. Neither has a token or a key.

    Args:
        output_dir: of the run.
        command: what takes the configuration: `sails train` with this word.
        config: options as `--config` takes them.
        record: `identity`, `options` and `data` of the run, without secrets.
    """
    write_json(output_dir / "run.json", {**record, "versions": package_versions(), "git": git_commit()})
    header = f"# sails train {command} --config {output_dir}/config.yaml\n"
    public = {name: value for name, value in config.items() if name not in NOT_REPEATED}
    write_text(output_dir / "config.yaml", header + yaml.safe_dump({**public, "output_dir": str(output_dir)}))


def git_commit() -> dict[str, Any] | None:
    """Return the commit of this package's checkout, and whether files differ from it; None without a checkout."""
    root = Path(sails_align.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # git is not installed, or .git is not a repository
        return None
