"""`--report_to` of comparisons: TensorBoard has the numbers of the report's table, and its figures."""

from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import pytest
from events import Events
from made_results import stored
from PIL import Image

from sails_align.core.files import write_json
from sails_align.experiments.plan import RUNS, Measures, Plan
from sails_align.experiments.results import Results
from sails_align.experiments.studies import Study
from sails_align.reporting.report import rewrite_report
from sails_align.reporting.tracking import send


def test_numbers_and_figures(tmp_path: Path) -> None:
    runs = (RUNS["sft-sails"], RUNS["sft-lora"])
    plan = Plan(runs=runs, n_seeds=2, learning_rates=(1e-2,), measures=Measures(n_examples=16))
    write_json(tmp_path / "plan.json", {"studies": [asdict(Study("main", (("testbed", plan),)))], "command": "sails c"})
    for cell in (*plan.tuning_cells(), *plan.test_cells({run.name: 1e-2 for run in runs})):
        write_json(Results(tmp_path).path(cell), stored())
    data, _, _ = rewrite_report(tmp_path)
    send(data, ["none"], tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    send(data, ["tensorboard"], tmp_path)
    events = Events(tmp_path / "tensorboard")
    for row in data.main.rows:
        sent = events.scalars()[f"main/testbed/{row.run.label}/over_refusal_rate"][0]
        assert sent == pytest.approx(row.means["over_refusal_rate"].value)
    images = events.images()
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert images.keys() == figures
    assert len(figures) > 1
    for png in images.values():
        with Image.open(BytesIO(png)) as image:
            assert len(set(image.convert("L").tobytes())) > 10  # something is drawn
