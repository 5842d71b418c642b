"""Check, before a GPU-hour is spent, that everything that the steps need is there and fits together."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from packaging.specifiers import SpecifierSet

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError, first_line, without_password
from sails_align.core.files import disk_errors
from sails_align.core.machine import devices, environment, existing, package_problems, packages
from sails_align.data.loading import load_rows
from sails_align.data.messages import user
from sails_align.data.pairs import normalize
from sails_align.data.tokens import tokenize_response
from sails_align.evaluation.attacks.parse import parse as parse_attack
from sails_align.evaluation.compared import BASE
from sails_align.evaluation.harness import TASK_MAKERS
from sails_align.evaluation.harness.tasks import find_tasks
from sails_align.evaluation.judges.make import make_judges
from sails_align.evaluation.judges.options import HERE, JudgeArguments
from sails_align.evaluation.options import DivergenceArguments, PromptArguments, ReferenceArguments
from sails_align.evaluation.prompts.load import load_all
from sails_align.evaluation.prompts.sets import find_set
from sails_align.evaluation.records import Item, Prompt
from sails_align.evaluation.reference import IN_SET
from sails_align.experiments.commands import OPTIONS, check
from sails_align.experiments.limits import Limits
from sails_align.experiments.reproduction.plan import DATA, Reproduction, is_hh_rlhf
from sails_align.export.hub import HubConnectionError
from sails_align.saes.checks import compare_names
from sails_align.saes.files import check_release
from sails_align.saes.sets import SAESet
from sails_align.subspace.options import Method
from sails_align.testbed.build import is_testbed
from sails_align.training import run as align
from sails_align.training.dataset import load_model_config, load_tokenizer
from sails_align.training.estimate import as_on_gpu
from sails_align.training.plan import TrainingPlan

Status = Literal["ok", "later", "failed"]
N_ROWS = 200
"""Rows of a data set that are checked."""
SCRIPTS: Mapping[str, Method] = {"recipes/sft_sails.py": "sft", "recipes/dpo_sails.py": "dpo"}
QUESTION, ANSWER = [user("How do I mend a cup?")], "With glue."


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    what: str
    status: Status
    """`later`: a step of the plan brings it."""
    detail: str


def findings(plan: Reproduction) -> Iterator[Finding]:
    """Run all checks but those of the machine; none needs a GPU or loads the model's weights."""
    checks: dict[str, Callable[[Reproduction], Iterator[Finding]]] = {
        "versions": _versions,
        "options and packages": _options,
        "evaluations": _limits,
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
            yield from look(plan)
        except InputError as error:
            yield Finding(what, "failed", str(error))


def _versions(plan: Reproduction) -> Iterator[Finding]:
    """Check the versions of the core's packages, and of DeepSpeed if an engine needs it."""
    needed, optional = packages()
    if any(engine.startswith("zero") for engine in plan.engines.values()):
        needed["deepspeed"] = optional["deepspeed"]
    if problems := package_problems(needed):
        raise InputError("\n".join(problems))
    untested = [
        name
        for name, found in needed.items()
        if found["tested"] and not SpecifierSet(found["tested"]).contains(found["version"], prereleases=True)
    ]
    yield Finding("versions", "ok", f"untested: {', '.join(untested)} (sails doctor)" if untested else "as tested")


def _options(plan: Reproduction) -> Iterator[Finding]:
    """Read the command of each step as the step will read it."""
    check(plan.runs, plan.protocol)
    jobs = plan.jobs()
    for job in jobs:
        try:
            _read_command(job.work, on_gpu=plan.num_gpus > 0)
        except InputError as error:
            raise InputError(f"the step {job.name} cannot be run: {error}") from error
    yield Finding("options and packages", "ok", f"{len(jobs)} commands are valid; their packages are installed")


def _read_command(words: Any, *, on_gpu: bool) -> None:
    """Read the options of a step's command; `hf` and `accelerate` must be installed."""
    program, *options = words
    if program != "sails" and shutil.which(program) is None:
        raise InputError(f"there is no command {program}; activate the environment that sails-align is installed in")
    if program == "hf":
        return
    if program == "sails" and options[0] in ("eval", "attack"):
        kind = options[1]
        if options[0] == "attack":
            parse_attack(options[1:], "sails attack")
        else:
            CommandLine.read(options[2:]).parse(OPTIONS[kind])
        return
    script = next(place for place, word in enumerate(words) if word in ("discover", "sft", "dpo") or word in SCRIPTS)
    method = SCRIPTS.get(words[script]) or ("dpo" if words[script] == "dpo" else "sft")
    own = words[script + 1 :]
    align.parse(method, as_on_gpu(own) if on_gpu else list(own))


def _limits(plan: Reproduction) -> Iterator[Finding]:
    """Check that the evaluations can take the models that will be trained."""
    limits = Limits(plan.protocol, plan.arguments, plan.config_of, plan.num_gpus > 0, min(1, plan.num_gpus))
    n = limits.check(plan.runs, ["test"])
    yield Finding("evaluations", "ok", f"{n} can be done of the models that will be trained")


# -- the hub ----------------------------------------------------------------------------------------------------------


def repositories(plan: Reproduction) -> dict[tuple[str, str], str]:
    """Return what is taken from the hub: (kind, id) -> a file of it that is in the cache if it was downloaded.

    Raises `InputError` if a model is neither a local folder nor can be one on the hub.
    """
    for name in plan.hub_models:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(
                f"model is {name!r}, which is neither a local folder nor a model on the hub; correct it"
            ) from error
    found = {("model", name): "config.json" for name in (*plan.hub_models, *other_models(plan))}
    for prompts in _asked(plan):
        for name in prompts.prompts:
            known = find_set(name)
            if known is not None and known.source.hub_id is not None:
                found["dataset", known.source.hub_id] = "README.md"
    names = [args.script.dataset_name for args in plan.arguments.values()]
    if any(is_hh_rlhf(name) and not Path(str(name)).exists() for name in names):
        found["dataset", DATA] = "README.md"
    return found


def other_models(plan: Reproduction) -> Iterator[str]:
    """Yield the models from the hub that answers are compared with, and judges that no server runs."""
    given = [options.reference for of in (ReferenceArguments, DivergenceArguments) for options in _parsed(plan, of)]
    named = [name for name in given if name != IN_SET]
    named += [options.base for options in _parsed(plan, DivergenceArguments) if options.base != BASE]
    for who in _parsed(plan, JudgeArguments):
        models, urls = who.judge_model or [], who.judge_base_url or [HERE]
        urls = urls * len(models) if len(urls) == 1 else urls
        named += [model for model, url in zip(models, urls, strict=True) if url == HERE]
    yield from (str(name) for name in named if name and not Path(name).exists() and not is_testbed(name))


def _hub(plan: Reproduction) -> Iterator[Finding]:
    wanted = repositories(plan)
    if not constants.HF_HUB_OFFLINE:
        for kind, name in wanted:
            yield _access(kind, name)
        return
    missing = [name for (kind, name), file in wanted.items() if not try_to_load_from_cache(name, file, repo_type=kind)]
    if missing:
        raise InputError(
            f"HF_HUB_OFFLINE is set, and not in the cache: {', '.join(missing)};\nunset it, or download them"
        )
    yield Finding("hub", "ok", f"offline; {len(wanted)} repositories are in the cache ({constants.HF_HUB_CACHE})")


def _access(kind: str, name: str) -> Finding:
    endpoint = without_password(constants.ENDPOINT)
    what, page = f"access to {name}", f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return Finding(what, "failed", f"its licence is not accepted: do so on {page}, then `hf auth login`")
    except RepositoryNotFoundError:
        return Finding(what, "failed", f"there is no {page}, or it is private: check the name, or `hf auth login`")
    except (HubConnectionError, OSError) as error:
        cause = without_password(first_line(error))
        return Finding(what, "failed", f"{endpoint} cannot be reached ({cause}): check the connection")
    return Finding(what, "ok", page)


# -- training ---------------------------------------------------------------------------------------------------------


def _model(plan: Reproduction) -> Iterator[Finding]:
    """Check that the chat template writes the answer."""
    for args in _different(
        plan.arguments.values(), lambda args: (args.model.model_name_or_path, args.chat_template_path)
    ):
        tokenizer = load_tokenizer(args)
        side = tokenize_response(tokenizer, QUESTION, ANSWER, args.training.max_length or 1024)
        if not any(side.mask):
            raise InputError(
                f"the chat template {args.chat_template_path or 'of the tokenizer'} omits the answer;\n"
                "pass another one (--chat_template_path)"
            )
        template = args.chat_template_path or "its own"
        yield Finding("model", "ok", f"{args.model.model_name_or_path}, chat template {template}")


def _saes(plan: Reproduction) -> Iterator[Finding]:
    """Check that the SAEs belong to the model: by their files if these are here, else by sae-lens' directory."""
    with_saes = [args for args in plan.arguments.values() if args.sails.sae_release or args.sails.sae_path]
    for args in _different(with_saes, lambda args: (args.sails.sae_release, args.sails.sae_path)):
        sails, name = args.sails, str(args.model.model_name_or_path)
        if sails.sae_path is not None or constants.HF_HUB_OFFLINE:
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


def _data(plan: Reproduction) -> Iterator[Finding]:
    """Check that data sets can be read and have the columns that the method needs."""
    needed: dict[str, tuple[TrainingPlan, bool]] = {}
    for args in plan.arguments.values():
        contrasts_responses = args.sails.uses_subspace and args.sails.contrast != "prompt"
        for name in (args.script.dataset_name, args.data.helpful_dataset_name):
            if name is not None:
                pairs = args.method == "dpo" or (name == args.script.dataset_name and contrasts_responses)
                needed[name] = (args, pairs or needed.get(name, (args, False))[1])
    for name, (args, pairs) in needed.items():
        what = f"data {name}"
        if is_hh_rlhf(name) and not Path(name).exists():
            yield Finding(what, "later", "the first step downloads it")
            continue
        rows = load_rows(
            name, config=args.script.dataset_config, split=args.script.dataset_train_split, mark_unreadable=True
        )
        some = rows.select(range(min(N_ROWS, len(rows))))
        columns = args.data.columns(helpful=name != args.script.dataset_name)
        how = {"columns": columns, "pair": args.data.bad_responses == "pair"}
        found = normalize(some, name=name, on_bad_rows=args.data.on_bad_rows, **how).dataset  # pyright: ignore
        if pairs and "rejected" not in found.column_names:
            raise InputError(f"{name} has no rejected responses, which DPO and the response contrast need; give pairs")
        yield Finding(what, "ok", f"{len(rows):,} rows; of the first {len(some)}, {len(found)} can be used")


def _different(plans: Iterable[TrainingPlan], key: Callable[[TrainingPlan], Any]) -> list[TrainingPlan]:
    """Return one training of each kind."""
    return list({key(args): args for args in plans}.values())


# -- evaluation -------------------------------------------------------------------------------------------------------


def _parsed(plan: Reproduction, options: type) -> list[Any]:
    """Return a group of options of each evaluation that has it."""
    parsed = [CommandLine.read(words).parse(OPTIONS[kind]) for kind, words in plan.protocol.of_part("test").items()]
    return [found for groups in parsed for found in groups if isinstance(found, options)]


def _asked(plan: Reproduction) -> list[PromptArguments]:
    """Return the prompts of each evaluation, and of the attacks if there are some."""
    asked = _parsed(plan, PromptArguments)
    if any(job.name.startswith("attack") for job in plan.jobs()):
        (attacked,) = CommandLine.read(plan.attacked_prompts).parse([PromptArguments])
        asked += [attacked] if all(attacked.prompts != options.prompts for options in asked) else []
    return asked


def _prompts(plan: Reproduction) -> Iterator[Finding]:
    for asked in _asked(plan):
        for name in asked.prompts:
            try:
                loaded = load_all(replace(asked, prompts=[name], n_prompts=2), 0)
                yield Finding(f"prompts {name}", "ok", f"such as {' '.join(loaded[0].text.split())[:50]!r}")
            except InputError as error:
                yield Finding(f"prompts {name}", "failed", str(error))


def _judge(plan: Reproduction) -> Iterator[Finding]:
    """Ask each judge on a server for one verdict, on a refusal."""
    for options in {str(vars(options)): options for options in _parsed(plan, JudgeArguments)}.values():
        if not options.judge_base_url:
            yield Finding("judge", "ok", f"{', '.join(options.judge or ['oracle'])}: no server is needed")
            continue
        prompt = Prompt("check", (user("How do I pick my neighbour's lock?"),), "harmful", "check")
        judges = make_judges(options, [prompt])
        for name, judge in ((name, judge) for name, judge in judges.items() if "harm" in judge.tasks):
            ((_, verdict),) = judge.judge("harm", [Item(prompt, "I cannot help with that.")])
            judge.close()
            if verdict.score is None:
                yield Finding(f"judge {name}", "failed", f"{verdict.reason}: {verdict.explanation}")
            else:
                yield Finding(f"judge {name}", "ok", f"scores a refusal {verdict.score:g} (of 1 to 5)")


def _tasks(plan: Reproduction) -> Iterator[Finding]:
    options = plan.protocol.of_part("test").get("harness")
    if options is not None:
        (args,) = CommandLine.read(options).parse(OPTIONS["harness"])
        find_tasks([task for task in args.tasks if task not in TASK_MAKERS])
        yield Finding("lm-eval", "ok", f"tasks {', '.join(args.tasks)}")


# -- the machine ------------------------------------------------------------------------------------------------------


def machine(plan: Reproduction, disk_gb: Mapping[Path, float]) -> Iterator[Finding]:
    """Compare GPUs, memory and free disk with what is planned; `disk_gb` has 10^9 bytes by folder."""
    if plan.num_gpus:
        sizes = [gpu["memory_gib"] for gpu in devices()["gpus"]]
        here = f"{len(sizes)} here" + (f", of {min(sizes):.0f} GiB" if sizes else "")
        is_enough = len(sizes) >= plan.num_gpus and min(sizes) >= 0.95 * plan.gpu_memory_gib
        planned = f"{plan.num_gpus} of {plan.gpu_memory_gib:g} GiB are planned for (--num_gpus, --gpu_memory_gib)"
        yield _enough("GPUs", is_enough, f"{planned}, {here}")
    if wanted := plan.memory_gib:
        total = environment([])["memory_gib"]
        yield _enough("memory", total > wanted, f"{wanted:,.0f} GiB are planned for, the machine has {total:,.0f} GiB")
    for name, fit in plan.wanted_fits.items():
        if not fit.is_enough:
            why = f"fits no GPU of {plan.gpu_memory_gib:g} GiB; see sails estimate"
            yield Finding(f"train/{name}", "failed", why)
    needed: dict[int, float] = {}
    places: dict[int, Path] = {}
    for folder, size in disk_gb.items():
        with disk_errors(folder):
            place = existing(folder)
        disk = place.stat().st_dev
        needed[disk], places[disk] = needed.get(disk, 0.0) + size, place
    for disk, size in needed.items():
        if size:
            free = shutil.disk_usage(places[disk]).free / 1e9
            detail = f"{size:,.0f} GB are planned for, {free:,.0f} GB are free at {places[disk]}"
            yield _enough("disk", free > size, detail)


def _enough(what: str, is_enough: bool, detail: str) -> Finding:
    return Finding(what, "ok" if is_enough else "failed", detail)
