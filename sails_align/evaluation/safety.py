"""The command `sails eval safety`: what a model says to harmful requests, and to harmless ones that look harmful.

python eval/safety.py --model runs/mine --prompts testbed
python eval/safety.py --model google/gemma-2-2b-it --prompts hex-phi xstest --judge llm --judge_model ... --backend vllm

<output_dir>/responses.jsonl   what was asked and answered
<output_dir>/verdicts.jsonl    each judge's verdict on each response, and their vote
<output_dir>/metrics.json      rates with intervals, by category and by judge; agreement; what decided them
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from sails_align.core.command_line import CommandLine
from sails_align.core.files import work_folder
from sails_align.evaluation.backends.make import find_spec, make_backend
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.evaluate import SAFETY, evaluate
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.judges.panel import fail_if_unscored
from sails_align.evaluation.options import PromptArguments, ResponseArguments, RunArguments
from sails_align.evaluation.output import cache_file, output_folder
from sails_align.evaluation.prompts.load import load_all
from sails_align.evaluation.tables import show_rates
from sails_align.steering import hook_of
from sails_align.steering.options import SteeringOptions


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> Mapping[str, Any]:
    """Parse, respond, judge, write. Returns what is in `metrics.json`.

    Raises:
        InputError: for options, a model, prompts or a judge that cannot be used.
        SystemExit: with code 1 if more than `--max_unscored` of the verdicts are unscored.
    """
    line = CommandLine.read(argv)
    classes = [ResponseArguments, PromptArguments, JudgeArguments, RunArguments, SteeringOptions]
    how, asked, who, run, steering = line.parse(classes, prog=prog)
    folder = output_folder(run, "safety", how.model)
    with work_folder(folder), closing(Cache(cache_file(run))) as cache:
        spec, prompts = find_spec(how), load_all(asked, how.seed, how.system_prompt)
        judges = make_judges(who, prompts)
        result = evaluate(
            prompts,
            make_backend(how, spec, prompts, hook_of(steering)),
            judges,
            tasks=SAFETY,
            sampling=how.sampling(prompts),
            cache=cache,
            folder=folder,
            provenance={"prompts": {"sets": asked.prompts, "n": len(prompts), "part": asked.part}},
            retry_failed=run.retry_unscored,
            progress=run.progress,
        )
        show_rates(result.metrics, f"Safety of {how.model}", folder)
    fail_if_unscored(result.metrics["unscored"], run.max_unscored)
    return result.metrics
