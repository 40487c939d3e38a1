"""The part of the calibration tokens that is this process's own, and what it tells the others about it.

    share = joined()                      # under torchrun; ALONE in a process by itself
    inputs = share.parts(inputs, C)       # this process's blocks; those of all follow one another in order of rank
    gram_DD = share.sum(inputs_TD.T @ inputs_TD)
    labels_F = share.first(decide)        # decided in one process, known in all

Legend: B blocks of C tokens, T tokens.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from moeify.errors import InputError, MoeifyError, UsageError
from moeify.models.ffn import CHUNK_TOKENS
from moeify.models.inputs import Inputs, some_blocks
from moeify.models.inputs import num_blocks as blocks_of

Value = TypeVar("Value")
# The others wait while the first process writes the checkpoint; torchrun ends them if it fails.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Share:
    """One of several processes that calibrate together.

    Args:
        rank: of this process.
        size: how many they are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """It decides and writes."""
        return self.rank == 0

    def part(self, ids_BC: Tensor) -> Tensor:
        """This process's blocks of text."""
        return self.parts({"": ids_BC}, ids_BC.shape[1])[""]

    def parts(self, inputs: Inputs, context: int) -> dict[str, Tensor]:
        """This process's blocks, at whole chunks where there are enough, so that products have the same shapes.

        Args:
            inputs: of the model, by name.
            context: tokens of a block.

        Raises:
            UsageError: there is not a block for everyone.
        """
        num_blocks = blocks_of(inputs)
        if num_blocks < self.size:
            raise UsageError(
                f"{num_blocks} blocks of {context:,} calibration tokens cannot be shared by {self.size} processes",
                f"--tokens {self.size * context} and more, or fewer processes",
            )
        step = max(1, CHUNK_TOKENS // context)
        step = step if num_blocks // step >= self.size else 1
        ends = [num_blocks // step * rank // self.size * step for rank in range(self.size)] + [num_blocks]
        return some_blocks(inputs, slice(ends[self.rank], ends[self.rank + 1]))

    def place(self, num_rows: int) -> tuple[int, int]:
        """Rows before this process's own, and rows of all."""
        counts = self._gathered(num_rows)
        return sum(counts[: self.rank]), sum(counts)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes; in place where there are several."""
        return self._reduce(values, "SUM")

    def max(self, values: Tensor) -> Tensor:
        """The largest of all processes, one by one."""
        return self._reduce(values, "MAX")

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order."""
        return rows if self.size == 1 else torch.cat(self._gathered(rows.cpu())).to(rows.device)

    def first(self, decide: Callable[[], Value]) -> Value:
        """What the first process decides; an error of its is everybody's."""
        if self.size == 1:
            return decide()
        answer: list[Any] = [None]
        if self.is_first:
            try:
                answer = [(decide(), None)]
            except MoeifyError as error:
                self._tell([(None, (type(error), str(error), error.hint))])
                raise
        value, failure = self._tell(answer)[0]
        if failure is not None:
            kind, message, hint = failure
            raise kind(message, hint)
        return cast("Value", value)

    @staticmethod
    def _tell(answer: list[Any]) -> list[Any]:
        import torch.distributed as processes

        with _together():
            processes.broadcast_object_list(answer, src=0)
        return answer

    def _gathered(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        import torch.distributed as processes

        values: list[Any] = [None] * self.size
        with _together():
            processes.all_gather_object(values, value)
        return values

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        if self.size == 1:
            return values
        import torch.distributed as processes

        on_cpu = values.cpu().contiguous()
        with _together():
            processes.all_reduce(on_cpu, op=getattr(processes.ReduceOp, how))
        return values.copy_(on_cpu)


ALONE = Share()


@contextmanager
def _together() -> Iterator[None]:
    """Talk to the other processes.

    Raises:
        InputError: one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise InputError("another process of this run has stopped", "its own message says why") from error


def joined() -> Share:
    """This process among those that torchrun started; ALONE if nothing started several.

    They speak through gloo, also of tensors that lie on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch.distributed as processes

    if not processes.is_initialized():
        processes.init_process_group("gloo", timeout=PATIENCE)
    return Share(processes.get_rank(), processes.get_world_size())
