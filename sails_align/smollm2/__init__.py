"""SmolLM2-135M-Instruct: a real language model that runs on a laptop, and English requests to align it with.

The model, the requests and the training data made of them are registered here by name, and imported when they are used.
"""

from sails_align.core.registry import Entry
from sails_align.data import EMBEDDED, OF_MODELS
from sails_align.evaluation.harness import TASK_MAKERS
from sails_align.evaluation.prompts import MAKERS
from sails_align.models import RESOLVERS, Resolver

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

RESOLVERS.register(
    "smollm2", Resolver(f"{__name__}.weights:model_path", "SmolLM2-135M-Instruct, a real small model.", known_as=HUB_ID)
)
MAKERS.register("twins", Resolver(f"{__name__}.requests:named_prompts", "Harmful requests and their harmless twins."))
EMBEDDED.register("twins-refused", Entry(f"{__name__}.pairs:refused", "Harmful requests, refused."))
EMBEDDED.register("twins-answered", Entry(f"{__name__}.pairs:answered", "Harmless requests, answered by SmolLM2."))
OF_MODELS.register("smollm2", Entry(f"{__name__}.pairs:of_model", "SmolLM2-135M-Instruct's."))
TASK_MAKERS.register("common_knowledge", Entry(f"{__name__}.tasks:make_tasks", "Questions of common knowledge."))
