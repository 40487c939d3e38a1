"""A run writes what it measured into the cards of its checkpoints, again and again the same."""

from pathlib import Path

from moeify.check.evaluate import Evaluation
from moeify.check.loops import LoopResult
from moeify.check.perplexity import EvalResult
from moeify.check.tasks_results import TaskResult
from moeify.recipes.cards import note_quality

CARD = "---\ntags: [moeify]\n---\n\n# name\n\n## How it was made\n\nso\n\n## Limits\n\nmany\n"


def evaluation(model: str, perplexity: float) -> Evaluation:
    task = TaskResult(model, "/here/arc.jsonl", "acc", 200, 0.4, 0.3, 0.5, -0.1, -0.15, -0.05, 0.25)
    other = EvalResult("other", "/here/a|b.txt", 99.0, 100, 1.0, "")
    dense = EvalResult("d", "/here/a|b.txt", 20.0, 100, 1.0, "")
    loops = (LoopResult("d", 16, 900, 256, 2, 5, 0.2), LoopResult(model, 16, 900, 256, 6, 4, 0.4))
    return Evaluation((dense, EvalResult(model, "/here/a|b.txt", perplexity, 100, 1.0, ""), other), (task,), loops)


def test_quality_stands_before_the_limits_and_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(CARD)
    note_quality(tmp_path, evaluation(str(tmp_path), 25.0))
    card = file.read_text()
    assert "| perplexity of `a\\|b.txt`, 100 tokens | 20.00 | 25.00 | 1.250 |" in card
    assert "| acc of `arc.jsonl`, 200 questions | 0.500 | 0.400 | -0.100 (-0.150 to -0.050) |" in card
    assert "| loops in 16 answers of at most 256 tokens | 2 | 6 | +4 |" in card
    assert "| endless in 16 answers of at most 256 tokens | 5 | 4 | -1 |" in card
    assert "99.00" not in card
    assert "/here" not in card
    assert card.index("so\n") < card.index("## Measured") < card.index("## Limits")
    note_quality(tmp_path, evaluation(str(tmp_path), 30.0))
    again = file.read_text()
    assert "1.500" in again
    assert again.count("## Measured") == 1
    note_quality(tmp_path, evaluation(str(tmp_path), 25.0))
    assert file.read_text() == card
    before, _, rest = card.partition("## Measured")
    assert before + rest[rest.index("## Limits") :] == CARD


def test_a_card_that_someone_rewrote_keeps_its_words(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("# mine\n")
    note_quality(tmp_path, evaluation(str(tmp_path), 25.0))
    assert file.read_text().startswith("# mine\n## Measured\n")
