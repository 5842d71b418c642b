"""Imports point one way: from a higher floor to a lower one, and inside a folder in the order listed."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sails_align"

# Lowest first. Modules of one entry may import those before them in it, and all entries of lower floors.
FLOORS: list[list[list[str]]] = [
    [
        [
            "errors",
            "distributed",
            "progress",
            "config",
            "artifacts",
            "linalg",
            "formats",
            "loading",
            "rows",
            "data",
            "tokens",
            "attention",
            "quantized",
        ]
    ],
    [
        [
            f"subspace.{name}"
            for name in [
                "hooks",
                "language_model",
                "steering",
                "stats",
                "features",
                "basis",
                "rivals",
                "truncated",
                "discover",
                "gemma_scope",
                "sae_checks",
                "sae_files",
                "sae",
                "sae_sets",
                "separation",
                "meaning",
                "concepts",
                "token_stream",
                "layer_trainer",
                "sae_report",
                "train_sae",
                "norms",
                "targets",
                "adapter",
                "adapter_files",
            ]
        ],
        [
            f"evaluation.{name}"
            for name in [
                "records",
                "cache",
                "metrics",
                "agreement",
                "prompt_sets",
                "prompt_rows",
                "prompts",
                "local_model",
                "generation",
                "endpoint",
                "answers",
                "client",
                "openai_backend",
                "adapter_check",
                "vllm_options",
                "vllm_backend",
                "shielding",
                "rubrics",
                "judge_answers",
                "llm_judge",
                "guard_formats",
                "guards",
                "rules",
                "wrappers",
                "suffix_tokens",
                "gcg",
                "harness_scores",
                "harness_tasks",
                "harness_model",
                "harness",
            ]
        ],
    ],
    [
        [
            f"training.{name}"
            for name in (
                "callbacks",
                "parsing",
                "source",
                "arguments",
                "performance",
                "subspaces",
                "starts",
                "trainers",
                "checkpoints",
                "record",
                "shapes",
                "memory",
            )
        ],
        [
            f"export.{name}"
            for name in ("serving", "card_facts", "card_sections", "card_use", "card", "hub", "quantized_base", "merge")
        ],
        [
            f"testbed.{name}"
            for name in (
                "lexicon",
                "world",
                "oracle",
                "reward",
                "pretrain",
                "build",
                "evaluate",
                "judge",
                "judge_attacks",
                "tasks",
            )
        ],
    ],
    [
        [
            "cost",
            "tables",
            "measuring",
            "align",
            "rlhf_options",
            "warm_start",
            "rlhf",
            "estimate",
            "exporting",
            "sae_training",
            "eval_model",
            "eval_options",
            "eval_judges",
            "eval_run",
            "eval_panel",
            "eval_tables",
            "eval_safety",
            "eval_helpfulness",
            "eval_harness_report",
            "eval_harness",
            "judge_check",
            "explaining",
            "attack_options",
            "attacking",
            "commands",
            "doctor",
        ]
    ],
    [
        [
            f"comparison.{name}"
            for name in (
                "plan",
                "protocol",
                "studies",
                "relearning",
                "cells",
                "commands",
                "runner",
                "jobs",
                "summary",
            )
        ]
    ],
    [[f"reporting.{name}" for name in ("figures", "page", "sections", "side_sections")]],
    [["compare_options", "comparing"]],
    [
        [f"reproduction.{name}" for name in ("plan", "costs", "checks", "results", "running")],
    ],
    [["reproducing", "cli", "__main__"]],
]
PLACE = {
    module: (floor, folder, order)
    for floor, folders in enumerate(FLOORS)
    for folder, modules in enumerate(folders)
    for order, module in enumerate(modules)
}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def imports(module: str) -> set[str]:
    """Modules that a module imports at run time, at its top or inside functions."""
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("sails_align.")
            and node not in for_types
        ):
            name = (node.module or "").removeprefix("sails_align.")
            is_package = (PACKAGE / name.replace(".", "/")).is_dir()
            names |= {f"{name}.{alias.name}" for alias in node.names} if is_package else {name}
    return names


def may_import(module: str, other: str) -> bool:
    floor, folder, order = PLACE[module]
    other_floor, other_folder, other_order = PLACE[other]
    return other_floor < floor or (other_floor == floor and other_folder == folder and other_order < order)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_its_place_and_imports_only_from_below(module):
    assert module in PLACE, f"give {module} a place in FLOORS"
    for other in imports(module):
        assert may_import(module, other), f"{module} imports {other}, which is not below it"


def test_the_rule_can_fail():
    assert not may_import("linalg", "subspace.hooks")
    assert not may_import("testbed.world", "training.trainers")
    assert not may_import("subspace.hooks", "subspace.features")
    assert may_import("align", "testbed.build")
