"""The notebook's cells run in order and produce the results that its text describes."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "empssl_in_an_afternoon.ipynb"


@pytest.mark.long
def test_the_notebook_runs_and_the_network_has_learned_something():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    namespace: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert namespace["patches"].shape == (5, 12, 16, 16, 3)
    assert namespace["accuracy"]["top1"] > 0.55  # guessing: 0.1; initial parameters: about 0.46
