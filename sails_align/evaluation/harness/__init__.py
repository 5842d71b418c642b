"""Capability by lm-evaluation-harness. Layers above register the tasks that they generate."""

from sails_align.core.registry import Registry

TASK_MAKERS = Registry("maker of tasks", {})
"""Each is a function of the options, the model's `ModelSpec` and a folder; it writes the tasks that are asked for."""
