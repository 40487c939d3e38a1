"""Whatever a model is called: the head is YAML with that name, tables keep their cells, commands give the words."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moeify.convert.pipeline import split
from moeify.export.model_card import code, finetuned_card, model_card
from moeify.options import SplitOptions
from moeify.plan import SplitPlan

NAMES = [
    *("HuggingFaceTB/SmolLM2-135M", "plain_name", "a\nlicense: mit\nevil: yes", "x: y", "- a", "# a", "---", "a | b"),
    *("`a`", "``", "<script>alert(1)</script>", "**a** [b](c) ![d](e)", "'\"$HOME", "x; touch PWNED", "\x1b[2J", " a "),
    *("\u202eb", "{a}", "yes", "null", "1.0", "\udc80", "-x", "a\\b", "&a *b", "a\u2028", "\ta", "```\nb"),
]


@pytest.fixture(scope="module")
def plan(make_dense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitPlan:  # type: ignore[no-untyped-def]
    options = SplitOptions(tokens=1024, calibration=(str(calibration_file),))
    out = tmp_path_factory.mktemp("card") / "moe"
    return split(str(make_dense("llama", intermediate_size=128)), out, options).plan


def head_of(card: str) -> object:
    start, head, _ = re.split(r"^---$", card, maxsplit=2, flags=re.M)
    assert start == ""
    return yaml.safe_load(head)


def rows_of(card: str) -> list[list[str]]:
    lines = card.split("|---|---|\n")[1].split("\n\n", maxsplit=1)[0].split("\n")
    # A bar that is escaped is in a cell.
    return [re.split(r"(?<!\\)\|", line) for line in lines]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_card_of_a_split(plan: SplitPlan, name: str, tmp_path: Path) -> None:
    options = replace(plan.options, calibration=(name,), plan=name)
    card = model_card(replace(plan, source=name, options=options), "LlamaForCausalLM", (2, 1))
    card.encode()
    assert head_of(card) == {
        "base_model": name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moeify", "mixture-of-experts"],
    }
    assert {len(cells) for cells in rows_of(card)} == {4}
    assert all(letter.isprintable() or letter == "\n" for letter in card)
    assert not re.search(r"^\s*(license|evil)", card, re.M)
    # Outside of code no letter of a name has a meaning.
    assert "<script>" not in re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", card.split("\n# ")[1].split("```bash")[0])
    (line,) = (line for line in card.split("\n") if line.startswith("moeify split"))
    words = words_of(line, tmp_path)
    assert words[:3] == ["moeify", "split", f"./{name}" if name.startswith("-") else name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_card_of_a_finetuned_model(name: str) -> None:
    options = dict.fromkeys(("epochs", "kl", "lm", "hidden", "router_rate", "schedule", "seed"), 1)
    text = {"data": {"source": name, "num_tokens": 8, "context": 4, "sha256": "0"}}
    config = {"model_type": name, "architectures": [name]}
    card = finetuned_card(name, name, config, options, text, trained=["layers"], plan=None)
    assert head_of(card)["base_model"] == name  # type: ignore[index]
    assert {len(cells) for cells in rows_of(card)} == {4}
    assert all(letter.isprintable() or letter == "\n" for letter in card)


def words_of(line: str, folder: Path) -> list[str]:
    """What a shell makes of a line, with nothing run."""
    script = f'for word in {line}; do printf "%s\\0" "$word"; done'
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, cwd=folder)
    return done.stdout.decode(errors="surrogateescape").split("\0")[:-1]


@pytest.mark.parametrize(
    ("text", "written"),
    [("a", "`a`"), ("a`b", "``a`b``"), ("`a``", "``` `a`` ```"), ("", "`  `"), (" ", "`   `"), ("a\n|", "`a\\n|`")],
)
def test_a_name_as_code(text: str, written: str) -> None:
    assert code(text) == written
