"""The command `sails check-adapter`: check whether vLLM can serve an adapter, and print the command."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sails_align.core.command_line import CommandLine
from sails_align.core.options import option


@dataclass(frozen=True)
class AdapterOptions:
    """The adapter."""

    run: Path = field(
        metadata={"help": "Folder of a finished run, or any folder with a LoRA adapter.", "positional": True}
    )
    base_model: str | None = option(None, "Its base model, if that has moved since training.")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print the problems and the command. Ends with exit code 1 if vLLM cannot serve the adapter."""
    (options,) = CommandLine.read(argv).parse([AdapterOptions], prog=prog)
    from sails_align.evaluation.backends.serving import serve_command, serving_report
    from sails_align.models.adapters import load_base_config, read_adapter
    from sails_align.models.spec import model_path

    adapter = read_adapter(options.run)
    base_model, base_config = load_base_config(adapter, model_path(options.base_model) if options.base_model else None)
    problems = serving_report(options.run, base_config)
    print(f"adapter   {options.run}/ (rank {adapter.config.r}, {len(adapter.tensors)} tensors), for {base_model}")
    for problem in problems:
        print(f"{'problem' if problem.blocking else 'note':<10}{problem.what}\n{'':<10}-> {problem.remedy}")
    if any(problem.blocking for problem in problems):
        print("vLLM cannot serve it as it is")
        raise SystemExit(1)
    print(f"vLLM can serve it:\n{serve_command(adapter, base_model)}")
