"""Sections of a comparison's report, one file each, in the order of the page.

A section is a function `make(data)` from a `reporting.report.ReportData` to the `Section`s that there are results
for: none, one or several. All numbers come from results of cells. A section's findings are what the page begins with.
"""

from dataclasses import dataclass

from sails_align.core.registry import Entry, Registry

REFERENCES = ("sft-lora", "sft-full", "dpo-lora", "dpo-full")
"""Baselines that other runs are compared with, pair by pair."""
SAILS = {"sft-sails": ("sft-lora", "sft-full"), "dpo-sails": ("dpo-lora", "dpo-full")}
"""Runs of SAILS with their own baselines. The findings are about the first that is in the plan."""
CONTROLS = {
    "sft-lora-blocks": "lora-last-blocks",
    "sft-random-features": "basis-random-features",
    "sft-random-basis": "basis-random",
}
"""Runs that lack one thing that `sft-sails` has, with their names in the ablations."""


@dataclass(frozen=True)
class SectionEntry(Entry):
    """Point to the code of a section."""

    is_of_main: bool = True
    """Whether it shows the main study; a report of side studies alone is without it."""


def _entry(name: str, summary: str, *, is_of_main: bool = True) -> SectionEntry:
    return SectionEntry(f"sails_align.reporting.sections.{name}:make", summary, is_of_main=is_of_main)


SECTIONS: Registry[SectionEntry] = Registry(
    "section of the report",
    {
        "headline": _entry("headline", "Results of each method."),
        "differences": _entry("differences", "Differences from each baseline, paired by seed."),
        "fronts": _entry("fronts", "Safety against helpfulness, over learning rates."),
        "sets": _entry("sets", "Safety and over-refusal on each prompt set."),
        "categories": _entry("categories", "Safety and over-refusal by category."),
        "features": _entry("features", "Meaning of the SAE features, and how training changed them."),
        "cost": _entry("cost", "Time by stage."),
        "tampering": _entry("tampering", "Safety left after further training, by defence.", is_of_main=False),
        "methods": _entry("methods", "Methods that align a model.", is_of_main=False),
        "ablations": _entry("ablations", "One setting of SAILS changed in each run.", is_of_main=False),
        "examples": _entry("examples", "Learning curves over the number of training examples.", is_of_main=False),
        "worlds": _entry("worlds", "The same comparison in other worlds.", is_of_main=False),
    },
)
