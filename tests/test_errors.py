"""What was mistyped is asked back where one known name is like it, and only there."""

import pytest

from moeify.errors import nearest, unknown

NAMES = ["kmeans", "mlp", "CMoE", "static + refit", "seconds_per_row", "cpu", "cuda"]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("kmean", "kmeans"),
        ("KMeans", "kmeans"),
        ("MLP", "mlp"),
        ("cmoe", "CMoE"),
        ("static+refit", "static + refit"),
        ("seconds-per-row", "seconds_per_row"),
        ("sec", "seconds_per_row"),
        ("gpu", ""),
        ("", ""),
        ("nothing like it", ""),
    ],
)
def test_the_nearest_name(word: str, name: str) -> None:
    assert nearest(word, NAMES) == name


def test_an_unknown_name_is_said_in_a_sentence() -> None:
    error = unknown("a router", "ridg", ["mlp", "ridge"])
    assert (str(error), error.hint) == ("'ridg' is not a router", "did you mean ridge? there are mlp, ridge")
    error = unknown("a router", "x\n", ["mlp"], "--router takes")
    assert (str(error), error.hint) == ("'x\\n' is not a router", "--router takes mlp")
