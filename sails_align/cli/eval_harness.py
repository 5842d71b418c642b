"""The command `sails eval harness`: capability by lm-eval-harness, and the difference from the base model.

python eval/harness.py --model runs/mine --tasks testbed                        # an adapter against its base
python eval/harness.py --model google/gemma-2-2b-it --base google/gemma-2-2b --tasks mmlu,gsm8k --backend vllm

<output_dir>/metrics.json    each task's scores, the base's, and the differences with 95% intervals; all settings
<output_dir>/samples.jsonl   requests and responses of the model and the base
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sails_align.core.command_line import CommandLine
from sails_align.core.files import refuse_trained, work_folder
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.harness.report import show
from sails_align.evaluation.harness.run import measure_capability
from sails_align.evaluation.output import default_folder


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, run the model and its base, print. Return what is in `metrics.json`.

    Raises:
        InputError: for options, models or tasks that cannot be used.
    """
    (args,) = CommandLine.read(argv).parse([HarnessArguments], prog=prog)
    folder = refuse_trained(Path(args.output_dir or default_folder("harness", args.model)))
    with work_folder(folder):
        metrics = measure_capability(args, folder)
        show(metrics, args.model, folder)
    return metrics
