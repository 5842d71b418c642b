"""Names in braces that stand in options for what a cell fills in."""

KNOB, SEED = "{knob}", "{seed}"
"""The value of the run's own knob, and the cell's seed."""
BASE, WORLD = "{base}", "{world}"
"""The model before its alignment, and the name of the testbed or model, which has data of its own."""
