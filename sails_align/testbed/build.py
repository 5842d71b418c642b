"""Build a testbed, or find one: its world, its pretrained base model and its SAEs.

sails testbed build --seed 1 --output DIR

DIR/world.json            the configuration of the world
DIR/model/                the helpful-only base model and its tokenizer
DIR/saes/layer_<l>/       the SAE of a layer in sae-lens' format, with report.json
DIR/testbed.json          how it was built, and the quality of the SAEs
"""

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import package_versions
from sails_align.core.errors import InputError
from sails_align.core.files import atomic_folder, cache_folder, exclusive, write_json
from sails_align.core.log import Stages, log_file
from sails_align.core.progress import progress_bar
from sails_align.testbed import MARKER
from sails_align.testbed.world import World, WorldConfig

ASSETS = Path(__file__).parent / "assets"
FORMAT = 1
N_STEPS = 1300
SAE_LAYERS = (1, 2, 3)
D_SAE, SAE_K, SAE_TOKENS = 512, 16, 400_000
MODEL_NAME = "testbed"
PARAMETERS: Mapping[str, type[int] | type[float]] = {
    "seed": int,
    "shared_harm": float,
    "n_trained_categories": int,
    "d_model": int,
}
"""Parameters of a world that its name or `sails testbed build` can set."""


@dataclass(frozen=True)
class Testbed:
    """Hold a built testbed."""

    world: World
    folder: Path

    @property
    def model_path(self) -> str:
        return str(self.folder / "model")

    @property
    def sae_path(self) -> str:
        return str(self.folder / "saes")


def load_testbed(folder: Path) -> Testbed:
    """Read a testbed's folder; raise `InputError` if it is none, or of another format."""
    path = folder / MARKER
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} is not a testbed ({path.name}: {error}); run sails testbed build") from None
    if values.pop("format", None) != FORMAT:
        raise InputError(f"{folder} is a testbed of another version; run sails testbed build again")
    return Testbed(World(WorldConfig(**values)), folder)


def is_testbed(name: str | None) -> bool:
    """Tell whether a model name means a testbed: None, `testbed`, `testbed:...`, or a testbed's folder."""
    return name is None or name == "testbed" or name.startswith("testbed:") or (Path(name) / MARKER).is_file()


def resolve_testbed(name: str | None, *, progress: bool = True) -> Testbed:
    """Return the testbed of a name: a folder, or None or `testbed` for the shipped one.

    `testbed:N` and `testbed:shared_harm=0,seed=1` are built into the cache on first use. Raises `InputError` if a seed
    or a parameter cannot be used.
    """
    if name is None or name == "testbed":
        return load_testbed(ASSETS)
    if not name.startswith("testbed:"):
        return load_testbed(Path(name))
    config = parse_world(name)
    default = WorldConfig(seed=config.seed)
    changed = [f"-{key}={value}" for key, value in asdict(config).items() if value != getattr(default, key)]
    folder = cache_folder() / f"testbed-{FORMAT}-{config.seed}{''.join(changed)}"
    if not (folder / "testbed.json").is_file():
        with exclusive(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "testbed.json").is_file():  # another process may have built it meanwhile
                build_testbed(folder, config, progress=progress)
    return load_testbed(folder)


def testbed_model(name: str) -> str:
    """Return the folder of a testbed's model."""
    return resolve_testbed(name).model_path


def parse_world(name: str) -> WorldConfig:
    """Read the configuration in `testbed:N` or `testbed:parameter=value,...`.

    Raises `InputError` for an unknown parameter or a value that cannot be used.
    """
    words = name.removeprefix("testbed:")
    otherwise = (
        f" is no testbed: after the colon comes the seed, as in testbed:1, or parameters ({', '.join(PARAMETERS)}), "
        "as in testbed:shared_harm=0,seed=1"
    )
    text = f"seed={words}" if words.isdecimal() else words
    return WorldConfig(**parse_parameters(text, PARAMETERS, repr(name), otherwise))


def parse_parameters(
    text: str, known: Mapping[str, type[int] | type[float]], where: str, otherwise: str
) -> dict[str, Any]:
    """Read the values of `parameter=value,...`, of the types in `known`.

    Raises `InputError` for an unknown parameter (`where` and `otherwise` are the message) or a value of another type.
    """
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in known:
            raise InputError(where + otherwise)
        try:
            values[key] = known[key](value)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[known[key]]
            raise InputError(f"{where}: {key} is {value!r}, but it must be {kind}; correct it") from None
    return values


def build_testbed(
    output: Path, config: WorldConfig, *, n_steps: int = N_STEPS, sae_tokens: int = SAE_TOKENS, progress: bool = True
) -> dict[str, Any]:
    """Build a testbed: pretrain the base model for `n_steps`, train SAEs on `sae_tokens`. Takes minutes on two cores.

    The folder appears when the testbed is complete. Return the contents of its `testbed.json`. Raises `InputError` if
    `output` exists and is not empty, or cannot be written.
    """
    # Heavy imports here, so that finding a testbed stays quick.
    from sails_align.saes.train import train_saes
    from sails_align.testbed.pretrain import make_tokenizer, pretrain

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists already; choose another --output, or delete it first")
    started = time.time()
    world = World(config)
    tokenizer = make_tokenizer(world)
    stages = Stages(("base model", "SAEs"))
    with atomic_folder(output) as folder, log_file(folder, "testbed build"), stages:
        stages.begin("base model", f"{n_steps:,} steps of pretraining")
        with progress_bar(progress) as bar:
            task = bar.add_task("pretraining the base model", total=n_steps)
            model = pretrain(world, tokenizer, n_steps=n_steps, on_step=lambda step: bar.update(task, completed=step))
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        stages.begin("SAEs", f"layers {', '.join(map(str, SAE_LAYERS))}; {sae_tokens:,} tokens")
        reports = train_saes(
            model,
            tokenizer,
            sae_rows(world, tokenizer),
            SAE_LAYERS,
            d_sae=D_SAE,
            k=SAE_K,
            n_tokens=sae_tokens,
            output_dir=folder / "saes",
            model_name=MODEL_NAME,
            dataset_name=f"testbed:{config.seed}",
            progress=progress,
        )
        write_json(folder / MARKER, {"format": FORMAT, **asdict(config)})
        report = {
            "seconds": round(time.time() - started, 1),
            "n_steps": n_steps,
            "n_parameters": model.num_parameters(),
            "versions": package_versions(),
            "saes": {str(layer): asdict(report) for layer, report in reports.items()},
        }
        write_json(folder / "testbed.json", report)
    return report


def sae_rows(world: World, tokenizer: Any, seed: int = 0) -> Iterator[list[int]]:
    """Yield token ids of the pretraining texts without end, one document or dialogue at a time."""
    from sails_align.testbed.pretrain import item_text

    rng = random.Random(f"saes {world.config.seed} {seed}")
    for item in world.pretraining_items(rng):
        yield tokenizer(item_text(item), add_special_tokens=False)["input_ids"]
