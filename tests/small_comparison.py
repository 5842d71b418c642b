"""A comparison of models that are no testbed, small: the testbed's model, but named as any other is, by its folder."""

import json
from pathlib import Path
from typing import Any

import yaml

from sails_align.core.files import write_text
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.data import alignment_data

N = 64
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def evaluation(part: str, **more: Any) -> dict[str, Any]:
    return {"safety": {"prompts": ["testbed"], "part": part, "n_prompts": 8, "judge": "oracle"}, **more}


def write_comparison(folder: Path) -> Path:
    """Write compare.yaml and all that it names; returns the folder."""
    testbed = resolve_testbed(None)
    for name, harmful in (("safety", True), ("helpful", False)):
        rows = alignment_data(testbed.world, harmful=harmful, n=N).to_list()
        kept = [{column: row[column] for column in ("prompt", "chosen", "rejected")} for row in rows]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    recipe = {
        **{"model_name_or_path": testbed.model_path, "sae_path": testbed.sae_path, "sae_allow_mismatch": True},
        **{"dataset_name": str(folder / "safety.jsonl"), "helpful_dataset_name": str(folder / "helpful.jsonl")},
        **{"max_length": 64, "per_device_train_batch_size": 16, "num_train_epochs": 4, "eval_examples": 4},
        **{"lora_r": 8, "lora_target_modules": MODULES, "save_strategy": "no", "gradient_checkpointing": False},
    }
    write_text(folder / "sails.yaml", yaml.safe_dump(recipe))
    more = {
        "helpfulness": {"prompts": ["testbed"], "n_prompts": 4, "judge": "oracle"},
        "harness": {"tasks": "testbed", "limit": 4, "base": "none", "testbed": "testbed"},
    }
    values = {
        "model": "my/model",
        "runs": {
            "base": {"model": testbed.model_path},
            "sft-sails": {"train": "sft", "config": str(folder / "sails.yaml")},
        },
        "evaluate": {
            "validation": evaluation("validation", helpfulness=more["helpfulness"]),
            "test": evaluation("test", **more),
        },
        "in_distribution": "harmful",
        "out_of_distribution": "ood",
        "learning_rates": [0.01],
        "n_seeds": 1,
        "progress": False,
        "output_dir": str(folder / "run"),
    }
    write_text(folder / "compare.yaml", yaml.safe_dump(values, sort_keys=False))
    return folder
