"""What evaluation adds to the backend and to the judge's server, side by side in one run.

    python benchmarks/eval_throughput.py [--turns 5] [--output FILE.json]
    .venv-vllm/bin/python benchmarks/eval_throughput.py --backend vllm     # where vLLM is installed

Reported: responses/s through the evaluation's backend and cache, as a ratio to the backend called bare, by turns;
verdicts/s of an LLM judge against a local server, as a ratio to what the server can give at that concurrency
(concurrency / latency); and seconds that a fully cached rerun of 5,000 verdicts takes after start-up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sails_align.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
N_RESPONSES, N_VERDICTS, CONCURRENCY, LATENCY = 512, 5000, 32, 0.1
TOKENS, BATCH = 24, 64


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "turns": values}


def conversations() -> list[list[dict[str, str]]]:
    """Requests of the testbed."""
    from sails_align.testbed.build import resolve_testbed
    from sails_align.testbed.prompts import request_prompts

    prompts = request_prompts(resolve_testbed(None), "testbed", N_RESPONSES // 4)
    return [list(prompt.messages) for prompt in prompts]


def responses(backend_name: str, turns: int, folder: Path) -> dict[str, Any]:
    """Ratio of responses/s: the evaluation's backend and cache / the backend bare."""
    from sails_align.evaluation.backends.make import in_process
    from sails_align.evaluation.cache import Cache
    from sails_align.evaluation.pipeline import respond
    from sails_align.evaluation.records import Prompt, Sampling
    from sails_align.models.resolve import resolve_model

    asked = conversations()
    prompts = [Prompt(str(n), tuple(messages), "harmful", "all") for n, messages in enumerate(asked)]
    spec = resolve_model("testbed", dtype="float32")
    sampling = Sampling(TOKENS)
    with closing(
        in_process(spec, backend_name, BATCH, max_model_len=128 if backend_name == "vllm" else None)
    ) as backend:
        list(backend.complete(asked[:BATCH], sampling))  # it loads the model when it is first asked
        bare = bare_hf(spec.base) if backend_name == "hf" else bare_vllm(backend)
        bare(asked[:BATCH])
        ratios, rates = [], []
        for turn in range(turns):

            def evaluate(turn: int = turn) -> None:
                cache = Cache(folder / f"cache-{turn}.sqlite")
                respond(backend, prompts, sampling, cache, progress=False)
                cache.close()

            order = [("ours", evaluate), ("bare", lambda: bare(asked))]
            spent = {name: seconds_of(work) for name, work in (order if turn % 2 else order[::-1])}
            ratios.append(spent["bare"] / spent["ours"])
            rates.append(len(asked) / spent["ours"])
    return {"ratio": summary(ratios), "responses_per_second": summary(rates), "n": len(asked)}


def bare_hf(path: str) -> Callable[[list[Any]], Any]:
    """transformers' generate over batches sorted by length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def generate(asked: list[Any]) -> list[str]:
        ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in asked]
        ids.sort(key=len)
        texts: list[str] = []
        for start in range(0, len(ids), BATCH):
            part = {"input_ids": ids[start : start + BATCH]}
            batch = tokenizer.pad(part, padding_side="left", return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(
                    **batch, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )
            texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    return generate


def bare_vllm(backend: Any) -> Callable[[list[Any]], Any]:
    """The same engine's chat, on all conversations at once."""
    from vllm import SamplingParams

    engine = backend._llm
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    return lambda asked: engine.chat(asked, sampling, use_tqdm=False)


@contextmanager
def judge_server() -> Iterator[str]:
    """The local server as a process of its own; gives its URL."""
    command = [sys.executable, str(ROOT / "benchmarks" / "judge_server.py"), "--latency", str(LATENCY)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def verdicts(turns: int, folder: Path) -> dict[str, Any]:
    """Ratio of verdicts/s to the server's limit, and seconds of a rerun that finds all in the cache."""
    from sails_align.evaluation.backends.openai import OpenAIBackend
    from sails_align.evaluation.cache import Cache
    from sails_align.evaluation.judges.llm import LlmJudge
    from sails_align.evaluation.pipeline import verdicts_of
    from sails_align.evaluation.records import Item, Prompt

    items = [
        Item(Prompt(str(n), ({"role": "user", "content": f"do thing {n}"},), "harmful", "all"), f"response {n}")
        for n in range(N_VERDICTS)
    ]
    ratios, cached = [], []
    with judge_server() as url:
        judge = LlmJudge(OpenAIBackend(url, "stub", concurrency=CONCURRENCY))
        for turn in range(turns):
            path = folder / f"verdicts-{turn}.sqlite"
            cache = Cache(path)
            spent = seconds_of(lambda cache=cache: verdicts_of(judge, "harm", items, cache, progress=False))
            cache.close()
            ratios.append(len(items) / spent / (CONCURRENCY / LATENCY))

            def rerun(path: Path = path) -> None:
                again = Cache(path)
                assert all(verdict.score for verdict in verdicts_of(judge, "harm", items, again, progress=False))
                again.close()

            cached.append(seconds_of(rerun))
        judge.close()
    return {"ratio_to_limit": summary(ratios), "cached_rerun_seconds": summary(cached), "n": len(items)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--verdict_turns", type=int, default=3)
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--output", type=Path, help="JSON file for the figures; other backends' in it are kept")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if args.output and args.output.is_file():
        result = json.loads(args.output.read_text())
    with tempfile.TemporaryDirectory() as name:
        result[args.backend] = responses(args.backend, args.turns, Path(name))
        if args.backend == "hf":
            result["judge"] = verdicts(args.verdict_turns, Path(name))
    for part, row in result.items():
        for measure, value in row.items():
            if isinstance(value, dict):
                spread = f"{value['min']:.3f} to {value['max']:.3f}, n={len(value['turns'])}"
                print(f"{part} {measure}: {value['median']:.3f} ({spread})")
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
