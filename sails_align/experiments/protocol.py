"""Read the file that compares models other than the testbed: the runs, and how they are evaluated.

model: google/gemma-2-9b
runs:
  base: {model: google/gemma-2-9b, options: {chat_template_path: recipes/templates/human_assistant.jinja}}
  sft-sails: {train: sft, config: recipes/configs/gemma-2-9b/sft_sails.yaml}
  rlhf: {model: google/gemma-2-9b-it, label: Gemma-2-9B-it}
launch: [--config_file, accelerate_configs/zero2.yaml]
evaluate:
  validation: {safety: {prompts: [...], judge: llm, ...}, helpfulness: {...}}  # only if runs are tuned
  test: {safety: {...}, helpfulness: {...}, harness: {...}}
out_of_distribution: hex-phi
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from sails_align.core.errors import InputError
from sails_align.core.suggestions import did_you_mean, did_you_mean_path
from sails_align.experiments.contents import contents_hash
from sails_align.experiments.plan import RUNS, Evaluation, Part, Protocol, Run

OF_RUN = ("model", "train", "config", "options", "label", "tuned")
NAME, LABEL = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,80}"), re.compile(r"(?!_)[\w .,:;()+/%'-]{1,80}")
T = TypeVar("T")
SECRETS = ("hub_token", "push_to_hub_token")
OF_CELL = (
    *("model", "base_model", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "retry_unscored", "help"),
)
"""Options of commands that each cell sets itself."""


def read_protocol(path: str, values: Mapping[str, Any]) -> tuple[tuple[Run, ...], Protocol]:
    """Read the runs and the protocol from the values of a file.

    Raises `InputError` if something in it is not understood.
    """
    reader = _Reader(path)
    runs = tuple(reader.run(str(name), run) for name, run in reader.expect("runs", values.get("runs"), dict).items())
    if len({run.label for run in runs}) < len(runs):
        raise InputError(f"{path}: two runs have the same label; give each its own")
    launch = reader.expect("launch", values["launch"], list) if values.get("launch") else []
    sets = {
        name: reader.expect(name, values[name], str)
        for name in ("in_distribution", "out_of_distribution")
        if values.get(name) is not None
    }
    evaluate = tuple(reader.evaluations(values.get("evaluate")))
    launch, model = tuple(map(str, launch)), reader.expect("model", values.get("model"), str)
    hashes = {
        "launch_sha256": contents_hash(launch),
        "files_sha256": "".join(contents_hash(options) for _, _, options in evaluate),
    }
    return runs, Protocol(model, evaluate, launch, **hashes, **sets)


@dataclass(frozen=True)
class _Reader:
    path: str

    def expect(self, what: str, value: Any, kind: type[T]) -> T:
        """Return a value of the file; refuse an empty one, or one of another type."""
        if not isinstance(value, kind) or not value:
            called = {dict: "mapping", list: "list", str: "text"}[kind]
            raise InputError(f"{self.path}: {what} is {value!r}, but it must be a {called}; see docs/comparison.md")
        return value

    def mapping(self, what: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
        """Return a mapping; refuse unknown entries."""
        for name in self.expect(what, value, dict):
            if name not in known:
                raise InputError(f"{self.path}: {what} has the unknown entry {name!r}{did_you_mean(name, known)}")
        return value

    def evaluations(self, value: Any) -> Iterator[tuple[Part, Evaluation, tuple[str, ...]]]:
        """Yield the options of each evaluation, by part and kind."""
        parts, kinds = get_args(Part), get_args(Evaluation)
        evaluate = self.mapping("evaluate", value, parts)
        for part in parts:
            if part == "validation" and part not in evaluate:
                continue
            of_part = self.mapping(f"evaluate: {part}", evaluate.get(part), kinds)
            needed = kinds[:2] if part == "validation" else kinds[:1]
            if missing := [kind for kind in needed if kind not in of_part]:
                raise InputError(
                    f"{self.path}: evaluate: {part} has no {missing[0]} evaluation; learning rates are chosen by "
                    "safety and helpfulness on the validation part, and safety is reported"
                )
            for kind in kinds:
                if kind in of_part:
                    yield part, kind, self.options(f"evaluate: {part}: {kind}", of_part[kind], OF_CELL)

    def run(self, name: str, value: Any) -> Run:
        """Return a run: a model that is evaluated as it is, or a recipe."""
        what = f"runs: {name}"
        values = self.mapping(what, value, OF_RUN)
        label = str(values.get("label") or (RUNS[name].label if name in RUNS else name))
        if not NAME.fullmatch(name) or not LABEL.fullmatch(label):
            raise InputError(
                f"{self.path}: {what}: a name has letters, digits and ._- (80 at most), and a label letters, digits, "
                f"spaces and .,:;()+/%'-; this has {name!r} and {label!r}"
            )
        if ("model" in values) == ("train" in values):
            raise InputError(
                f"{self.path}: {what} has both or neither of `model` and `train`;\n"
                "give `model` for one that is evaluated as it is, or `train`, which is sft or dpo"
            )
        is_tuned = values.get("tuned", True)
        if not isinstance(is_tuned, bool):
            raise InputError(f"{self.path}: {what}: tuned is {is_tuned!r}, but it must be true or false")
        of_training = () if "train" in values else ("base_model", "resume_from_checkpoint")
        own = tuple(option for option in OF_CELL if option not in of_training)
        own = ("seed", "learning_rate", *own) if is_tuned else ("seed", *own)
        options = self.options(what, values.get("options") or {}, own)
        if "model" in values:
            model = self.expect(f"{what}: model", values["model"], str)
            options, is_tuned = ("--model", model, *options), False
            return Run(name, label, "none", options, is_tuned, True, contents_hash(options))
        if values["train"] not in ("sft", "dpo"):
            raise InputError(
                f"{self.path}: {what}: train is {values['train']!r}{did_you_mean(str(values['train']), ('sft', 'dpo'))}"
            )
        if "config" in values:
            config = self.expect(f"{what}: config", values["config"], str)
            if not Path(config).is_file():
                hint = did_you_mean_path(config) or "; paths are from the working folder"
                raise InputError(f"{self.path}: {what}: there is no file {config}{hint}")
            options = ("--config", config, *options)
        return Run(name, label, values["train"], options, is_tuned=is_tuned, files_sha256=contents_hash(options))

    def options(self, what: str, value: Any, own: tuple[str, ...]) -> tuple[str, ...]:
        """Return a mapping as words of a command line; refuse the options in `own`."""
        words = []
        for spelled, option in self.expect(what, value, dict).items() if value != {} else ():
            name = str(spelled).replace("-", "_")  # the parser knows both spellings
            if name in SECRETS:
                raise InputError(
                    f"{self.path}: {what} has {name}, a secret; take it out, and use `hf auth login` or HF_TOKEN"
                )
            if name in own:
                raise InputError(f"{self.path}: {what} has {name}, which each cell sets itself; take it out")
            if option is None:
                raise InputError(f"{self.path}: {what}: {name} has no value; give one, or take it out")
            words.append(f"--{name}")
            for item in option if isinstance(option, list) else [option]:
                words.append(json.dumps(item) if isinstance(item, bool | int | float | list | dict) else str(item))
        return tuple(words)
