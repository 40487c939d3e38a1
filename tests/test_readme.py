"""README.md is true: its commands run, its tree is the disk, its set-up is what CI does."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_process import Run, main, train_briefly

from moeify import families, targets
from moeify.convert.exactness import Twin, check_target, choose_target, make_twin
from moeify.layout import Layout
from moeify.modeling.configuration_moeify import MODEL_TYPE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# The same commands on less text, and rows of a benchmark for less time.
CHEAPER = {
    "moeify run quickstart": shlex.split(
        "--set split.tokens=4096 --set eval.tokens=2048 --set bench.seconds_per_row=0.02 --set 'bench.batch=[1]'"
    ),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """The moeify command of every line; a set-up line ends in one too."""
    found = []
    for line in "\n".join(blocks("bash")).splitlines():
        last = line.rsplit("&&", maxsplit=1)[-1].strip().removeprefix(".venv/bin/")
        if last.startswith("moeify "):
            found.append(last)
    return found


@pytest.mark.slow
def test_every_command_runs_offline_in_order(tmp_path: Path, forking: Any) -> None:
    found = commands()
    assert len(found) >= 10
    folder, log = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()
    for command in found:
        words = [*shlex.split(command)[1:], *CHEAPER.get(command, [])]
        run = Run(words, log, folder=folder, prepare=train_briefly, environment={"HF_HUB_OFFLINE": "1"})
        process = forking.Process(target=main, args=(run,))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{command}\n{log.read_text()}\n{run.errors}"


def test_setup_commands_are_what_ci_does() -> None:
    setup = [line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("python3 -m venv")]
    assert len(setup) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    install = re.search(r"pip install.*(-c constraints.txt .*)", ci)
    assert install is not None
    assert install[1] in setup[1]
    assert setup[1].endswith("pytest -n auto")
    assert ci.rstrip().endswith("pytest -n auto")


def test_tree_names_every_room() -> None:
    (tree,) = (block for block in blocks("text") if "moeify/ " in block)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    rooms = {path.parent.name for path in (ROOT / "moeify").glob("*/__init__.py")}
    assert listed == rooms
    assert {line.split()[0] for line in tree.splitlines() if not line.startswith("  ")} == {
        "moeify/",
        "recipes/",
        "tests/",
    }


def test_the_table_of_targets_is_what_the_twins_say() -> None:
    table = README.split("| family | targets")[1].split("\n\n")[0]
    listed = set()
    for row in table.splitlines()[2:]:
        labels, cells = ([part.strip() for part in cell.split(";")] for cell in row.strip("|").split("|"))
        for label, cell in zip(labels, cells, strict=True):
            window = {"sliding_window": 16} if "window" in label else {}
            for family in re.findall(r"[a-z0-9_]+", label.split("(")[0]):
                listed.add(family)
                model = twin_of(family, **window)
                stock = [name for name in targets.names() if targets.find(name).is_stock]
                exact = [n for n in stock if check_target(targets.for_model(n, model), model, layout_for(n)).exact]
                assert cell.split(", ") == exact, label
                assert chosen_for(model) == exact[0], label
    assert "All of `moeify ls families` also go into moeify's own architecture" in README
    others = set(families.names()) - listed
    assert len(others) > 20
    for family in sorted(others):
        assert chosen_for(twin_of(family)) == MODEL_TYPE, family


def chosen_for(model: Twin) -> str:
    """The target that --target auto takes."""
    return choose_target(model, lambda target: layout_for(target.model_type))[0].model_type


def layout_for(target: str) -> Layout:
    return targets.find(target).layout(8)


def twin_of(family: str, **values: Any) -> Twin:
    return make_twin({"model_type": family, **families.find(family).tiny_config(**values)})


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 175
