"""The comparison of models other than the testbed: a file that names the runs, and how they are evaluated.

model: google/gemma-2-9b
runs:
  base: {model: google/gemma-2-9b, options: {chat_template_path: recipes/templates/human_assistant.jinja}}
  sft-sails: {train: sft, config: recipes/configs/gemma-2-9b/sft_sails.yaml}
  rlhf: {model: google/gemma-2-9b-it, label: Gemma-2-9B-it}
launch: [--config_file, accelerate_configs/zero2.yaml]
evaluate:
  validation: {safety: {prompts: [...], judge: llm, ...}, helpfulness: {...}}
  test: {safety: {...}, helpfulness: {...}, harness: {...}}
out_of_distribution: hex-phi
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError
from sails_align.experiments.plan import RUNS, Evaluation, Part, Protocol, Run

KEYS = ("model", "runs", "launch", "evaluate", "in_distribution", "out_of_distribution")
"""Of the file, besides the options of `sails compare`."""
OF_RUN = ("model", "train", "config", "options", "label", "tuned")
NAME, LABEL = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,80}"), re.compile(r"(?!_)[\w .,:;()+/%'-]{1,80}")
SECRETS = ("hub_token", "push_to_hub_token")
OF_CELL = ("model", "base_model", "output_dir", "resume_from_checkpoint", "retry_unscored", "help")
"""Options of commands that a cell gives itself."""


def read_protocol(path: str, values: Mapping[str, Any]) -> tuple[tuple[Run, ...], Protocol]:
    """What a file says of the comparison, but for the options of `sails compare`.

    Raises:
        InputError: if something in it is not understood.
    """
    reader = _Reader(path)
    runs = tuple(reader.run(str(name), of) for name, of in reader.mapping("runs", values.get("runs")).items())
    if len({run.label for run in runs}) < len(runs):
        raise InputError(f"{path}: two runs have the same label; give each its own")
    evaluate = reader.mapping("evaluate", values.get("evaluate"))
    parts: tuple[Part, ...] = get_args(Part)
    known: tuple[Evaluation, ...] = get_args(Evaluation)
    reader.only("evaluate", evaluate, parts)
    found: list[tuple[Part, Evaluation, tuple[str, ...]]] = []
    for part in parts:
        of_part = reader.mapping(f"evaluate: {part}", evaluate.get(part))
        reader.only(f"evaluate: {part}", of_part, known)
        needed = known[:2] if part == "validation" else known[:1]
        if lacking := [name for name in needed if name not in of_part]:
            raise InputError(
                f"{path}: evaluate: {part} has no {lacking[0]} evaluation; learning rates are chosen by safety and "
                "helpfulness on the validation part, and safety is reported"
            )
        for name in known:
            if name in of_part:
                found.append((part, name, reader.options(f"evaluate: {part}: {name}", of_part[name], OF_CELL)))
    launch = values.get("launch") or []
    if not isinstance(launch, list):
        raise InputError(f"{path}: launch is {launch!r}, but it must be a list of options of accelerate launch")
    sets = {name: values[name] for name in ("in_distribution", "out_of_distribution") if values.get(name) is not None}
    named = {name: reader.text(name, value) for name, value in sets.items()}
    return runs, Protocol(reader.text("model", values.get("model")), tuple(found), tuple(map(str, launch)), **named)


@dataclass(frozen=True)
class _Reader:
    path: str

    def mapping(self, what: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            raise InputError(f"{self.path}: {what} is {value!r}, but it must be a mapping; docs/comparison.md has one")
        return value

    def text(self, what: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise InputError(f"{self.path}: {what} is {value!r}, but it must be a text; docs/comparison.md has one")
        return value

    def only(self, what: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for name in value:
            if name not in known:
                raise InputError(f"{self.path}: {what} has the unknown entry {name!r}; choose among {', '.join(known)}")

    def run(self, name: str, of: Any) -> Run:
        """A run by what it is: a model as it is, or a recipe."""
        what = f"runs: {name}"
        of = self.mapping(what, of)
        self.only(what, of, OF_RUN)
        label = str(of.get("label") or (RUNS[name].label if name in RUNS else name))
        if not NAME.fullmatch(name) or not LABEL.fullmatch(label):
            raise InputError(
                f"{self.path}: {what}: a name has letters, digits and ._- (80 at most), and a label letters, digits, "
                f"spaces and .,:;()+/%'-; this has {name!r} and {label!r}"
            )
        if ("model" in of) == ("train" in of):
            raise InputError(
                f"{self.path}: {what} has both or neither of `model` and `train`;\n"
                "give `model` for one that is evaluated as it is, or `train`, which is sft or dpo"
            )
        own = OF_CELL if "train" in of else ("model", "output_dir", "retry_unscored", "help")
        is_tuned = of.get("tuned", True)
        if not isinstance(is_tuned, bool):
            raise InputError(f"{self.path}: {what}: tuned is {is_tuned!r}, but it must be true or false")
        more = self.options(
            what, of.get("options") or {}, ("seed", "learning_rate", *own) if is_tuned else ("seed", *own)
        )
        if "model" in of:
            model = self.text(f"{what}: model", of["model"])
            return Run(name, label, "none", ("--model", model, *more), is_tuned=False, is_reference=True)
        if of["train"] not in ("sft", "dpo"):
            raise InputError(f"{self.path}: {what}: train is {of['train']!r}; choose sft or dpo")
        options: tuple[str, ...] = ()
        sha256 = ""
        if "config" in of:
            config = self.text(f"{what}: config", of["config"])
            if not Path(config).is_file():
                raise InputError(f"{self.path}: {what}: there is no file {config}; paths are from the working folder")
            options, sha256 = ("--config", config), file_hash(Path(config))
        return Run(name, label, of["train"], (*options, *more), is_tuned=is_tuned, config_sha256=sha256)

    def options(self, what: str, of: Any, own: tuple[str, ...]) -> tuple[str, ...]:
        """A mapping as options on a command line; `own` are those that must not be in it."""
        if of == {}:
            return ()
        values = self.mapping(what, of)
        for name, value in values.items():
            if name in SECRETS:
                raise InputError(
                    f"{self.path}: {what} has {name}, a secret; take it out, and use `hf auth login` or HF_TOKEN"
                )
            if name in own:
                raise InputError(f"{self.path}: {what} has {name}, which each cell sets itself; take it out")
            if value is None:
                raise InputError(f"{self.path}: {what}: {name} has no value; give one, or take it out")
        return tuple(word for name, value in values.items() for word in _words(name, value))


def _words(name: str, value: Any) -> Iterator[str]:
    yield f"--{name}"
    for item in value if isinstance(value, list) else [value]:
        yield json.dumps(item) if isinstance(item, bool | int | float | list | dict) else str(item)
