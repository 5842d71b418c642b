"""The comparison of models that are no testbed: a file that names the runs, and how they are evaluated.

model: google/gemma-2-9b
runs:
  base: {model: google/gemma-2-9b, options: {chat_template_path: recipes/templates/human_assistant.jinja}}
  sft-sails: {train: sft, config: recipes/configs/gemma-2-9b/sft_sails.yaml}
  rlhf: {model: google/gemma-2-9b-it, label: Gemma-2-9B-it}
launch: [--config_file, accelerate_configs/zero3.yaml]
evaluate:
  validation: {safety: {prompts: [...], judge: llm, ...}}
  test: {safety: {...}, helpfulness: {...}, harness: {...}}
out_of_distribution: hex-phi
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sails_align.artifacts import file_hash
from sails_align.comparison.plan import RUNS, Kind, Part, Protocol, Run
from sails_align.errors import InputError

KEYS = ("model", "runs", "launch", "evaluate", "in_distribution", "out_of_distribution")
"""Of the file, besides the options of `sails compare`."""
OF_RUN = ("model", "train", "config", "options", "label", "tuned")


def read_protocol(path: str, values: Mapping[str, Any]) -> tuple[tuple[Run, ...], Protocol]:
    """What a file says of the comparison, but for the options of `sails compare`.

    Raises:
        InputError: if something in it is not understood.
    """
    reader = _Reader(path)
    runs = tuple(reader.run(str(name), of) for name, of in reader.mapping("runs", values["runs"]).items())
    evaluate = reader.mapping("evaluate", values.get("evaluate"))
    reader.only("evaluate", evaluate, get_args(Part))
    found: list[tuple[Part, Kind, tuple[str, ...]]] = []
    parts: tuple[Part, ...] = get_args(Part)
    for part in parts:
        kinds = reader.mapping(f"evaluate: {part}", evaluate.get(part))
        reader.only(f"evaluate: {part}", kinds, get_args(Kind))
        if "safety" not in kinds:
            raise InputError(f"{path}: evaluate: {part} has no safety evaluation; learning rates are chosen by it")
        known: tuple[Kind, ...] = get_args(Kind)
        for kind in known:
            if kind in kinds:
                found.append((part, kind, reader.options(f"evaluate: {part}: {kind}", kinds[kind])))
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
        if "/" in name:
            raise InputError(f"{self.path}: {what}: the name must not have a slash, which parts names of cells")
        if ("model" in of) == ("train" in of):
            raise InputError(
                f"{self.path}: {what} must have either `model`, evaluated as it is, or `train`: sft or dpo"
            )
        more = self.options(what, of.get("options") or {})
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
        return Run(
            name, label, of["train"], (*options, *more), is_tuned=bool(of.get("tuned", True)), config_sha256=sha256
        )

    def options(self, what: str, of: Any) -> tuple[str, ...]:
        """A mapping as options on a command line."""
        if of == {}:
            return ()
        return tuple(word for name, value in self.mapping(what, of).items() for word in _words(name, value))


def _words(name: str, value: Any) -> Iterator[str]:
    yield f"--{name}"
    for item in value if isinstance(value, list) else [value]:
        yield item if isinstance(item, str) else json.dumps(item)
