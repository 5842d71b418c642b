"""Plan the studies of a comparison: the main one, ablations, numbers of examples, and other worlds.

Each is a set of plans. The cells of all are kept in one folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sails_align.core.artifacts import content_hash
from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.registry import Registry
from sails_align.core.suggestions import did_you_mean
from sails_align.experiments.ablations import ABLATIONS, Ablation
from sails_align.experiments.benches.make import knob_values
from sails_align.experiments.benches.names import is_bench
from sails_align.experiments.contents import contents_hash
from sails_align.experiments.methods.entries import METHODS, ComparedMethod, identity_of
from sails_align.experiments.options import KEYS, OF_TESTBED, STUDIES, CompareOptions, LauncherOptions
from sails_align.experiments.plan import (
    RUNS,
    Measures,
    Plan,
    Protocol,
    Run,
)
from sails_align.experiments.protocol import read_protocol
from sails_align.experiments.tampering.attacks import ATTACKS, check_attack
from sails_align.experiments.tampering.defences import DEFENCES, WITHOUT, can_defend, tampering_of
from sails_align.testbed.build import PARAMETERS, is_testbed, parse_parameters, parse_world
from sails_align.training import run as align

StudyKind = Literal["main", "ablations", "tampering", "methods", "examples", "worlds"]

SMALL = ("sft-lora", "sft-sails", "sft-full")
BASELINES = tuple(ABLATIONS.get(name) for name in ("basis-mean-diff", "basis-pca"))
OF_DATA: dict[str, type[int] | type[float]] = {"n_examples": int, "contamination": float}
"""Parameters of a world's alignment data."""
EXAMPLE = "contamination=0.1"


@dataclass(frozen=True)
class Study:
    """Plans that are reported together, each with its name."""

    kind: StudyKind
    plans: tuple[tuple[str, Plan], ...]

    def by_prefix(self) -> dict[str, Plan]:
        """Return the plans by what the names of their cells begin with."""
        return {"" if self.kind == "main" else f"{self.kind}/{label}/": plan for label, plan in self.plans}


def read_plans(line: CommandLine, prog: str | None) -> tuple[CompareOptions, LauncherOptions, list[Study]]:
    """Read the options of a command line and its file, and plan the studies that they ask for.

    Raises `InputError` for options that cannot be used, alone or together, and for a file that is not understood.
    """
    is_of_models = isinstance(line.from_file.get("runs"), dict) or "evaluate" in line.from_file
    of_models = {name: value for name, value in line.from_file.items() if is_of_models and name in KEYS}
    own = {name: value for name, value in line.from_file.items() if name not in of_models}
    line = replace(line, from_file=own)
    classes = [CompareOptions, LauncherOptions]
    options, launcher = line.parse(classes, prog=prog)
    if not is_of_models:
        plan = _on_testbed(options)
    else:
        if given := sorted(set(OF_TESTBED) & line.given(classes).keys()):
            raise InputError(f"{given[0]} is of the testbed; in {line.path} `evaluate` says how models are evaluated")
        runs, protocol = read_protocol(str(line.path), of_models)
        measures = Measures(options.n_examples, 0, 0, 0, relearning=False)
        plan = _plan(options, runs, protocol.model, measures, protocol)
    studies = [Study("main", ((plan.world, plan),))] if "main" in options.study else []
    given = line.given(classes).keys()
    for name, (make, own) in _OWN.items():
        if name in options.study:
            studies.append(make(plan, options))
        elif of_it := sorted(set(own) & given):
            raise InputError(f"{of_it[0]} is of the study {name}; add --study {name}, or leave it out")
    if options.examples:
        studies.append(examples(plan, options.examples, options.n_side_seeds))
    if options.worlds:
        studies.append(worlds(plan, options.worlds))
    if not studies:
        raise InputError(f"nothing to study; name at least one with --study ({', '.join(STUDIES)})")
    return options, launcher, studies


def _on_testbed(options: CompareOptions) -> Plan:
    if not is_testbed(options.world):
        raise InputError(
            f"world is {options.world!r}; give testbed, testbed:N or a testbed's folder;\n"
            "other models are compared by --config (docs/comparison.md)"
        )
    measures = Measures(
        128 if options.n_examples is None else options.n_examples,
        options.n_prompts,
        options.n_attacked,
        options.n_capability,
        relearning=options.relearning,
    )
    return _plan(options, tuple(RUNS.values()), options.world, measures, None)


def _plan(
    options: CompareOptions, runs: tuple[Run, ...], world: str, measures: Measures, protocol: Protocol | None
) -> Plan:
    known = {run.name: run for run in runs}
    for name in options.runs or ():
        if name not in known:
            raise InputError(f"there is no run {name!r}{did_you_mean(name, known)}")
    return Plan(
        runs=runs if options.runs is None else tuple(known[name] for name in options.runs),
        learning_rates=tuple(options.learning_rates),
        n_extensions=options.n_extensions,
        n_seeds=options.n_seeds,
        n_tuning_seeds=options.n_tuning_seeds,
        first_seed=options.first_seed,
        n_attacked_seeds=options.n_attacked_seeds,
        world=world,
        measures=measures,
        protocol=protocol,
        world_sha256="" if protocol else contents_hash(["--testbed", world]),
    )


def ablations(plan: Plan, options: CompareOptions) -> Study:
    """Change every part of the method, one at a time, at the three highest learning rates: at others nothing is learnt.

    Raises `InputError` if the plan has no SAILS run, and for an unknown ablation.
    """
    changed = [ABLATIONS.get(name) for name in _compared(plan, ABLATIONS, options.ablations)]
    runs = (*_named(plan, ("sft-lora", "sft-sails")), *(ablation.of(_sails(plan)) for ablation in changed))
    if plan.protocol is not None:
        runs = _that_differ(runs, plan.protocol)
    rates = tuple(sorted(plan.learning_rates)[-3:])
    of_all = replace(_cheap(plan), runs=runs, n_seeds=options.n_side_seeds, learning_rates=rates)
    return Study("ablations", (("ablations", of_all),))


def _that_differ(runs: Sequence[Run], protocol: Protocol) -> tuple[Run, ...]:
    """Return the runs whose options differ (a recipe can have a change already); decay needs one process or DDP."""
    kept: dict[str, Run] = {}
    for run in runs:
        parsed = align.parse("sft" if run.trainer == "sft" else "dpo", list(run.options))
        if not (protocol.launch and parsed.sails.subspace_mode == "decay"):
            kept.setdefault(content_hash(parsed.to_json()), run)
    return tuple(kept.values())


def tampering(plan: Plan, options: CompareOptions) -> Study:
    """Train aligned models further, with every defence and without one; a plan for each attack and run.

    Aligned models are trained with their recipe's own learning rate. Raises `InputError` for an unknown attack, defence
    or run, or an attack that is not one on the plan's model.
    """
    if plan.protocol is not None and not is_bench(plan.world):
        raise InputError(f"the tampering study knows the testbed and smollm2, and not {plan.world}; give one of them")
    names = DEFENCES.names() if options.defences is None else tuple(dict.fromkeys((*WITHOUT, *options.defences)))
    values = knob_values(plan.world)
    plans = []
    for attack in options.attacks:
        check_attack(plan.world, attack)
        defences = [name for name in names if can_defend(name, ATTACKS.get(attack))]
        for run in _tampered(plan, options.tampered):
            runs = tuple(_defended(run, attack, name, values.get(name)) for name in defences)
            label = attack if len(options.tampered) == 1 else f"{attack}, {run.name}"
            plans.append((label, replace(_cheap(plan), runs=runs, n_tuning_seeds=plan.n_tuning_seeds)))
    return Study("tampering", tuple(plans))


def _tampered(plan: Plan, names: Sequence[str]) -> tuple[Run, ...]:
    found = {run.name: run for run in _named(plan, names) if run.trainer in ("sft", "dpo")}
    for name in names:
        if name not in found:
            raise InputError(f"tampered names {name!r}, which is not a run that is trained{did_you_mean(name, found)}")
    return tuple(found[name] for name in names)


def _defended(run: Run, attack: str, name: str, values: tuple[float, ...] | None) -> Run:
    defence = DEFENCES.get(name)
    grid = defence.values if values is None else values
    return replace(
        run,
        name=name,
        label=defence.label,
        is_tuned=bool(grid),
        grid=grid,
        tampering=tampering_of(attack, name),
    )


def methods(plan: Plan, options: CompareOptions) -> Study:
    """Compare the methods that align a model, each at the best value of its tuned hyperparameter.

    Raises `InputError` for an unknown method, or a model that comes without data for them.
    """
    if plan.protocol is not None and not is_bench(plan.world):
        raise InputError(f"the study methods knows the testbed and smollm2, and not {plan.world}; give one of them")
    values = knob_values(plan.world)
    runs = tuple(_method(name, values.get(name)) for name in _compared(plan, METHODS, options.methods))
    measures = replace(_cheap(plan), runs=runs, n_tuning_seeds=plan.n_tuning_seeds)
    return Study("methods", (("methods", measures),))


def _compared(
    plan: Plan, registry: Registry[Ablation] | Registry[ComparedMethod], given: Sequence[str] | None
) -> list[str]:
    """Return the given names, each once, or all that can be compared on the plan's model.

    Raises `InputError` for an unknown name, or one of the testbed only.
    """
    known = [name for name, entry in registry.items() if plan.protocol is None or not entry.is_of_testbed]
    names = known if given is None else list(dict.fromkeys(given))
    if others := [name for name in names if registry.get(name) and name not in known]:
        raise InputError(f"{others[0]} is compared on the testbed only; leave it out")
    return names


def _method(name: str, values: tuple[float, ...] | None) -> Run:
    method = METHODS.get(name)
    grid = method.values if values is None else values
    is_tuned = bool(grid) or method.trainer != "none"
    return Run(
        name,
        method.label,
        method.trainer,
        method.training,
        is_tuned=is_tuned,
        is_reference=not is_tuned,
        grid=grid,
        method=identity_of(name),
    )


_OWN = {
    "ablations": (ablations, ("ablations",)),
    "tampering": (tampering, ("attacks", "defences", "tampered")),
    "methods": (methods, ("methods",)),
}
"""Side studies with options of their own."""


def examples(plan: Plan, numbers: Sequence[int], n_seeds: int) -> Study:
    """Compare the methods with other numbers of training examples."""
    runs = _named(plan, SMALL)
    if not runs:
        raise InputError(f"--examples compares {', '.join(SMALL)}; add one to the file, or to --runs")
    plans = []
    for number in sorted(set(numbers)):
        measures = replace(_cheap(plan).measures, n_examples=number)
        plans.append((str(number), replace(_cheap(plan), runs=runs, n_seeds=n_seeds, measures=measures)))
    return Study("examples", tuple(plans))


def worlds(plan: Plan, names: Sequence[str]) -> Study:
    """Compare the methods in other worlds, and with other alignment data.

    A name is a testbed's, or parameters of the shipped one and its data, as in `d_model=48,contamination=0.1`. Raises
    `InputError` if a parameter is unknown or its value cannot be used.
    """
    runs = (*_named(plan, SMALL), *(ablation.of(_sails(plan)) for ablation in BASELINES))
    return Study("worlds", tuple((name, _world(replace(_cheap(plan), runs=runs), name)) for name in names))


def _world(plan: Plan, name: str) -> Plan:
    if plan.protocol is None and is_testbed(name):
        return replace(plan, world=name, world_sha256=contents_hash(["--testbed", name]))
    known = OF_DATA if plan.protocol else {**OF_DATA, **PARAMETERS}
    of_testbed = "" if plan.protocol else "testbed, testbed:N, a testbed's folder, or "
    otherwise = f"; give {of_testbed}parameters ({', '.join(known)}), as in {EXAMPLE}"
    values = parse_parameters(name, known, f"worlds has {name!r}", otherwise)
    of_world = [f"{key}={values[key]}" for key in PARAMETERS if key in values]
    changed = {key: values[key] for key in OF_DATA if key in values}
    if of_world:
        plan = replace(plan, world=f"testbed:{','.join(of_world)}", world_sha256="")
        parse_world(plan.world)
    if changed.get("n_examples", 1) < 1 or not 0 <= changed.get("contamination", 0) <= 1:
        raise InputError(f"worlds has {name!r}; n_examples must be 1 or more, contamination a share of 0 to 1")
    return replace(plan, measures=replace(plan.measures, **changed))


def _sails(plan: Plan) -> Run:
    found = _named(plan, ("sft-sails",))
    if not found:
        raise InputError(
            "there is no run sft-sails, which the ablations and --worlds change; add it to the file, or to --runs"
        )
    return found[0]


def _named(plan: Plan, names: Sequence[str]) -> tuple[Run, ...]:
    """Return runs of the plan by name; on the testbed also those of the default comparison."""
    known = {} if plan.protocol else dict(RUNS)
    known |= {run.name: run for run in plan.runs}
    return tuple(known[name] for name in names if name in known)


def _cheap(plan: Plan) -> Plan:
    """Return the plan without attacks, capability and further training, and with one tuning seed."""
    measures = replace(plan.measures, n_attacked=0, n_capability=0, relearning=False)
    return replace(plan, measures=measures, n_tuning_seeds=1)
