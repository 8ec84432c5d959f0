"""llama.cpp's memory as the caches of several texts: a sequence for each, and one for each further leaf of a tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, final

from attrs import define, field

from specflow.trees import leaves, path_to

if TYPE_CHECKING:
    from llama_cpp._internals import LlamaContext


@final
@define(eq=False)
class Memory:
    """The cells of a context, which belong to `most` sequences, and the sequences that somebody has.

    Where some layers see a `window` only, which is 0 where all see everything, llama.cpp writes over the cells that it
    has passed, so that a text cannot go back.
    """

    context: LlamaContext
    most: int
    window: int
    _taken: set[int] = field(init=False, factory=set)

    def take(self) -> int:
        """A sequence that nobody has. It is empty."""
        number = next(number for number in range(self.most) if number not in self._taken)
        self._taken.add(number)
        return number

    def give_back_all_but(self, kept: Iterable[int]) -> None:
        """Empty the sequences that nobody has any more."""
        kept = {*kept}
        for number in self._taken - kept:
            self.remove(number, 0)
        self._taken = kept

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let the cells of a sequence at positions from `start` up to `end`, -1 for all, be another one's, too."""
        from llama_cpp import llama_cpp  # noqa: PLC0415 - it may be missing

        llama_cpp.llama_memory_seq_cp(self.context.memory, source, target, start, end)

    def remove(self, number: int, start: int) -> bool:
        """Forget what a sequence has from position `start` on. False where a recurrent state cannot go back."""
        from llama_cpp import llama_cpp  # noqa: PLC0415

        return llama_cpp.llama_memory_seq_rm(self.context.memory, number, start, -1)

    def clear(self) -> None:
        """Forget all, with zeros in every cell: a mask does not hide what is not finite."""
        from llama_cpp import llama_cpp  # noqa: PLC0415

        self._taken.clear()
        if self.context.ctx is not None:
            llama_cpp.llama_memory_clear(self.context.memory, True)


@final
@define(eq=False)
class Line:
    """What the memory holds of one text, in sequence `number`: its first `length` tokens, and then what is forgotten.

    Its rollback is a number, which `settle` makes true before the next pass.
    """

    memory: Memory
    number: int
    length: int = 0
    _held: int = 0
    """How many positions the sequence really has."""
    _branches: dict[int, list[int]] = field(factory=dict)
    """The sequences that the leaves of the last tree have, the first of them this one's own, and the way to each."""

    @property
    def needs_marks(self) -> bool:
        """There are none: what cannot go back is read anew."""
        return False

    @property
    def sequences(self) -> set[int]:
        """All that it has."""
        return {self.number, *self._branches}

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Cover the first `start` tokens and, of the drafts after them, only the `rows`, in order."""
        end = start + len(rows)
        theirs = next((number for number, path in self._branches.items() if rows and rows[-1] in path), self.number)
        if theirs != self.number:
            self.memory.remove(self.number, start)
            self.memory.copy(theirs, self.number, start, end)
            self._held = end
        self.length, self._branches = end, {}

    def go_back(self, keep: int) -> bool:
        """Cover at most `keep` tokens."""
        self.length = min(self.length, keep)
        return True

    def settle(self) -> None:
        """Hold what is covered and nothing else; nothing at all where there is no way back."""
        if self.length < self._held:
            if self.memory.window or not self.memory.remove(self.number, self.length):
                self.memory.remove(self.number, 0)
                self.length = 0
            self._held = self.length

    def branch(self, parents: Sequence[int]) -> list[list[int]]:
        """The sequences that each draft of a tree belongs to; those of the text before it come last."""
        ends = leaves(parents)
        self._branches = {}
        for leaf in ends:
            number = self.memory.take() if self._branches else self.number
            if number != self.number:
                self.memory.copy(self.number, number, 0, -1)
            self._branches[number] = path_to(parents, leaf)
        among = [[number for number, path in self._branches.items() if i in path] for i in range(len(parents))]
        return [*among, [*self._branches] or [self.number]]

    def extend(self, tokens: int, drafts: int) -> None:
        """Cover what was read: so many tokens of the text, and the drafts after them."""
        self._held += tokens + len(self._branches.get(self.number, ()))
        self.length += tokens + drafts

    def __deepcopy__(self, memo: dict[int, object]) -> Line:
        number = self.memory.take()
        self.memory.copy(self.number, number, 0, -1)
        branches = {number if theirs == self.number else theirs: path for theirs, path in self._branches.items()}
        return Line(self.memory, number, self.length, self._held, branches)
