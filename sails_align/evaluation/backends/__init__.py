"""What responds to prompts: each module has one backend (`records.Backend`); `make` makes one of options."""

from sails_align.core.registry import Entry, Registry

BACKENDS = Registry(
    "backend",
    {
        "hf": Entry("sails_align.evaluation.backends.hf:HFBackend", "transformers and PEFT in this process."),
        "vllm": Entry("sails_align.evaluation.backends.vllm_backend:VLLMBackend", "vLLM in this process."),
        "openai": Entry("sails_align.evaluation.backends.openai:OpenAIBackend", "An OpenAI-compatible server."),
    },
)
