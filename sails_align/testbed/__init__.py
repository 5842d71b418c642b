"""The testbed: a small world with a base model, SAEs and an oracle, in which the whole method can be run and measured.

Its model, prompts, judge and attacks are registered here by name, and imported when they are used.
"""

from sails_align.core.registry import Entry
from sails_align.data import OF_MODELS
from sails_align.evaluation.attacks import WRAPPER_SETS
from sails_align.evaluation.harness import TASK_MAKERS
from sails_align.evaluation.judges import JUDGES
from sails_align.evaluation.prompts import MAKERS
from sails_align.models import RESOLVERS, Resolver

MARKER = "world.json"
"""The file that makes a folder a testbed's."""

JUDGES.register("oracle", Entry(f"{__name__}.oracle:OracleJudge", "The testbed's ground truth."))
TASK_MAKERS.register("testbed", Entry("sails_align.testbed.tasks:make_tasks", "Facts of the testbed's world."))
WRAPPER_SETS.register("testbed", Entry(f"{__name__}.attacks:WRAPPERS", "For the testbed's model."))
RESOLVERS.register(
    "testbed", Resolver(f"{__name__}.build:testbed_model", "The testbed's model.", marker=MARKER, known_as="testbed")
)
MAKERS.register("testbed", Resolver(f"{__name__}.prompts:named_prompts", "The testbed's requests.", marker=MARKER))
OF_MODELS.register("testbed", Entry(f"{__name__}.data:of_model", "The testbed's."))
