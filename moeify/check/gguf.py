"""`moeify verify FILE.gguf`: a file for llama.cpp is the dense model, cut; read back without llama.cpp.

Legend: F neurons, f those of one expert, R routed experts, D hidden size.

Nothing of the writer is used, and no plan: each neuron's rows are looked up among those of the dense model, rounded to
the file's own type. What the model makes of a text is not computed here: llama.cpp's llama-perplexity does that.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.check.contents import Check
from moeify.check.gguf_file import GGUFFile, Stored, digests, encoded
from moeify.check.gguf_metadata import metadata_difference, text_difference
from moeify.check.gguf_tensors import carried_check, routers_check
from moeify.check.verify import VerifyReport
from moeify.errors import InputError
from moeify.models.dense import DenseModel, open_dense
from moeify.models.ffn import FFNWeights
from moeify.options import Track, untracked

# Smallest mean cosine between columns of down_proj and the dense ones of the same neurons: a refit turns them, another
# order of neurons leaves nothing of them.
LEAST_COSINE = 0.5


def verify_gguf(file: str | Path, dense: str | Path | DenseModel, *, track: Track[Any] = untracked) -> VerifyReport:
    """Compare a GGUF of a converted checkpoint with the dense model that it came from.

    Args:
        file: what `moeify export` wrote.
        dense: the dense model.
        track: shows progress.

    Raises:
        InputError: one of them cannot be read, or the file is of another kind of model.
    """
    opened, source = GGUFFile(Path(file)), open_dense(dense, track)
    if opened.num_layers != source.num_layers or source.ffn_shapes.gate_FD is None:
        raise InputError(
            f"{file} has {opened.num_layers} layers of gated experts, {source.name} is another model",
            "name the dense model that it was split from; where layers were dropped, verify the checkpoint's folder",
        )
    metadata, text = metadata_difference(opened, source), text_difference(opened, source)
    dtype = _dtype(opened, source)
    checks = (
        Check("metadata is the dense model's", metadata or "equal", "equal", not metadata),
        Check("text is cut into the dense model's tokens", text or "equal", "equal", not text),
        carried_check(opened, source, dtype),
        *_neuron_checks(opened, source, dtype, track),
        routers_check(opened),
    )
    return VerifyReport(str(file), source.name, checks, None, 0.0)


def _dtype(opened: GGUFFile, source: DenseModel) -> torch.dtype:
    """The type of the checkpoint between both, to which all numbers were rounded first."""
    ffn = source.ffn(0)
    kinds = dict.fromkeys((source.dtype, torch.bfloat16, torch.float16, torch.float32))
    placed = {dtype: _Places.find(opened, ffn, dtype).num_placed for dtype in kinds}
    return max(kinds, key=lambda dtype: placed[dtype])


def _neuron_checks(opened: GGUFFile, source: DenseModel, dtype: torch.dtype, track: Track[Any]) -> list[Check]:
    """Each dense neuron is in the file once, and what it writes is its own."""
    total, rows, placed, cosines = 0, 0, 0, []
    first = ""
    for layer in track(range(source.num_layers), "comparing layers", source.num_layers):
        ffn = source.ffn(layer)
        places = _Places.find(opened, ffn, dtype)
        total, rows, placed = total + ffn.num_neurons, rows + places.num_rows, placed + places.num_placed
        cosines.append(places.cosine(ffn.down_DF))
        if not first and {places.num_rows, places.num_placed} != {ffn.num_neurons}:
            first = f", the first other one in layer {layer}"
    least = min(cosines)
    return [
        Check("neurons", f"{rows:,}", f"{total:,}", rows == total),
        Check("gate and up rows are the dense ones, each once", f"{placed:,}{first}", f"{total:,}", placed == total),
        Check("down columns follow them", f"cosine {least:.3f}", f">= {LEAST_COSINE}", least >= LEAST_COSINE),
    ]


@dataclass(frozen=True)
class _Part:
    """Experts of a layer that lie in one tensor each.

    Args:
        neurons: dense ones, in the order of the file; -1 for a row that none has.
        down_FD: what they write.
    """

    neurons: list[int]
    down_FD: Tensor


@dataclass(frozen=True)
class _Places:
    """Where the neurons of a layer are in a file."""

    parts: tuple[_Part, ...]

    @classmethod
    def find(cls, opened: GGUFFile, ffn: FFNWeights, dtype: torch.dtype) -> "_Places":
        """Look up the rows of a file among the dense ones.

        Args:
            opened: the file.
            ffn: the dense FFN.
            dtype: to which its numbers were rounded before.
        """
        parts, taken = [], set[int]()
        for gate, up, down in _tensors(opened, ffn.layer):
            neurons = _neurons(gate, up, ffn, dtype, taken)
            taken.update(neurons)
            numbers = down.numbers().view(-1, ffn.hidden_size, down.shape[-1])
            parts.append(_Part(neurons, numbers.transpose(1, 2).reshape(-1, ffn.hidden_size)))
        return cls(tuple(parts))

    @property
    def num_rows(self) -> int:
        return sum(len(part.neurons) for part in self.parts)

    @property
    def num_placed(self) -> int:
        return sum(neuron >= 0 for part in self.parts for neuron in part.neurons)

    def cosine(self, down_DF: Tensor) -> float:
        """Mean between what neurons write in the file and in the dense model; 0 if nothing can be compared."""
        cosines = [torch.zeros(0)]
        for part in self.parts:
            if len(part.neurons) == part.down_FD.shape[0]:
                placed = torch.tensor(part.neurons) >= 0
                dense_FD = down_DF.float().T[torch.tensor(part.neurons)[placed]]
                cosines.append(torch.cosine_similarity(part.down_FD[placed], dense_FD, dim=1))
        joined = torch.cat(cosines)
        # Infinite numbers have no direction.
        return float(joined.mean()) if joined.numel() and joined.isfinite().all() else 0.0


def _tensors(opened: GGUFFile, layer: int) -> Iterator[tuple[Stored, Stored, Stored]]:
    """Gate, up and down of routed experts, of shared ones, or of a layer that stays dense."""
    for end in ("_exps", "_shexp", ""):
        parts = [opened.get(layer, f"ffn_{part}{end}") for part in ("gate", "up", "down")]
        if all(part is not None for part in parts):
            yield tuple(parts)  # type: ignore[misc]


def _neurons(gate: Stored, up: Stored, ffn: FFNWeights, dtype: torch.dtype, taken: set[int]) -> list[int]:
    """The dense neuron of each row; rounded to the type of the file, or exactly if it came of such a file."""
    assert ffn.gate_FD is not None
    if gate.shape[-1] != ffn.hidden_size or gate.shape != up.shape:
        return [-1] * gate.rows.shape[0]
    gate_FD, up_FD = ffn.gate_FD.to(dtype).float(), ffn.up_FD.to(dtype).float()
    neurons = _looked_up(
        digests(gate.rows, up.rows), digests(encoded(gate_FD, gate.kind), encoded(up_FD, up.kind)), taken
    )
    if -1 not in neurons:
        return neurons
    numbers = digests(gate.numbers().numpy(), up.numbers().numpy())
    exact = _looked_up(numbers, digests(gate_FD.numpy(), up_FD.numpy()), taken)
    return max(exact, neurons, key=lambda found: sum(neuron >= 0 for neuron in found))


def _looked_up(rows: list[bytes], dense: list[bytes], taken: set[int]) -> list[int]:
    """Where each of some rows is among others, each of which is taken once; -1 for those that are nowhere."""
    free: dict[bytes, list[int]] = defaultdict(list)
    for neuron in reversed(range(len(dense))):
        if neuron not in taken:
            free[dense[neuron]].append(neuron)
    return [free[row].pop() if free.get(row) else -1 for row in rows]
