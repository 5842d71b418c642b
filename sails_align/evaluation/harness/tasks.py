"""Write, find and load tasks of lm-eval-harness: its own, the package's, and those in the user's folders."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sails_align.core.errors import InputError, first_line, root_cause
from sails_align.core.files import write_text
from sails_align.core.suggestions import suggestion

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

ROLLING = "loglikelihood_rolling"
MEAN = {"aggregation": "mean", "higher_is_better": True}
"""Of a metric of a task."""


def write_task(name: str, rows: Sequence[Mapping[str, Any]], folder: Path, *, chance: float, **config: Any) -> None:
    """Write the data and the YAML of a task that `find_tasks` finds in the folder.

    Without `config`, it is a multiple choice: an item has `prompt` (a user turn of the chat template), `choices`, and
    `answer`, the place of the right one.

    Args:
        name: of the task.
        rows: items.
        folder: where to write.
        chance: accuracy of guessing.
        config: entries of lm-eval's configuration of a task of another type.

    Raises:
        InputError: if the folder cannot be written.
    """
    data = folder.resolve() / f"{name}.jsonl"  # lm-eval's paths are relative to the working directory
    write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": [{"metric": "acc", **MEAN}]}
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "answer",
        "metadata": {"version": 1.0, "chance": chance},
        **(config or choice),
    }
    write_text(folder / f"{name}.yaml", yaml.safe_dump(whole, sort_keys=False))


def shuffled(prompt: str, choices: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """Return a multiple-choice item of choices of which the first one is right."""
    order = rng.sample(range(len(choices)), len(choices))
    return {"prompt": prompt, "choices": [choices[index] for index in order], "answer": order.index(0)}


def find_tasks(names: Sequence[str], include_paths: Sequence[str] = ()) -> "TaskManager":
    """Return lm-eval's task manager; its thousands of tasks (6 s) are indexed only if a name is not in the folders.

    Raises `InputError` if a folder is missing, or a name is unknown.
    """
    from lm_eval.tasks import TaskManager

    for folder in include_paths:
        if not Path(folder).is_dir():
            raise InputError(f"include_path is {folder}, which is no folder; give one with tasks in YAML files")
    own: list[str | Path] = list(include_paths)
    manager = TaskManager(include_path=own, include_defaults=False)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
        manager = TaskManager(include_path=own)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            hint = suggestion(name, manager.all_tasks) or "; `lm_eval ls tasks` lists them"
            raise InputError(f"there is no task {name!r}{hint}\nfor tasks of your own, give --include_path FOLDER")
    return manager


def load_tasks(manager: "TaskManager", names: Sequence[str]) -> tuple[list[Any], list["Task"]]:
    """Load tasks and groups, and all tasks in them, with their data.

    Raises `InputError` if one cannot be loaded, or runs the model's output as code.
    """
    names = list(dict.fromkeys(names))
    try:
        loaded: Any = manager.load(names)
    except ImportError as error:
        raise InputError(
            f"the tasks {', '.join(names)} need a package that is not installed: {error};\n"
            "install it (pip install 'lm-eval[...]' names the extras), or leave the task out"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"the tasks {', '.join(names)} cannot be loaded: {first_line(root_cause(error))}\n"
            "their data must be in the cache or the hub within reach: run this once with network (without "
            "HF_HUB_OFFLINE=1);\nfor tasks of your own, check --include_path and the YAML's dataset_path"
        ) from error
    tasks = list(loaded["tasks"].values())
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"the task {task.task_name} runs what the model writes as code on this machine; leave it out, or\n"
                "run it in a sandbox by lm_eval itself, with --confirm_run_unsafe_code"
            )
    in_groups = {name for children in loaded.get("group_map", {}).values() for name in children}
    groups = [group for name, group in loaded.get("groups", {}).items() if name not in in_groups]
    return [*groups, *(task for task in tasks if task.task_name not in in_groups)], tasks
