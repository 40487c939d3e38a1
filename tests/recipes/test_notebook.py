"""recipes/quickstart.ipynb runs from its first cell to its last, here in this process and in a real kernel."""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense

import moeify

NOTEBOOK = Path(__file__).parents[2] / "recipes" / "quickstart.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
# Of the model that the test puts in the place of the embedded one, which takes a minute to make.
FIRST = 'MODEL = "builtin"'


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=64, max_position_embeddings=128)


def test_every_cell_runs(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sum(FIRST in cell for cell in CODE) == 1
    names: dict[str, Any] = {}
    for cell in CODE:
        exec(compile(cell.replace(FIRST, f"MODEL = {str(dense)!r}"), "cell", "exec"), names)
    assert [result.model for result in names["measured"]] == [str(dense), "my-moe", "my-pruned"]
    assert names["moe"].layout.num_active == 4
    assert moeify.verify("my-moe", dense).passed
    assert Path("my-bench/report.html").is_file()
    assert type(names["model"]).__name__ == "GraniteMoeSharedForCausalLM"
    assert capsys.readouterr().out.count("my-") == 2


def test_its_outputs_name_no_place_of_a_machine() -> None:
    shown = json.dumps([cell.get("outputs") for cell in CELLS])
    assert "<table>" in shown
    assert not re.search(r"/(work|home|tmp|root|Users)/", shown)
    assert not re.search(r"Traceback|\berror: ", shown)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))), reason="runs a kernel: nbclient and ipykernel"
)
def test_it_runs_in_a_kernel_that_shows_progress(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(
            FIRST, f"MODEL = {str(dense)!r}\nimport moeify.progress\nmoeify.progress.PATIENCE_S = 0.0"
        )
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "splitting layers" in str(outputs)
    assert all(output.output_type != "error" for output in outputs)
    assert any("<table>" in output.get("data", {}).get("text/html", "") for output in outputs)
