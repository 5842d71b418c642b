"""Read TensorBoard's event files."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Events:
    """What a folder of event files, and the folders in it, hold."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.rglob("events.out.tfevents.*"))
        self._read = [EventAccumulator(str(file), size_guidance={"tensors": 0, "images": 0}).Reload() for file in files]

    def scalars(self) -> dict[str, dict[int, float]]:
        """Values by name and step."""
        found: dict[str, dict[int, float]] = {}
        for read in self._read:
            for name in read.Tags()["scalars"]:
                found.setdefault(name, {}).update({event.step: event.value for event in read.Scalars(name)})
        return found

    def texts(self) -> dict[str, str]:
        """The last text by name, as it was sent: Markdown."""
        return {
            name.removesuffix("/text_summary"): read.Tensors(name)[-1].tensor_proto.string_val[0].decode()
            for read in self._read
            for name in read.Tags()["tensors"]
        }

    def images(self) -> dict[str, bytes]:
        """The last picture by name, as a PNG file."""
        return {
            name: read.Images(name)[-1].encoded_image_string for read in self._read for name in read.Tags()["images"]
        }
