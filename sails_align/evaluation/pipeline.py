"""The steps of an evaluation: prompts -> responses -> verdicts. `evaluate` joins them.

With a cache, each result is kept as soon as it is there.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from sails_align.core.artifacts import content_hash
from sails_align.core.progress import progress_bar
from sails_align.evaluation import reasoning
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.records import Backend, Completion, Item, Judge, Prompt, Sampling, Task, Verdict

JUDGED_META = ("testbed", "request", "behavior", "context")
"""What judges read of a prompt's meta: the oracle, and HarmBench's classifier."""
Result = TypeVar("Result", Completion, Verdict)


def _cached(
    kind: type[Result],
    title: str,
    keys: list[str],
    compute: Callable[[list[int]], Iterator[tuple[int, Result]]],
    cache: Cache | None,
    *,
    retry_failed: bool,
    progress: bool,
) -> list[Result]:
    """Return the results of all keys in order: from the cache, else computed and put there, one by one.

    Args:
        kind: of the results.
        title: of the progress bar.
        keys: content hashes; equal ones share one result.
        compute: takes indices of keys, and yields a position in that list and a result, as they are done.
        cache: of earlier results; None: there are none, and none are kept.
        retry_failed: compute failures again.
        progress: show a bar.
    """
    found = {} if cache is None else {key: kind(**value) for key, value in cache.get(keys).items()}
    if retry_failed:
        found = {key: result for key, result in found.items() if not result.failed}
    first_of = {key: index for index, key in reversed(list(enumerate(keys)))}
    missing = sorted(index for key, index in first_of.items() if key not in found)
    with progress_bar(progress and bool(missing)) as bar:
        task = bar.add_task(title, total=len(first_of), completed=len(first_of) - len(missing))
        for position, result in compute(missing) if missing else ():
            key = keys[missing[position]]
            if cache is not None:
                cache.put(key, asdict(result))
            found[key] = result
            bar.advance(task)
    return [found[key] for key in keys]


def respond(
    backend: Backend,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    cache: Cache | None = None,
    *,
    retry_failed: bool = False,
    progress: bool = True,
) -> list[Completion]:
    """Get a completion for each prompt."""
    made_by = {"what": "completion", "backend": backend.identity(), "sampling": asdict(sampling)}
    completions = _cached(
        Completion,
        "responses",
        [content_hash({**made_by, "messages": list(prompt.conversation)}) for prompt in prompts],
        lambda missing: backend.complete([prompts[index].conversation for index in missing], sampling),
        cache,
        retry_failed=retry_failed,
        progress=progress,
    )
    causes = Counter(completion.error or completion.finish_reason for completion in completions if completion.failed)
    if causes:  # verdicts say only that there is no response
        (cause, n), *others = causes.most_common()
        more = f"; {len(others)} other causes are in responses.jsonl" if others else ""
        print(f"no response to {causes.total()} of {len(completions)} prompts: {cause} ({n}){more}", file=sys.stderr)
    return reasoning.with_opening(completions)


def verdicts_of(
    judge: Judge,
    task: Task,
    items: Sequence[Item | None],
    cache: Cache | None = None,
    *,
    title: str | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> list[Verdict]:
    """Get a verdict on each item; None, where there is no response, is unscored. `title` is what the bar says."""
    given = [item for item in items if item is not None]
    made_by = {"what": "verdict", "judge": judge.identity(task), "task": task, "reasoning": reasoning.VERSION}
    verdicts = _cached(
        Verdict,
        title or f"{task} ({judge.name})",
        [content_hash({**made_by, "item": _json(item)}) for item in given],
        lambda missing: judge.judge(task, [given[index] for index in missing]),
        cache,
        retry_failed=retry_failed,
        progress=progress,
    )
    in_order = iter(verdicts)
    return [Verdict(None, "no response") if item is None else next(in_order) for item in items]


def _json(item: Item) -> dict[str, Any]:
    """Return what can decide a verdict: not what the prompt is called, nor how an attack on it was found."""
    prompt = item.prompt
    meta = {name: prompt.meta[name] for name in JUDGED_META if name in prompt.meta}
    return {
        "prompt": {"messages": list(prompt.messages), "kind": prompt.kind, "meta": meta},
        "response": item.response,
        "other": item.other,
    }
