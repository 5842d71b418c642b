"""What an installed package must do outside of its repository: `make test-wheel` runs this with a fresh environment.

python tests/smoke_installed.py .venv-wheel
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from paths import ROOT

STEPS = (
    "sails doctor",
    "sails discover --max_train_examples 64 --output_dir found",
    "sails train sft --max_steps 4 --max_train_examples 64 --eval_examples 8 --save_strategy no --output_dir run",
    "sails eval safety --model run --n_prompts 8 --output_dir judged",
)
WHERE = (
    "import sails_align, sails_align.data.tokens as of; print(sails_align.__file__, len(of.read_chat_template('{}')))"
)


def main(environment: Path) -> None:
    """Run each step in an empty folder. Ends with an error at the first that fails."""
    # Neither the checkout nor the user's own packages are to be found.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="sails-smoke-") as folder:

        def run(*command: str) -> str:
            started = time.perf_counter()
            ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
            print(f"{time.perf_counter() - started:5.1f} s  {' '.join(command)[:100]}", flush=True)
            if ended.returncode != 0:
                raise SystemExit(f"exit code {ended.returncode}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
            return ended.stdout

        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        assert run("sails", "--version").split() == ["sails-align", version]
        where, n_characters = run("python", "-c", WHERE.format("human_assistant")).split()
        assert Path(where).is_relative_to(environment), f"{where} is not of the environment"
        assert int(n_characters) > 0
        for step in STEPS:
            run(*step.split())
        at = Path(folder)
        assert (at / "found" / "subspace" / "subspace.safetensors").is_file()
        assert (at / "run" / "adapter_model.safetensors").is_file()
        trained = json.loads((at / "run" / "metrics.json").read_text())["trained"]
        assert trained["safety_rate"]["n"] == 16
        judged = json.loads((at / "judged" / "metrics.json").read_text())
        print(f"all steps passed; evaluated: {json.dumps(judged)[:300]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
