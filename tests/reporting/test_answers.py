"""What the report concludes from numbers: whether to use a model, for each kind of reader, what was lost and gained."""

import dataclasses
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import report_results as results
from report_results import bench, facts

from moeify.benchmark.engines.results import EngineFile
from moeify.benchmark.models.results import Phase
from moeify.cli.app import run_command
from moeify.reporting.answers import Answers, answers
from moeify.reporting.facts import Facts, demonstration, facts_of
from moeify.reporting.verdict import advise, is_beaten

COMMAND = "moeify bench moe --against dense -o 'a run'"


def answered(subject: Facts) -> Answers:
    return answers(subject, COMMAND, Path("a run"))


SLOW: Mapping[tuple[Phase, int], float] = {("decode", 1): 0.8, ("prefill", 1): 0.7}
MIXED: Mapping[tuple[Phase, int], float] = {("decode", 1): 1.2, ("decode", 8): 0.9, ("prefill", 1): 0.7}
ADVICE = {
    "faster and as good": (dict(moe=50.1), "yes", "Use it: faster for decode everywhere, and prefill at batch 1"),
    "faster and hardly worse": (dict(moe=51.2, spread=0.005), "yes", "perplexity is 2.4 % higher"),
    "better": (dict(moe=45.0), "yes", "perplexity is 10 % lower"),
    "faster here, slower there": (
        dict(moe=50.1, speeds=MIXED),
        "partly",
        "Use it where it gains (faster for decode at batch 1); keep the dense model for decode at batch 8, and prefill",
    ),
    "faster and worse": (dict(moe=60.0), "partly", "Only if the gain is worth the loss: faster for decode everywhere"),
    "perhaps hardly worse": (dict(moe=51.5, spread=0.025), "partly", "Only if the gain is worth the loss"),
    "faster and much worse": (dict(moe=110.0, static=150.0), "no", "Not as it is: faster for decode everywhere"),
    "slower and worse": (dict(moe=60.0, speeds=SLOW), "no", "Do not use it: nowhere faster than the dense model"),
    "slower and as good": (dict(moe=50.0, speeds=SLOW), "no", "No reason to use it"),
    "beaten by the control": (dict(moe=60.0, static=52.0), "no", "Do not use it: plain pruning to the same active"),
    "no quality": (dict(moe=None), "unknown", "Its quality was not measured"),
    "no speed": (dict(speeds={}), "unknown", "Its speed was not measured"),
}


@pytest.mark.parametrize(("changes", "level", "sentence"), ADVICE.values(), ids=ADVICE)
def test_advice(changes: dict[str, Any], level: str, sentence: str) -> None:
    found = advise(facts(**changes))
    assert (found.level, sentence in found.sentence) == (level, True), found


def test_a_control_must_be_certainly_better_and_no_slower() -> None:
    assert is_beaten(facts(moe=60.0, static=52.0))
    # An interval of the ratio that holds one proves nothing; one that does not proves it where those to dense overlap.
    assert not is_beaten(facts(moe=60.0, static=59.0, paired=0.02))
    assert is_beaten(facts(moe=60.0, static=59.0, spread=0.02, paired=0.005))
    # Nor does a run that did not compare the two on the same blocks.
    assert not is_beaten(facts(moe=60.0, static=52.0, paired=None))
    assert not is_beaten(facts(moe=52.0, static=60.0))
    # A control that is slower than the mixture in most regimes leaves it a reason to be.
    assert not is_beaten(facts(moe=60.0, static=52.0, static_speed=0.9))
    # Without speeds quality decides.
    assert is_beaten(facts(moe=60.0, static=52.0, speeds={}))


def test_a_control_of_another_size_is_none() -> None:
    found = bench(moe=60.0, static=52.0)
    found.models[2] = results.model("static", "static", 0.75, 0.75)
    assert facts_of(found, found.models[1]).control is None
    assert advise(facts_of(found, found.models[1])).level == "partly"


def test_of_several_controls_the_hardest_to_beat_counts() -> None:
    found = bench(moe=60.0, static=80.0)
    found.models.append(results.model("better", "static", 0.5, 0.51))
    found.quality.append(results.quality("better", 70.0, 50.0))
    control = facts_of(found, found.models[1]).control
    assert control is not None
    assert control.model.name == "better"


def test_what_was_lost_and_gained() -> None:
    found = answered(facts(moe=60.0, static=80.0, speeds=MIXED))
    assert found.lost[0] == "Perplexity is 20 % higher (95 % interval of the ratio: 1.18 to 1.22)."
    assert any(
        line.startswith("Slower for decode at batch 8, and prefill at batch 1, down to 0.70x") for line in found.lost
    )
    assert "Faster for decode at batch 1, up to 1.20x." in found.gained
    closed = 1 - math.log(1.2) / math.log(1.6)
    assert any(line.startswith("Better than plain pruning") and f"{closed:.0%}"[:-1] in line for line in found.gained)
    worse = answered(facts(moe=60.0, static=52.0, speeds=SLOW))
    assert "No speed: nowhere faster than the dense model." in worse.gained
    assert any(line.startswith("Worse than plain pruning") for line in worse.lost)
    # Not shown to be better is no loss.
    same = answered(facts(moe=60.0, static=60.0))
    assert not any("plain pruning" in line for line in same.lost)
    said = "Not shown to be better than plain pruning to the same active size: perplexity is 1.000 times its"
    assert same.gained[-1] == f"{said} (0.990 to 1.010)."
    alone = answered(facts(moe=60.0, static=60.0, paired=None))
    assert not any("plain pruning" in line for line in (*alone.lost, *alone.gained))


def test_a_run_that_cannot_tell_says_so() -> None:
    found = bench(moe=60.0, speeds=SLOW)
    found.verdicts = [dataclasses.replace(row, outcome="cannot tell") for row in found.verdicts]
    said = answered(facts_of(found, found.models[1]))
    assert "No speed: nowhere shown to be faster than the dense model." in said.gained
    assert "nowhere shown to be faster than the dense model" in said.advice.sentence
    assert not any("lower" in line for line in said.lost)


def test_memory_and_disk_count_in_both_directions() -> None:
    dense = results.model("dense", "dense")
    assert dense.peak_memory_bytes is not None
    less = facts(speeds=SLOW, moe_changes={"peak_memory_bytes": dense.peak_memory_bytes // 2})
    assert "50 % less memory" in advise(less).sentence
    assert "50 % less memory." in answered(less).gained
    more = answered(facts(moe_changes={"bytes_on_disk": 2 * dense.bytes_on_disk}))
    assert "The checkpoint is 2.00 times as large." in more.lost
    assert facts(moe_changes={"peak_memory_bytes": None}).memory is None


def test_several_prompt_lengths_are_told_apart() -> None:
    found = bench(moe=50.0)
    found.verdicts = [
        results.verdict("moe", "decode", batch, prompt, times)
        for batch, prompt, times in ((1, 128, 1.2), (8, 128, 1.1), (1, 2048, 1.3), (8, 2048, 0.8))
    ]
    sentence = advise(facts_of(found, found.models[1])).sentence
    assert "decode at batch 1 and 8 of 128 tokens, at batch 1 of 2,048 tokens" in sentence
    assert "keep the dense model for decode at batch 8 of 2,048 tokens" in sentence


def in_llama_cpp(decode: float, prefill: float, **changes: Any) -> Facts:
    found = results.in_llama_cpp(bench(**changes), decode, prefill)
    return facts_of(found, found.models[1])


def readers(subject: Facts) -> dict[str, tuple[str, str]]:
    return {one.reader: (one.advice.level, one.advice.sentence) for one in answered(subject).readers if not one.command}


def test_a_file_that_is_faster_in_llama_cpp_is_a_gain() -> None:
    """Slower in transformers on a CPU, where experts cost most, says nothing about a file."""
    said = answered(in_llama_cpp(0.74, 0.95, moe=52.0, speeds=SLOW))
    assert said.advice.level == "partly"
    assert "faster for decode and prefill in llama.cpp" in said.advice.sentence
    assert "Keep the dense model for decode at batch 1, and prefill at batch 1." in said.advice.sentence
    assert "In llama.cpp q8_0 decode takes 0.74 and prefill takes 0.95 of the dense model's time." in said.gained
    assert not any("No speed" in line for line in said.gained)


def test_a_file_that_is_faster_with_some_threads_says_with_which() -> None:
    found = results.in_llama_cpp(bench(moe=50.1, speeds=SLOW), 0.74, 0.95)
    found.engine_speed.append(results.engine_speed("moe", "decode", 1.3, threads=8))
    said = advise(facts_of(found, found.models[1])).sentence
    assert "faster for decode (llama.cpp q8_0, 1 thread) and prefill in llama.cpp" in said
    assert "and decode (llama.cpp q8_0, 8 threads) in llama.cpp" in said


def test_each_reader_gets_the_advice_of_what_concerns_them() -> None:
    found = readers(in_llama_cpp(0.74, 0.95, moe=50.1, speeds=SLOW))
    assert list(found) == ["A file on a CPU (llama.cpp)", "A CPU (transformers)"]
    assert found["A file on a CPU (llama.cpp)"][0] == "yes"
    assert found["A file on a CPU (llama.cpp)"][1].startswith("Use it: faster for decode and prefill in llama.cpp")
    assert found["A CPU (transformers)"][0] == "no"
    # Slower files do not help those who have a faster transformers.
    found = readers(in_llama_cpp(1.2, 1.3, moe=50.1))
    assert (found["A file on a CPU (llama.cpp)"][0], found["A CPU (transformers)"][0]) == ("no", "yes")
    # A file that pruning beats in quality and time.
    found = readers(in_llama_cpp(0.74, 0.95, moe=60.0, static=52.0))
    assert found["A file on a CPU (llama.cpp)"][1].startswith("Do not use it: plain pruning")


def test_a_gpu_server_and_a_single_user_are_two_readers() -> None:
    mixed: Mapping[tuple[Phase, int], float] = {("decode", 1): 1.3, ("decode", 64): 0.8, ("prefill", 64): 0.7}
    found = bench(moe=50.1, speeds=mixed)
    found.machine = {"device": "NVIDIA H100"}
    levels = {reader: level for reader, (level, _) in readers(facts_of(found, found.models[1])).items()}
    assert levels == {"A GPU, one request at a time": "yes", "A GPU server, many requests at once": "no"}


def test_what_was_not_measured_comes_with_a_command_that_measures_it(capfd: pytest.CaptureFixture[str]) -> None:
    missing = {one.reader: one for one in answered(facts()).readers if one.command}
    assert list(missing) == [
        *("A file on a CPU (llama.cpp)", "A GPU, one request at a time", "A GPU server, many requests at once"),
        "A GPU that the model does not fit",
    ]
    for reading in missing.values():
        assert reading.advice.level == "unknown"
        # Understood to the end: models of these names are not there, which is another error than a wrong option.
        assert run_command(shlex.split(reading.command)[1:]) in (2, 3)
        assert shlex.split(reading.command).count("-o") <= 1
        said = capfd.readouterr().err
        assert "option" not in said, said
    small = missing["A GPU that the model does not fit"]
    assert "It needs 1.00 of the dense model's memory, and a token reads" in small.advice.sentence
    assert "Plain pruning to the same active size needs 0.70 of the memory." in small.advice.sentence
    assert small.command == "moeify plan smollm2-135m.gguf --vram 6GB --gpu-bandwidth 250"


def test_quality_that_only_llama_cpp_measured_is_told_and_gives_no_advice() -> None:
    found = bench(moe=None, speeds={})
    found.engine_files = [EngineFile("moe", "llama.cpp", "q8_0", 10**8, 54.0, 1.0, 1.08)]
    advice = advise(facts_of(found, found.models[1]))
    assert (advice.level, "In llama.cpp its perplexity is 1.08 (q8_0) times" in advice.sentence) == ("unknown", True)


def test_only_the_embedded_model_is_a_demonstration() -> None:
    found = bench()
    assert demonstration(found) == ""
    found.models[0] = dataclasses.replace(found.models[0], path="builtin")
    assert demonstration(found).startswith("This is a demonstration: the embedded model has 134.4 M parameters")
