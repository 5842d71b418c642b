"""Backends (`records.Backend`), which respond to prompts, one in each module; `make` makes them from options."""

from sails_align.core.registry import Entry, Registry

BACKENDS = Registry(
    "backend",
    {
        "hf": Entry("sails_align.evaluation.backends.hf:HFBackend", "transformers and PEFT in this process."),
        "vllm": Entry("sails_align.evaluation.backends.vllm_backend:VLLMBackend", "vLLM in this process."),
        "openai": Entry("sails_align.evaluation.backends.openai:OpenAIBackend", "An OpenAI-compatible server."),
    },
)
