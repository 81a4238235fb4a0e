"""The notebook runs from top to bottom, as a reader would run it, and is stored as it came out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.documentation.blocks import ROOT, read

NOTEBOOK = "examples/masked_loss.ipynb"
# Its own claims are assertions in its cells. In a process of its own: the kernel's packages warn of much.
RUN = """
import sys, time, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
print(sum(len(cell.get("outputs", ())) for cell in notebook.cells))
"""


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-c", RUN, str(ROOT / NOTEBOOK)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) >= 6


def test_the_notebook_is_stored_with_its_small_pictures():
    cells = [cell for cell in json.loads(read(NOTEBOOK))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run anew, from the top"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 4
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert (ROOT / NOTEBOOK).stat().st_size < 400_000
    assert not re.search(r"/(?:home|root|tmp|work|Users)/\w", read(NOTEBOOK)), "a path of the machine that ran it"


def test_links_of_the_notebook_lead_somewhere():
    pages = re.findall(r"docs/\w+\.md", read(NOTEBOOK))
    assert len(pages) > 3
    assert [page for page in pages if not (ROOT / page).exists()] == []
