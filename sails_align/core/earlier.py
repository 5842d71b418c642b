"""Look at what an earlier command left in its output folder, so that other results are never replaced unasked.

<output_dir>/made_by.json   what decided the results there: the command, its options, and hashes of what they name
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import content_hash
from sails_align.core.errors import InputError
from sails_align.core.files import read_record, write_json
from sails_align.core.log import say
from sails_align.core.options import different, listed

RECORD_FILE = "made_by.json"
REMEDY = "choose another --output_dir, or replace it with --overwrite_output_dir true"


def check_earlier(
    folder: Path, identity: Mapping[str, Any], results: str, *, overwrite: bool, option: str = "--output_dir"
) -> bool:
    """Return whether a folder holds these very results, by what `write_record` wrote with them.

    Args:
        folder: the output folder.
        identity: all that decides the results: `command`, `options` by name, and hashes of what they name.
        results: name of the file that is written last. A folder with neither it nor a record holds nothing finished.
        overwrite: whether other results may be replaced.
        option: that names the folder.

    Raises:
        InputError: if the folder holds other results, and they may not be replaced.
    """
    if not any((folder / name).exists() for name in (results, RECORD_FILE)):
        return False
    earlier = read_record(folder / RECORD_FILE)
    found = differences(identity, earlier)
    if not found:
        return True
    if not overwrite:
        raise holds_other(f"{folder} holds other results", found, option)
    say(f"what {earlier.get('command', 'an earlier command')} left in {folder} is replaced")
    return False


def holds_other(what: str, found: Sequence[str], option: str = "--output_dir") -> InputError:
    """Return the error that refuses to replace something else: what it is, and what differs from what is asked for."""
    return InputError(f"{what} (different: {listed(found)});\n{remedy_of(option)}")


def remedy_of(option: str) -> str:
    """Return what to do about results that are not replaced, where an option names the folder or file."""
    return REMEDY.replace("--output_dir", option, 1)


def write_record(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write what decided the results, once they are there."""
    write_json(folder / RECORD_FILE, identity)


def differences(identity: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Return what differs between an identity and an earlier one: options by name, with both values.

    Parts that the identity lacks are not compared.
    """
    commands = {name: of["command"] for name, of in (("now", identity), ("earlier", earlier)) if "command" in of}
    if len(set(commands.values())) > 1:  # whose options are others
        return [f"command ({commands['earlier']}, now {commands['now']})"]
    if not earlier:
        return ["options, which were not recorded"]
    parts = [name for name in identity if name != "options"]
    found = [name for name in parts if content_hash(identity[name]) != content_hash(earlier.get(name))]
    return found + different(identity["options"], earlier.get("options") or {})
