"""What a run directory says of how it was made, so that the run can be repeated.

<output_dir>/config.yaml   every option that was given or has a default of ours: `--config` takes it
<output_dir>/run.json      all options, resolved; versions, git commit, number of processes; hashes of model, data, SAEs
                           and subspace
"""

import subprocess
from pathlib import Path
from typing import Any

import yaml

import sails_align
from sails_align.core.artifacts import package_versions
from sails_align.core.files import write_json, write_text
from sails_align.data.pairs import fingerprint
from sails_align.subspace.basis import Subspace
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan


def write_record(
    args: TrainingPlan, identity: dict[str, Any], source: TrainingSource, subspace: Subspace | None, output_dir: Path
) -> None:
    """Write `config.yaml` and `run.json`. Neither has a token or a key."""
    record = {
        "identity": identity,
        "options": args.to_json(),
        "versions": package_versions(),
        "git": git_commit(),
        "data": {
            "safety": {"name": args.script.dataset_name, "rows": len(source.safety)},
            "helpful": {"name": args.data.helpful_dataset_name, "rows": len(source.helpful or ())},
            "train": {"rows": len(source.train), "sha256": source.data_hash()},
            "held_out": {"rows": len(source.held_out), "sha256": fingerprint(source.held_out)},
            "dropped_rows": source.dropped,
        },
        "saes": None if subspace is None else subspace.provenance.get("saes"),
    }
    write_json(output_dir / "run.json", record)
    header = f"# accelerate launch recipes/{args.method}_sails.py --config {output_dir}/config.yaml\n"
    options = {**args.defaults, **args.given, "output_dir": str(output_dir)}
    public = {name: value for name, value in options.items() if name not in ("hub_token", "push_to_hub_token")}
    write_text(output_dir / "config.yaml", header + yaml.safe_dump(public))


def git_commit() -> dict[str, Any] | None:
    """Commit of this package's checkout and whether files differ from it; None if it is installed otherwise."""
    root = Path(sails_align.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git on this machine, or not a repository after all
        return None
