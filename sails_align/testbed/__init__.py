"""The testbed: a small world with a base model, SAEs and an oracle, in which the whole method can be run and measured.

What it adds to the evaluation is registered here, by name; nothing is imported before it is used.
"""

from sails_align.core.registry import Entry
from sails_align.evaluation.attacks import WRAPPER_SETS
from sails_align.evaluation.judges import JUDGES
from sails_align.evaluation.prompts import MAKERS

JUDGES.register("oracle", Entry("sails_align.testbed.oracle:OracleJudge", "The testbed's ground truth."))
MAKERS.register("testbed", Entry("sails_align.testbed.prompts:RequestMaker", "Requests of the testbed's world."))
WRAPPER_SETS.register("testbed", Entry("sails_align.testbed.attacks:WRAPPERS", "For the testbed's model."))
