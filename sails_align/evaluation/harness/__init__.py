"""Capability by lm-evaluation-harness. Layers above register the tasks that they generate."""

from sails_align.core.registry import Registry

TASK_MAKERS = Registry("maker of tasks", {})
"""By the name of the task or group; each is a function of the options, the model's `ModelSpec` and a folder, and writes
the tasks that are asked for."""
