"""SmolLM2-135M-Instruct: a real language model that runs on a laptop, and English requests to align it with.

The model and the requests are registered here by name, and imported when they are used.
"""

from sails_align.evaluation.prompts import MAKERS
from sails_align.models import RESOLVERS, Resolver

RESOLVERS.register("smollm2", Resolver(f"{__name__}.weights:model_path", "SmolLM2-135M-Instruct, a real small model."))
MAKERS.register("twins", Resolver(f"{__name__}.requests:named_prompts", "Harmful requests and their harmless twins."))
