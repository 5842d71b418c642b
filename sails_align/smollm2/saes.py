"""Find the SAEs of SmolLM2-135M-Instruct that lie in the project's repository."""

from pathlib import Path

from sails_align.core.errors import InputError

FOLDER = Path("recipes", "saes", "smollm2-135m-instruct")
"""In the repository; packages for pip leave it out because of its size."""


def sae_folder() -> str:
    """Return the folder of the SAEs.

    Raises:
        InputError: if the package was installed without the repository.
    """
    for root in (Path(), Path(__file__).parents[2]):
        if (root / FOLDER).is_dir():
            return str((root / FOLDER).resolve())
    raise InputError(
        f"the SAEs of smollm2 lie in the project's repository ({FOLDER}), which this installation lacks;\n"
        "clone it, or train some (sails train-sae --model_name_or_path smollm2 ...), and give --sae_path"
    )
