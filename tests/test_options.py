"""A machine in words: what `moeify plan` takes, and the same in one word for `moeify split --for`."""

import shlex
from collections.abc import Mapping
from typing import Any

import pytest

from moeify.command_line import command_line
from moeify.errors import UsageError
from moeify.options import MachineOptions, SplitOptions

WORDS = {
    "vram=6GB,gpu=250,ram=50": MachineOptions(vram="6GB", gpu_bandwidth=250.0, ram_bandwidth=50.0),
    "ram=32GB, ram=50": MachineOptions(ram="32GB", ram_bandwidth=50.0),
    "ram-bandwidth=9.5,threads=2,type=q4_k": MachineOptions(ram_bandwidth=9.5, threads=2, type="q4_k"),
    "vram=0,quality=1.2,context=512": MachineOptions(vram="0", quality=1.2, context=512),
}


@pytest.mark.parametrize(("text", "options"), WORDS.items())
def test_words_of_a_machine_are_its_options(text: str, options: MachineOptions) -> None:
    assert MachineOptions.of_text(text) == options


REFUSED = {
    "vram": "'vram' is unknown",
    "vram=": "'vram=' is unknown",
    "cpu=5": "'cpu=5' is unknown",
    "": "'' is unknown",
    "ram=50,": "'' is unknown",
    "ram=50,ram=60": "'ram=60' is there twice",
    "vram=6": "--vram '6': expected a size with its unit",
    "vram=-6GB": "--vram '-6GB': expected a size",
    "ram=many": "--ram 'many': expected a size",
    "gpu=fast": "--gpu-bandwidth fast: expected a number",
    "gpu=-1": "--gpu-bandwidth -1.0 is out of range",
    "gpu=0": "--gpu-bandwidth 0.0 is out of range",
    "ram=nan": "--ram 'nan': expected a size",
    "ram-bandwidth=nan": "--ram-bandwidth nan is out of range",
    "ram-bandwidth=1e9": "--ram-bandwidth 1000000000.0 is out of range",
    "type=q9": "'q9' is not a value of --type",
    "context=0": "--context 0 is out of range",
    "threads=0": "--threads 0 is out of range",
    "quality=0.9": "--quality 0.9 is out of range",
    "quality=inf": "--quality inf is out of range",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items())
def test_other_words_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        MachineOptions.of_text(text)
    assert caught.value.hint
    if text:
        with pytest.raises(UsageError, match=message):
            SplitOptions(machine=text)


def test_a_machine_is_repeated_as_it_was_given() -> None:
    line = command_line("split", "m", SplitOptions(machine="vram=6GB,gpu=250,ram=50"))
    assert shlex.split(line) == ["moeify", "split", "m", "--for", "vram=6GB,gpu=250,ram=50"]


LAYOUTS = {
    "--experts": {"experts": 32},
    "--shared": {"shared": 1},
    "--active": {"active": 3},
    "--budget": {"budget": 0.5},
    "--plan": {"plan": "p"},
    "--static": {"static": True},
    "--dense-layers": {"dense_layers": (1,)},
    "--active-by-layer": {"active_by_layer": (3, 4)},
    "--experts-by-layer": {"experts_by_layer": (8, 4)},
    "--static-layers": {"static_layers": (1,)},
    "--mixing": {"mixing": "soft"},
    "--engine": {"engine": "vllm"},
}


@pytest.mark.parametrize(("flag", "options"), LAYOUTS.items(), ids=LAYOUTS)
def test_a_machine_and_a_layout_exclude_each_other(flag: str, options: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--for chooses the layout, {flag} as well") as caught:
        SplitOptions(machine="ram=50", **options)
    assert caught.value.hint == f"leave {flag} out"
