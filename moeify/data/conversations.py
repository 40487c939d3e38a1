"""Conversations that a model has with itself: it asks in the place of a user, and answers.

After the words that its chat template puts before a question, a model for chats writes a question (Magpie,
https://arxiv.org/abs/2406.08464). Whoever learns from such text sees answers as the teacher gives them, with the token
that ends them.

Shapes: B blocks.
"""

from collections import deque
from collections.abc import Collection

from torch import Tensor

from moeify.models.chat import Turns

# At 1 SmolLM2-135M-Instruct's own questions and answers lose their thread: of 18 answers in 16 blocks of 512 tokens 5
# ended. At 0.8 and 0.7 12 of 26 did and 2 looped; with answers at 0.5 12 and 2, at 0.3 10 and 5.
QUESTION_TEMPERATURE = 0.8
ANSWER_TEMPERATURE = 0.7


class Conversations:
    """Leads every second row of a batch through questions and answers; the others write as they like.

    Args:
        turns: what the template puts between them.
        ends: tokens by which the model ends a text.
        num_rows: B.
    """

    def __init__(self, turns: Turns, ends: Collection[int], num_rows: int) -> None:
        self._turns, self._ends = turns, {*ends, turns.answer[0], turns.next[0]}
        # Of each row that is led: the tokens that come next, whatever the model draws.
        self._forced = {row: deque(turns.opening) for row in range(1, num_rows, 2)}
        self._answers = dict.fromkeys(self._forced, False)

    def temper(self, logits_BV: Tensor) -> Tensor:
        """Logits of the next token, those of led rows at their temperature."""
        tempered_BV = logits_BV.clone()
        for row, answers in self._answers.items():
            tempered_BV[row] /= ANSWER_TEMPERATURE if answers else QUESTION_TEMPERATURE
        return tempered_BV

    def follow(self, drawn_B1: Tensor) -> Tensor:
        """The tokens that are written in place of those that were drawn."""
        written_B1 = drawn_B1.clone()
        for row, forced in self._forced.items():
            if not forced and int(drawn_B1[row]) in self._ends:
                # A question always ends as the template says, an answer as the model does.
                question = not self._answers[row]
                forced.extend(self._turns.answer if question else (int(drawn_B1[row]), *self._turns.next[1:]))
                self._answers[row] = question
            if forced:
                written_B1[row] = forced.popleft()
        return written_B1


def leads(turns: Turns | None, context: int) -> bool:
    """Whether a block has room for a conversation: the template takes less than half of it."""
    return turns is not None and 2 * len((*turns.opening, *turns.answer, *turns.next)) < context
