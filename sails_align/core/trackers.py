"""Send numbers, tables and pictures of a run to the services of `--report_to`, through accelerate's trackers.

wandb and trackio read keys and addresses from the environment and their own files; none is read, kept or sent here.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.errors import InputError, first_line
from sails_align.core.log import is_main
from sails_align.core.machine import installed_version
from sails_align.core.text import literal, printable

if TYPE_CHECKING:
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    Tracker = TensorBoardTracker | TrackioTracker | WandBTracker

SERVICES = ("tensorboard", "wandb", "trackio")
REPORT_TO = "Where results also go: none, or some of tensorboard, wandb and trackio (docs/training.md, Watch runs)."
PROJECT = "huggingface"
"""transformers' own default, so that evaluations lie beside trainings. WANDB_PROJECT names another one for wandb."""
MOST_ROWS = 200
"""Rows of a table that are sent, spread evenly over all of its rows."""


def check_services(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise `InputError` if a name of `--report_to` is not one of the known services."""
    if missing := [name for name in names if name not in known]:
        raise InputError(
            f"report_to is {missing[0]}, which is unknown or not installed;\n"
            f"pip install it, or choose one of: {', '.join((*known, 'none'))}"
        )


def services_of(report_to: Sequence[str]) -> list[str]:
    """Return the services that `--report_to` names; raise `InputError` for one that is unknown or not installed."""
    names = [name for name in dict.fromkeys(report_to) if name != "none"]
    # By their metadata: a folder with wandb's results can be imported, too.
    check_services(names, [name for name in SERVICES if installed_version(name)])
    return names


def hide_command_line() -> None:
    """Keep wandb from sending the command line, which may hold a token or an address with a password."""
    os.environ.setdefault("WANDB_X_DISABLE_META", "true")


class Trackers:
    """Send what a run found to some trackers, within a `with` block.

    Texts, such as responses of models, are sent as texts: markup in them has no effect. Entering the block raises an
    `InputError` if wandb lacks a key, or cannot be reached.
    """

    def __init__(self, trackers: "Sequence[Tracker]") -> None:
        self._trackers, self._started = trackers, ExitStack()

    def __enter__(self) -> "Trackers":
        from accelerate import PartialState

        PartialState()  # which tells accelerate's trackers whether this is the main process
        with ExitStack() as started:
            for tracker in self._trackers:
                _start(tracker)
                started.callback(tracker.finish)
            self._started = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    def numbers(self, values: Mapping[str, float]) -> None:
        """Send numbers by name."""
        named = {printable(name): value for name, value in values.items()}
        for tracker in self._trackers:
            tracker.log(named)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send a table of numbers and texts; of more than `MOST_ROWS` rows, so many, spread evenly.

        Args:
            name: of the table.
            rows: one or more, with the same columns each.
        """
        shown = rows[:: -(-len(rows) // MOST_ROWS)]
        columns = list(shown[0])
        cells = [[printable(cell) if isinstance(cell, str) else cell for cell in row.values()] for row in shown]
        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                note = f"{len(shown)} of {len(rows)} rows\n\n"
                tracker.log({name: note + _markdown(columns, cells)})
            elif tracker.name == "wandb":
                tracker.log_table(name, columns=columns, data=cells)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                import trackio  # pyright: ignore[reportMissingImports]

                tracker.log({name: trackio.Table(columns=columns, data=cells)})

    def picture(self, name: str, png: bytes) -> None:
        """Send a picture, as a PNG file."""
        from matplotlib.image import imread

        pixels_HWC = (imread(BytesIO(png))[..., :3] * 255).round().astype("uint8")
        for tracker in self._trackers:
            if tracker.name == "trackio":
                import trackio  # pyright: ignore[reportMissingImports]

                tracker.log({name: trackio.Image(pixels_HWC)})
            else:
                layout: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels_HWC[None]}, **layout)  # pyright: ignore[reportAttributeAccessIssue]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [
        columns,
        ["---"] * len(columns),
        *([literal("" if cell is None else cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def trackers_of(
    services: Sequence[str], name: str, folder: Path, project: str = PROJECT, *, go_on: bool = False
) -> Trackers:
    """Return trackers of services; in other processes than the main one, of none.

    Args:
        services: some of `SERVICES`.
        name: of the run.
        folder: of TensorBoard's files.
        project: of the run.
        go_on: with the run of this name that this process has made before.
    """
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    hide_command_line()
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker("", folder),
        "wandb": lambda: WandBTracker(os.environ.get("WANDB_PROJECT", project), name=name),
        "trackio": lambda: TrackioTracker(project, name=name, resume="allow" if go_on else "never", embed=False),
    }
    return Trackers([makers[service]() for service in services] if is_main() else [])


def _start(tracker: "Tracker") -> None:
    if tracker.name != "wandb":
        tracker.start()
        return
    import wandb

    if wandb.run is not None:  # of a training, which this process still has open
        tracker.run = wandb.run  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        tracker.start()
    except wandb.Error as error:
        raise InputError(
            f"wandb takes no results: {first_line(error)};\n"
            "set WANDB_API_KEY, or WANDB_MODE=offline to keep them on this machine, and run the same command again"
        ) from error
