"""The testbed: a small world with a base model, SAEs and an oracle, in which the whole method can be run and measured.

What it adds to models and to the evaluation is registered here, by name; nothing is imported before it is used.
"""

from sails_align.core.registry import Entry
from sails_align.evaluation.attacks import WRAPPER_SETS
from sails_align.evaluation.harness import TASK_MAKERS
from sails_align.evaluation.judges import JUDGES
from sails_align.evaluation.prompts import MAKERS
from sails_align.models import RESOLVERS, Resolver

JUDGES.register("oracle", Entry("sails_align.testbed.oracle:OracleJudge", "The testbed's ground truth."))
MAKERS.register("testbed", Entry("sails_align.testbed.prompts:RequestMaker", "Requests of the testbed's world."))
TASK_MAKERS.register("testbed", Entry("sails_align.testbed.tasks:make_tasks", "Facts of the testbed's world."))
WRAPPER_SETS.register("testbed", Entry("sails_align.testbed.attacks:WRAPPERS", "For the testbed's model."))
RESOLVERS.register(
    "testbed", Resolver("sails_align.testbed.build:testbed_model", "The testbed's model.", marker="world.json")
)
