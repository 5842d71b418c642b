"""The steps of an evaluation: prompts -> responses -> verdicts.

With a cache, each result is kept as soon as it is there: nothing is paid for twice. `evaluate` puts the steps together.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from sails_align.core.artifacts import content_hash
from sails_align.core.progress import progress_bar
from sails_align.evaluation.cache import Cache
from sails_align.evaluation.records import Backend, Completion, Item, Judge, Prompt, Sampling, Task, Verdict

JUDGED_META = ("testbed", "request", "behavior", "context")
"""What judges read of a prompt's meta: the oracle, and HarmBench's classifier."""
Result = TypeVar("Result", Completion, Verdict)


@dataclass(frozen=True)
class Work(Generic[Result]):
    """Results to be had, one for each key; equal keys share one."""

    title: str
    keys: list[str]
    compute: Callable[[list[int]], Iterator[tuple[int, Result]]]
    """Of the items at some positions: position in that list, and result, as they are done."""
    read: Callable[[dict[str, Any]], Result]
    failed: Callable[[Result], bool]


def results_of(
    work: Work[Result], cache: Cache | None, *, retry_failed: bool = False, progress: bool = True
) -> list[Result]:
    """Return results in order: from the cache where they are in it, else computed and put there, one by one.

    Args:
        work: what is to be had.
        cache: of earlier results; None: there are none, and none are kept.
        retry_failed: compute those again that were failures.
        progress: show a bar.
    """
    found = {} if cache is None else {key: work.read(value) for key, value in cache.get(work.keys).items()}
    if retry_failed:
        found = {key: result for key, result in found.items() if not work.failed(result)}
    first_of = {key: index for index, key in reversed(list(enumerate(work.keys)))}
    missing = sorted(index for key, index in first_of.items() if key not in found)
    with progress_bar(progress and bool(missing)) as bar:
        task = bar.add_task(work.title, total=len(first_of), completed=len(first_of) - len(missing))
        for position, result in work.compute(missing) if missing else ():
            key = work.keys[missing[position]]
            if cache is not None:
                cache.put({key: asdict(result)})
            found[key] = result
            bar.advance(task)
    return [found[key] for key in work.keys]


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
    work = Work(
        "responses",
        [content_hash({**made_by, "messages": list(prompt.messages)}) for prompt in prompts],
        lambda missing: backend.complete([prompts[index].messages for index in missing], sampling),
        lambda value: Completion(**value),
        lambda completion: completion.text is None,
    )
    completions = results_of(work, cache, retry_failed=retry_failed, progress=progress)
    _tell_failures(completions)
    return completions


def _tell_failures(completions: Sequence[Completion]) -> None:
    """Say why there are no responses: verdicts tell only that there are none."""
    causes = Counter(
        completion.error or completion.finish_reason for completion in completions if completion.text is None
    )
    if causes:
        (cause, n), *others = causes.most_common()
        more = f"; {len(others)} other causes are in responses.jsonl" if others else ""
        print(f"no response to {causes.total()} of {len(completions)} prompts: {cause} ({n}){more}", file=sys.stderr)


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
    made_by = {"what": "verdict", "judge": judge.identity(task), "task": task}
    work = Work(
        title or f"{task} ({judge.name})",
        [content_hash({**made_by, "item": _json(item)}) for item in given],
        lambda missing: judge.judge(task, [given[index] for index in missing]),
        lambda value: Verdict(**value),
        lambda verdict: verdict.score is None,
    )
    verdicts = iter(results_of(work, cache, retry_failed=retry_failed, progress=progress))
    return [Verdict(None, "no response") if item is None else next(verdicts) for item in items]


def _json(item: Item) -> dict[str, Any]:
    """What of an item can decide a verdict: not what the prompt is called, nor how an attack on it was found."""
    prompt = item.prompt
    meta = {name: prompt.meta[name] for name in JUDGED_META if name in prompt.meta}
    return {
        "prompt": {"messages": list(prompt.messages), "kind": prompt.kind, "meta": meta},
        "response": item.response,
        "other": item.other,
    }
