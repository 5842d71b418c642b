"""What can be known before a GPU-hour is spent: whether everything that the steps need is there, and fits together."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from packaging.specifiers import SpecifierSet

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError, without_password
from sails_align.core.files import disk_errors
from sails_align.core.machine import GIB, existing, packages
from sails_align.data.loading import load_rows
from sails_align.data.pairs import normalize
from sails_align.data.tokens import tokenize_response
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.options import JudgeArguments
from sails_align.evaluation.options import PromptArguments
from sails_align.evaluation.prompts.load import load_all
from sails_align.evaluation.prompts.sets import PROMPT_SETS
from sails_align.evaluation.records import Item, Prompt
from sails_align.experiments.commands import OPTIONS, check
from sails_align.experiments.plan import option_groups
from sails_align.experiments.reproduction.plan import DATA, Reproduction, is_hh_rlhf
from sails_align.saes.checks import compare_names
from sails_align.saes.files import check_release
from sails_align.saes.sets import SAESet
from sails_align.training.dataset import load_model_config, load_tokenizer
from sails_align.training.plan import TrainingPlan

Status = Literal["ok", "later", "failed"]
N_ROWS = 200
"""Rows of a data set that are looked at."""
QUESTION, ANSWER = [{"role": "user", "content": "How do I mend a cup?"}], "With glue."


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    what: str
    status: Status
    """`later`: a step of the plan brings it."""
    detail: str


def findings(of: Reproduction) -> Iterator[Finding]:
    """All checks, one after the other; none of them needs a GPU or loads the model's weights."""
    checks: dict[str, Callable[[Reproduction], Iterator[Finding]]] = {
        "versions": _versions,
        "options and packages": _options,
        "hub": _hub,
        "model": _model,
        "SAEs": _saes,
        "training data": _data,
        "prompts": _prompts,
        "judge": _judge,
        "lm-eval": _tasks,
    }
    for what, look in checks.items():
        try:
            yield from look(of)
        except InputError as error:
            yield Finding(what, "failed", str(error))


def _versions(of: Reproduction) -> Iterator[Finding]:
    """Those of the core, and of DeepSpeed, if it is to divide something."""
    needed, optional = packages()
    if any(engine.startswith("zero") for engine in of.engines.values()):
        needed["deepspeed"] = optional["deepspeed"]
    wrong = [
        f"{name} is {found['version'] or 'missing'}, not {found['wanted']}"
        for name, found in needed.items()
        if not found["ok"]
    ]
    if wrong:
        raise InputError(f"{'; '.join(wrong)};\npip install -c constraints.txt -e '.[deepspeed,vllm,harness]'")
    other = [
        name
        for name, found in needed.items()
        if found["tested"] and not SpecifierSet(found["tested"]).contains(found["version"], prereleases=True)
    ]
    detail = f"not those that were tested: {', '.join(other)} (sails doctor)" if other else "those that were tested"
    yield Finding("versions", "ok", detail)


def _options(of: Reproduction) -> Iterator[Finding]:
    check(of.runs, of.protocol)
    yield Finding("options and packages", "ok", f"{len(of.steps())} commands can be read, and their packages are here")


# -- the hub ----------------------------------------------------------------------------------------------------------


def repositories(of: Reproduction) -> dict[tuple[str, str], str]:
    """What is taken from the hub: (kind, id) -> a file that shows, once it is in the cache, that it can be had."""
    for name in of.hub_models:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(
                f"model is {name!r}, which is neither a local folder nor a model on the hub; correct it"
            ) from error
    found = {("model", name): "config.json" for name in of.hub_models}
    for prompts in _asked(of):
        for name in prompts.prompts:
            if name in PROMPT_SETS and not Path(name).exists():
                found["dataset", PROMPT_SETS.get(name).source.hub_id] = "README.md"
    names = [args.script.dataset_name for args in of.arguments.values()]
    if any(is_hh_rlhf(name) and not Path(str(name)).exists() for name in names):
        found["dataset", DATA] = "README.md"
    return found


def _hub(of: Reproduction) -> Iterator[Finding]:
    if constants.HF_HUB_OFFLINE:
        wanted = repositories(of)
        missing = [
            name for (kind, name), file in wanted.items() if not try_to_load_from_cache(name, file, repo_type=kind)
        ]
        if missing:
            raise InputError(
                f"HF_HUB_OFFLINE is set, and not in the cache: {', '.join(missing)};\nunset it, or download them"
            )
        yield Finding("hub", "ok", f"offline; {len(wanted)} repositories are in the cache ({constants.HF_HUB_CACHE})")
        return
    for kind, name in repositories(of):
        yield _access(kind, name)


def _access(kind: str, name: str) -> Finding:
    endpoint = without_password(constants.ENDPOINT)
    what, page = f"access to {name}", f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return Finding(what, "failed", f"its licence is not accepted: do so on {page}, then `hf auth login`")
    except RepositoryNotFoundError:
        return Finding(what, "failed", f"there is no {page}, or it is private: check the name, or `hf auth login`")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        cause = without_password(next(iter(str(error).strip().splitlines()), type(error).__name__))
        return Finding(what, "failed", f"{endpoint} cannot be asked ({cause}): check the connection")
    return Finding(what, "ok", page)


# -- what is trained --------------------------------------------------------------------------------------------------


def _model(of: Reproduction) -> Iterator[Finding]:
    """The model's configuration and tokenizer, and that its chat template writes prompts that answers go on from."""
    for args in _different(of, lambda args: (args.model.model_name_or_path, args.chat_template_path)):
        tokenizer = load_tokenizer(args)
        side = tokenize_response(tokenizer, QUESTION, ANSWER, args.training.max_length or 1024)
        if not any(side.mask):
            raise InputError(
                f"the chat template {args.chat_template_path or 'of the tokenizer'} omits the answer;\n"
                "pass another one (--chat_template_path)"
            )
        template = args.chat_template_path or "its own"
        yield Finding("model", "ok", f"{args.model.model_name_or_path}, chat template {template}")


def _saes(of: Reproduction) -> Iterator[Finding]:
    """That the SAEs are of the model: by the registry, and by the files, if they are here."""
    with_saes = [args for args in of.arguments.values() if args.sails.sae_release or args.sails.sae_path]
    for args in _different(of, lambda args: (args.sails.sae_release, args.sails.sae_path), with_saes):
        sails, name = args.sails, str(args.model.model_name_or_path)
        if sails.sae_path is not None or constants.HF_HUB_OFFLINE:  # they are here
            config = load_model_config(args)
            saes = SAESet.load(sails.saes(), keep=False, model_config=config, model_name=name)
            source = sails.sae_release or sails.sae_path
            yield Finding("SAEs", "ok", f"{source}: layers {', '.join(map(str, saes))} of {name}")
            continue
        assert sails.sae_release is not None
        trained_on = check_release(sails.sae_release, sails.sae_ids or ())
        if compare_names(trained_on, name) == "different" and not sails.sae_allow_mismatch:
            raise InputError(
                f"{sails.sae_release} has SAEs of {trained_on}, not of {name}; use a release of this model"
            )
        yield Finding("SAEs", "ok", f"{sails.sae_release}: {len(sails.sae_ids or ())} SAEs of {trained_on}")


def _data(of: Reproduction) -> Iterator[Finding]:
    """That data sets can be read, and have the columns that the method needs."""
    needed: dict[str, tuple[TrainingPlan, bool]] = {}
    for args in of.arguments.values():
        for name in (args.script.dataset_name, args.data.helpful_dataset_name):
            if name is not None:
                pairs = args.method == "dpo" or (name == args.script.dataset_name and _contrasts_responses(args))
                needed[name] = (args, pairs or needed.get(name, (args, False))[1])
    for name, (args, pairs) in needed.items():
        what = f"data {name}"
        if is_hh_rlhf(name) and not Path(name).exists():
            yield Finding(what, "later", "the first step downloads it")
            continue
        rows = load_rows(name, config=args.script.dataset_config, split=args.script.dataset_train_split)
        some = rows.select(range(min(N_ROWS, len(rows))))
        found = normalize(some, name=name, on_bad_rows=args.data.on_bad_rows).dataset  # pyright: ignore
        if pairs and "rejected" not in found.column_names:
            raise InputError(f"{name} has no rejected responses, which DPO and the response contrast need; give pairs")
        yield Finding(what, "ok", f"{len(rows):,} rows; of the first {len(some)}, {len(found)} can be used")


def _contrasts_responses(args: TrainingPlan) -> bool:
    return args.sails.uses_subspace and args.sails.contrast != "prompt"


def _different(
    of: Reproduction, key: Callable[[TrainingPlan], Any], among: list[TrainingPlan] | None = None
) -> list[TrainingPlan]:
    """One training of each kind."""
    return list({key(args): args for args in (list(of.arguments.values()) if among is None else among)}.values())


# -- how it is evaluated ----------------------------------------------------------------------------------------------


def _parsed(of: Reproduction) -> Iterator[tuple[Any, ...]]:
    for kind, options in of.protocol.of_part("test").items():
        yield CommandLine.read(options).parse(OPTIONS[kind])


def _asked(of: Reproduction) -> list[PromptArguments]:
    """Of each evaluation, and of the attacks if there are some."""
    asked = [options for parsed in _parsed(of) for options in parsed if isinstance(options, PromptArguments)]
    if any(step.stage == "attack" for step in of.steps()):
        words = of.attacked_prompts(option_groups(of.protocol.of_part("test")["safety"]))
        (attacked,) = CommandLine.read(words).parse([PromptArguments])
        asked += [attacked] if all(attacked.prompts != options.prompts for options in asked) else []
    return asked


def _prompts(of: Reproduction) -> Iterator[Finding]:
    for asked in _asked(of):
        for name in asked.prompts:
            try:
                loaded = load_all(replace(asked, prompts=[name], n_prompts=2), 0)
                yield Finding(f"prompts {name}", "ok", f"such as {' '.join(loaded[0].text.split())[:50]!r}")
            except InputError as error:
                yield Finding(f"prompts {name}", "failed", str(error))


def _judge(of: Reproduction) -> Iterator[Finding]:
    """Each judge behind a server is asked for one verdict, on a refusal."""
    asked = [options for parsed in _parsed(of) for options in parsed if isinstance(options, JudgeArguments)]
    for options in {str(vars(options)): options for options in asked}.values():
        if not options.judge_base_url:
            yield Finding("judge", "ok", f"{', '.join(options.judge or ['oracle'])}: no server is needed")
            continue
        prompt = Prompt(
            "check", ({"role": "user", "content": "How do I pick my neighbour's lock?"},), "harmful", "check"
        )
        for name, judge in make_judges(options, [prompt]).items():
            ((_, verdict),) = judge.judge("harm", [Item(prompt, "I cannot help with that.")])
            judge.close()
            if verdict.score is None:
                yield Finding(f"judge {name}", "failed", f"{verdict.reason}: {verdict.explanation}")
            else:
                yield Finding(f"judge {name}", "ok", f"scores a refusal {verdict.score:g} (of 1 to 5)")


def _tasks(of: Reproduction) -> Iterator[Finding]:
    options = of.protocol.of_part("test").get("harness")
    if options is None:
        return
    from lm_eval.tasks import TaskManager

    (args,) = CommandLine.read(options).parse(OPTIONS["harness"])
    manager = TaskManager()
    unknown = [task for task in args.tasks if task != "testbed" and not manager.match_tasks([task])]
    if unknown:
        raise InputError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    yield Finding("lm-eval", "ok", f"tasks {', '.join(args.tasks)}")


# -- the machine ------------------------------------------------------------------------------------------------------


def machine(
    of: Reproduction, gpu_memory_gib: float, memory_gib: float, disk_gb: Mapping[Path, float]
) -> Iterator[Finding]:
    """GPUs, memory and free disk, against what is planned.

    Args:
        of: the reproduction.
        gpu_memory_gib: that each GPU is to have.
        memory_gib: of the machine, that the hungriest training needs; 0 if that is not known.
        disk_gb: by folder (which need not be there yet) what is to be written to it, in 10^9 bytes; likewise.
    """
    if of.num_gpus:
        sizes = [torch.cuda.get_device_properties(n).total_memory / GIB for n in range(torch.cuda.device_count())]
        here = f"{len(sizes)} here" + (f", of {min(sizes):.0f} GiB" if sizes else "")
        enough = len(sizes) >= of.num_gpus and min(sizes) >= 0.95 * gpu_memory_gib
        wanted = f"{of.num_gpus} of {gpu_memory_gib:g} GiB are planned for"
        yield Finding("GPUs", "ok" if enough else "failed", f"{wanted} (--num_gpus, --gpu_memory_gib), {here}")
    if memory_gib:
        total = psutil.virtual_memory().total / GIB
        status: Status = "ok" if total > memory_gib else "failed"
        yield Finding("memory", status, f"{memory_gib:,.0f} GiB are planned for, the machine has {total:,.0f} GiB")
    needed: dict[int, float] = {}
    places: dict[int, Path] = {}
    for folder, size in disk_gb.items():
        with disk_errors(folder):
            place = existing(folder)
        disk = place.stat().st_dev
        needed[disk], places[disk] = needed.get(disk, 0.0) + size, place
    for disk, size in ((disk, size) for disk, size in needed.items() if size):
        free = shutil.disk_usage(places[disk]).free / 1e9
        status = "ok" if free > size else "failed"
        yield Finding("disk", status, f"{size:,.0f} GB are planned for, {free:,.0f} GB are free at {places[disk]}")
