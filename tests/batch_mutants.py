"""The batch with one mistake each, made by changing a line, and the test that refuses it.

`python -m tests.batch_mutants` prints the table of docs/batches.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from textwrap import dedent
from types import FunctionType
from typing import Final, final

import pytest
from attrs import frozen

from specflow.batch import BatchPredictor, Shared, many, ragged
from specflow.batch import hub as hubs
from specflow.batch.sharing import Waiting, in_turns
from specflow.caches import Row, Shelf
from specflow.predictors.memo import Memo, Memos
from tests import test_batch as batch
from tests import test_batch_laws as laws
from tests import test_caching as caching
from tests import test_hub as hub


@final
@frozen(eq=False)
class BatchMutant:
    """A mistake: in `function` it says `wrong`, where it should say `right`; and the test that must fail."""

    mistake: str
    function: Callable[..., object]
    right: str
    wrong: str
    test: Callable[[], object]

    def make(self, patch: pytest.MonkeyPatch) -> None:
        """Changes the function, wherever it is known."""
        function = self.function
        assert isinstance(function, FunctionType)
        source = dedent(inspect.getsource(function))
        assert source.count(self.right) == 1, f"{self.right} is there {source.count(self.right)} times"
        changed: dict[str, FunctionType] = {}
        flags = annotations.compiler_flag
        exec(compile(source.replace(self.right, self.wrong), __file__, "exec", flags), function.__globals__, changed)
        patch.setattr(function, "__code__", changed[function.__name__].__code__)

    @property
    def refused_by(self) -> str:
        """The test, by its file and name."""
        test = self.test.func if isinstance(self.test, partial) else self.test
        assert isinstance(test, FunctionType)
        return f"{test.__module__.removeprefix('tests.')}.py::{test.__name__}"


SCRIPT: Final = partial(batch.test_any_script_of_readings_is_that_of_fresh_passes, 0)
WINDOWED: Final = next(each for each in batch.FAMILY if each.kind == "mistral")

MUTANTS: Final = (
    BatchMutant(
        "replies that reach the wrong decodes",
        hubs._pass,
        "zip(numbers, replies, strict=True)",
        "zip(numbers, replies[::-1], strict=True)",
        partial(hub.test_every_text_is_the_text_that_it_is_alone, 7),
    ),
    BatchMutant(
        "a decode that goes on with the reply that it had before",
        hubs._resumed,
        "task.switch(*reply)",
        'task.switch(*(reply and task.__dict__.setdefault("reply", reply)))',
        partial(hub.test_every_text_is_the_text_that_it_is_alone, 2),
    ),
    BatchMutant(
        "two replies at once to who waits for one",
        hubs._pass,
        "if reply is None:",
        "if reply is None and len(numbers) > 2:",
        hub.test_two_decodes_in_every_order,
    ),
    BatchMutant(
        "one more decode than there are slots",
        hubs._running,
        "len(hub.tasks) < slots",
        "len(hub.tasks) <= slots",
        partial(hub.test_every_text_is_the_text_that_it_is_alone, 2),
    ),
    BatchMutant(
        "a decode that fails ends the others",
        hubs._caught,
        "except Exception as error",
        "except LookupError as error",
        hub.test_what_one_decode_raises_ends_that_one_alone,
    ),
    BatchMutant(
        "an iterator that is closed leaves its decodes where they wait",
        hubs._running,
        "unwinding.callback(_unwind, hub)",
        "pass",
        hub.test_one_that_raises_while_it_unwinds_does_not_keep_the_others_from_it,
    ),
    BatchMutant(
        "torch's modes that a decode sets reach the next one",
        Shared.__call__,
        "with within(hub.modes):",
        "if True:",
        partial(hub.test_each_decode_keeps_torchs_modes_as_it_sets_them, "no gradients"),
    ),
    BatchMutant(
        "torch's modes that the caller sets reach a decode",
        hubs._resumed,
        "with within(hub.modes):",
        "if True:",
        hub.test_modes_that_the_caller_sets_between_two_texts_reach_no_decode,
    ),
    BatchMutant(
        "one pass for those who wait in other modes",
        hubs._pass,
        "groups.setdefault((wait.read, wait.modes), [])",
        "groups.setdefault((wait.read, hub.modes), [])",
        partial(hub.test_each_decode_keeps_torchs_modes_as_it_sets_them, "as the caller"),
    ),
    BatchMutant(
        "the model with the fewest askers goes first",
        hubs._pass,
        "max(groups, key=lambda group: len(groups[group]))",
        "min(groups, key=lambda group: len(groups[group]))",
        hub.test_of_several_models_the_one_with_the_most_askers_goes_first,
    ),
    BatchMutant(
        "a text drawn from what another text asked for",
        hubs._replies,
        "replies: object = read(asked)",
        "replies: object = read([*asked[1:], *asked[:1]])",
        partial(laws.test_two_texts_of_any_decoder_are_exact_and_independent, "autoregressive"),
    ),
    BatchMutant(
        "another text's memo taken for one's own",
        Memo.covers,
        "return common_prefix(self.tokens, tokens)",
        "return min(len(self.tokens), len(tokens))",
        SCRIPT,
    ),
    BatchMutant(
        "the memo of a text that goes on, taken without a copy",
        Memos.take,
        "best = evolve(best, past=deepcopy(best.past), tokens=[*best.tokens])",
        "pass",
        batch.test_one_prompt_of_many_samples_is_read_once,
    ),
    BatchMutant("drafts that are not settled", Memo.settle, "if self.tree.drafted:", "if False:", SCRIPT),
    BatchMutant(
        "the first drafts kept, not those that were accepted",
        Memo.settle,
        "self.past.keep(len(self.tokens), path)",
        "self.past.keep(len(self.tokens), list(range(len(path))))",
        SCRIPT,
    ),
    BatchMutant(
        "a window whose mask lags one token",
        ragged._masks,
        "seen <= piece.positions[:, None] - window",
        "seen < piece.positions[:, None] - window",
        partial(batch.test_every_architecture_says_in_a_batch_what_it_says_alone, WINDOWED),
    ),
    BatchMutant(
        "positions that lag one token after the first pass",
        ragged._of_rows,
        "spot.tokens] = spot.piece.positions",
        "spot.tokens] = (spot.piece.positions - int(spot.piece.row.length > 0))",
        SCRIPT,
    ),
    BatchMutant(
        "positions of a tree as if it were a chain",
        ragged._of_rows,
        "spot.tokens] = spot.piece.positions",
        "spot.tokens] = spot.piece.row.length + torch.arange(len(spot.piece.ids))",
        SCRIPT,
    ),
    BatchMutant(
        "a tree whose siblings see each other",
        ragged._masks,
        "~lineage(piece.parents)",
        "~lineage(range(-1, len(piece.ids) - 1))",
        SCRIPT,
    ),
    BatchMutant(
        "a text that sees those to its left in its row",
        ragged._masks,
        "own[:, :covered] = False",
        "hidden[spot.row, 0, spot.tokens, : spot.keys.start + covered] = False",
        SCRIPT,
    ),
    BatchMutant(
        "the last rows of a row, whoever's they are",
        ragged._of_rows,
        "stop = read.logits.shape[1] - (layout.k - spot.tokens.stop)",
        "stop = read.logits.shape[1]",
        SCRIPT,
    ),
    BatchMutant(
        "keys that a layer shows further left than its masks",
        ragged._Writing.shown,
        "room[spot.row, :, spot.keys]",
        "room[spot.row, :, : spot.piece.covered]",
        SCRIPT,
    ),
    BatchMutant(
        "the first rows of a shelf shown, whoever's they are",
        ragged._Writing.__attrs_post_init__,
        "slice(beside.start, beside.stop) if numbers == [*beside] else numbers",
        "slice(0, len(numbers))",
        SCRIPT,
    ),
    BatchMutant(
        "keys of one text written to another's row",
        ragged._Writing.write,
        "held[number, :, place]",
        "held[number.flip(0), :, place]",
        SCRIPT,
    ),
    BatchMutant(
        "a text that moves to a longer row and leaves its keys behind",
        Row._move,
        "self.shelf.copy(self.number, shelf, number, self.length)",
        "pass",
        batch.test_texts_of_which_one_outgrows_its_shelf_are_read_together,
    ),
    BatchMutant(
        "a copy of a text that has nothing in its row",
        Row.__deepcopy__,
        "self.shelf.copy(self.number, other.shelf, other.number, self.length)",
        "pass",
        SCRIPT,
    ),
    BatchMutant(
        "a row that is not given back",
        Row.__del__,
        "self.shelf.give_back(self.number)",
        "pass",
        batch.test_texts_stay_side_by_side_while_some_end_and_others_begin,
    ),
    BatchMutant(
        "a row with what the text before has left in it",
        Shelf.take,
        "held[number].zero_()",
        "pass",
        caching.test_a_row_that_is_taken_again_hides_nothing_that_was_left_in_it,
    ),
    BatchMutant(
        "no room made before new texts are read",
        Memos.make_room,
        "len(self._kept) + new > self.most",
        "False",
        batch.test_texts_stay_side_by_side_while_some_end_and_others_begin,
    ),
    BatchMutant(
        "an answer after the first piece of a long prompt",
        BatchPredictor._part,
        "1), len(ids))",
        "1), len(ids), tree)",
        batch.test_a_long_prompt_is_read_in_pieces_while_the_others_go_on,
    ),
    BatchMutant(
        "a long prompt that is read in one piece",
        BatchPredictor._part,
        "if len(piece) > self.piece:",
        "if False:",
        batch.test_a_long_prompt_is_read_in_pieces_while_the_others_go_on,
    ),
    BatchMutant(
        "a text beyond the slots in the place of a prompt that is half read",
        in_turns,
        "if any(reply is None for reply in replies)",
        "if False",
        partial(batch.test_more_askers_than_slots_whose_prompts_are_read_in_pieces_all_come_to_an_end, 1),
    ),
    BatchMutant(
        "a text whose logits are not finite, and its neighbour in the row",
        BatchPredictor._read,
        "if rows is None or not _is_finite(rows):",
        "if rows is None:",
        batch.test_one_text_whose_logits_are_not_finite_leaves_the_others_theirs,
    ),
    BatchMutant(
        "what is wrong with one text is told to all",
        BatchPredictor._read,
        "replies[i] = error",
        "return [error] * len(asked)",
        batch.test_what_is_wrong_with_one_text_is_its_own,
    ),
    BatchMutant(
        "what was read of other weights is kept",
        BatchPredictor._meet,
        "if self._trials.renewed:",
        "if False:",
        batch.test_what_was_read_of_other_weights_is_forgotten,
    ),
    BatchMutant(
        "one prompt read by each of its samples",
        Waiting.waits,
        "return bool(ahead)",
        "return False",
        batch.test_one_prompt_of_many_samples_is_read_once,
    ),
    BatchMutant(
        "a prompt awaited again and again that there is no room for",
        Waiting.waits,
        "self._waited.add(asked)",
        "pass",
        batch.test_nobody_waits_again_for_a_prefix_that_there_is_no_room_to_keep,
    ),
    BatchMutant(
        "memory without a bound",
        Memos.put,
        "len(self._kept) > 1 and self._is_full",
        "False",
        partial(batch.test_memory_is_bounded_by_texts_or_by_tokens, 64),
    ),
    BatchMutant(
        "the newest memo forgotten, not the oldest",
        Memos._drop,
        "next((memo for memo in reversed(some) if memo.owner() is None), some[-1])",
        "some[0]",
        batch.test_of_a_chats_next_turn_only_the_new_tokens_are_read_whoever_spoke_between,
    ),
    BatchMutant(
        "texts in the order in which they end",
        many.generate_many,
        "[ends[number] for number in range(len(states))]",
        "list(ends.values())",
        batch.test_a_text_that_ends_first_keeps_its_place,
    ),
    BatchMutant(
        "one seed for all texts",
        many.seed_of,
        'f"{seed}/{number}"',
        'f"{seed}"',
        partial(batch.test_many_texts_of_a_seed_depend_on_nothing_else, None),
    ),
)


def table() -> str:
    """The mistakes and what refuses them, in Markdown."""
    rows = [f"| {mutant.mistake} | `{mutant.refused_by}` |" for mutant in MUTANTS]
    return "\n".join(["| the mistake | the test that refuses it |", "|---|---|", *rows])


if __name__ == "__main__":
    print(table())
