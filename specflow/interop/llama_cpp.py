"""llama.cpp's models as predictors, through llama-cpp-python: `pip install 'specflow[llama-cpp]'`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from logging import CRITICAL, NOTSET, getLogger
from os import PathLike, fspath
from threading import Lock
from typing import TYPE_CHECKING, Final, TypeAlias, cast, final
from weakref import WeakSet, finalize

import torch
from attrs import define, field, frozen
from numpy.ctypeslib import as_array
from torch import Tensor

from specflow.batch import Asked, Reply, Shared
from specflow.batch.sharing import Waiting, in_turns, note_pass
from specflow.errors import DecodeError, said
from specflow.guards.checks import MOST, a, each, or_none, shown, valid, whole
from specflow.guards.finite import finite
from specflow.guards.ids import ids_of, text_of
from specflow.interop.llama_memory import Line, Memory
from specflow.paths import path_by_path
from specflow.policies import CostMeter
from specflow.predictors.memo import DRAFTS, NO_TREE, Memo, Memos, Tree
from specflow.protocols import Limits
from specflow.state import Proposal, Tokens, chain
from specflow.trees import depths, leaves

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp._internals import LlamaContext, LlamaModel
    from llama_cpp.llama_cpp import llama_batch, llama_context_params

INSTALL: Final = "pip install 'specflow[llama-cpp]'"

USUAL_CONTEXT: Final = 4096
"""The most tokens of a text where none are named: a model's whole context may take more memory than there is."""

SEQUENCES: Final = 256
"""How many sequences llama.cpp's memory has at most."""


@final
@define(eq=False)
class LlamaCpp:
    """A GGUF file, or a `Llama`, as llama.cpp runs it: a predictor like any other, on its own KV memory.

    `predict(text, drafts)` gives logits [n + 1, V] in fp32, as `CachedPredictor` does, and the same laws hold: it is
    the row of a fresh pass over each prefix, within llama.cpp's rounding, or an error. Only rows that are asked for are
    computed. A pass that fails or is interrupted loses the memory and never leaves a wrong one. Threads may share it.

    In `together` one pass answers all who ask, up to `slots` at a time, as in a `BatchPredictor`. As many texts are
    kept, each a sequence of the memory. A text starts from the longest prefix that any of them holds, without a copy;
    where several begin with one prompt, one reads it. A pass takes as many tokens as a batch of llama.cpp (`n_batch`):
    the few of those who go on, and of longer prompts what there is room for beside them. Where it fails, those who
    were in it are read one by one, so that what is wrong with one text is raised in its decode alone.

    A `Llama` lends its weights and its settings; its own context is not touched, and has to stay open. `context` is the
    most tokens of a text, drafts included: that of the `Llama`, or `USUAL_CONTEXT` and no more than the model was
    trained for. The memory takes slots × context tokens. A tree of up to `leaves` paths, 256 / slots - 1 at most, is
    read in one pass, a sequence of the memory for each of them; wider ones, and those of models with recurrent layers,
    path by path, and by themselves. Such models cannot go back, so that a text of which drafts were rejected is read
    anew. `meter` hears what passes take, but those that read a prompt, or a few texts of many slots.

    `DecodeError` where llama-cpp-python is missing, for what it cannot load, a `Llama` with an adapter, encoders,
    models of diffusion, attention that is not causal, ids that the model does not have, a text beyond the context,
    where a pass fails, and for logits that are not finite.
    """

    source: str | PathLike[str] | Llama
    context: int | None = field(default=None, validator=valid(or_none(whole(1, "give a number of tokens", MOST))))
    leaves: int = field(default=16, validator=valid(whole(1, "a tree has one leaf at least", 64)))
    slots: int = field(default=1, validator=valid(whole(1, "read one text at least", SEQUENCES // 2)))
    meter: CostMeter = field(
        factory=CostMeter, repr=False, kw_only=True, validator=valid(a(CostMeter, "give CostMeter()"))
    )
    _limits: Limits = field(init=False, repr=False)
    _context: LlamaContext = field(init=False, repr=False)
    _batch: llama_batch = field(init=False, repr=False)
    _most: int = field(init=False, repr=False)
    _widest: int = field(init=False, repr=False)
    """How many leaves a tree has at most that is read in one pass."""
    _memory: Memory = field(init=False, repr=False)
    _memos: Memos[Line] = field(init=False, repr=False)
    _waiting: Waiting = field(init=False, factory=Waiting, repr=False)
    _begun: WeakSet[Asked] = field(init=False, factory=WeakSet, repr=False)
    """Who asked about a text of which some was read in an earlier pass."""
    _unread: int = field(init=False, default=0, repr=False)
    """How many tokens before the drafts were never read before this pass; `MOST` where a text is a new one."""
    _lock: Lock = field(init=False, factory=Lock, repr=False)

    def __attrs_post_init__(self) -> None:
        check_installed()
        from llama_cpp import Llama, llama_cpp  # noqa: PLC0415 - it may be missing
        from llama_cpp._internals import LlamaContext  # noqa: PLC0415

        given: object = self.source
        if isinstance(given, Llama):
            model, settings, context = _lent(given)
        elif isinstance(given, str | PathLike) and str(given):
            model, settings, context = _loaded(fspath(given))
            finalize(self, model.close)  # with its contexts, of which llama-cpp-python frees none before
        else:
            remedy = "give the path of a GGUF file, or a Llama"
            raise DecodeError("source", "this is no model of llama.cpp", shown(given), remedy)
        _refuse_encoders(model, given)
        slots, context = int(self.slots), int(self.context or context)
        self._widest = 1 if _is_recurrent(model) else min(int(self.leaves), SEQUENCES // slots - 1)
        settings.n_seq_max = slots * (self._widest + 1)  # new texts have theirs before those that they replace go
        settings.n_ctx = max(slots * context, settings.n_seq_max)
        settings.n_batch = min(settings.n_ctx, max(settings.n_batch, 32, settings.n_seq_max))  # or llama.cpp aborts
        settings.embeddings = False
        settings.kv_unified = settings.swa_full = True  # so that sequences share cells, and windows can go back
        try:
            self._context = LlamaContext(model=model, params=settings, verbose=False)
        except ValueError as error:
            happened, remedy = "llama.cpp cannot make room for its memory", "give a smaller context, or fewer slots"
            raise DecodeError("context", happened, settings.n_ctx, remedy) from error
        finalize(self, self._context.close)  # a model that is lent would hold it, and its memory, as long as it lives
        _refuse_forgetful(self._context, given)
        self._limits = Limits(model.n_vocab(), context)
        self._most = llama_cpp.llama_n_batch(self._context.ctx)
        window = llama_cpp.llama_model_n_swa(model.model) if slots > 1 else 0  # one text lies in order: nothing is lost
        self._memory = Memory(self._context, settings.n_seq_max, window)
        self._memos = Memos(slots)
        self._batch = llama_cpp.llama_batch_init(self._most, 0, self._widest)
        finalize(self, llama_cpp.llama_batch_free, self._batch)

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        return self._limits

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each of the n drafts."""
        return Shared(self.read)(tokens, drafts)

    def read(self, asked: Sequence[Asked], /) -> list[Reply]:
        """The answer to each who asks: its logits, its error, or None while its prompt is being read."""
        each(a(Asked, "give the Asked that came"))("asked", asked)
        with self._lock:
            return in_turns(self._read, asked, self.slots)

    def prune(self, tokens: Tokens, /) -> None:
        """Nothing: what was rejected lies behind the text until the next reading, which needs its place."""
        text_of(tokens)

    def forget(self) -> None:
        """Forget all that was read."""
        with self._lock:
            self._clear()

    def _read(self, asked: Sequence[Asked]) -> list[Reply]:
        """The same of as many as there are slots: together who can be, then the others."""
        replies: list[Reply] = [None] * len(asked)
        beside: dict[int, _Text] = {}
        apart: dict[int, _Text] = {}
        for i, one in enumerate(asked):
            try:
                text = self._looked_at(one)
                (beside if self._may_join(text) else apart)[i] = text
            except Exception as error:  # whatever it is, it is this text's
                replies[i] = error
        for i, reply in zip(beside, self._metered(self._together, [*beside.values()]), strict=True):
            replies[i] = reply
        for i, text in apart.items():
            (replies[i],) = self._metered(self._path_by_path, [text])
        return replies

    def _metered(self, answer: Callable[[Sequence[_Text]], list[Reply]], texts: Sequence[_Text]) -> list[Reply]:
        """The answers, and what they took is told to the meter."""
        if not texts:
            return []
        self._unread, began = 0, self.meter.now()
        replies = answer(texts)
        if self._unread <= DRAFTS and all(isinstance(reply, Tensor) for reply in replies):
            note_pass(self.meter, self.slots, [len(text.tree.drafted) + 1 for text in texts], began)
        return replies

    def _looked_at(self, asked: Asked) -> _Text:
        """What is asked. `DecodeError` for what the model cannot read."""
        tokens, tree = text_of(asked.tokens), Tree.of(asked.drafts)
        vocab_size, context = cast(int, self._limits.vocab_size), cast(int, self._limits.context)
        strange = next((i for i in (*ids_of("tokens", tokens), *tree.drafted) if not 0 <= i < vocab_size), None)
        if strange is not None:
            remedy = "use the tokenizer that belongs to the model"
            raise DecodeError("tokens", f"the model has {vocab_size} tokens", strange, remedy)
        longest = len(tokens) + max(depths(tree.parents), default=-1) + 1
        if longest > context:
            happened, remedy = f"the text outgrows a context of {context} tokens", "give a larger context"
            raise DecodeError("context", happened, longest, remedy)
        return _Text(asked, tokens, tree)

    def _may_join(self, text: _Text) -> bool:
        """Whether a text and its drafts are read in one pass: a batch, the context and the sequences have room."""
        paths, room = len(leaves(text.tree.parents)), cast(int, self._limits.context) - len(text.tokens)
        fits = paths <= 1 or (paths <= self._widest and len(text.tree.drafted) <= room)
        return fits and len(text.tree.drafted) < self._most

    def _path_by_path(self, texts: Sequence[_Text]) -> list[Reply]:
        """The same of texts that are read by themselves, each path of drafts after the other."""
        return [self._along_paths(text) for text in texts]

    def _along_paths(self, text: _Text) -> Reply:
        def last_rows(tokens: Tokens, last: int) -> Tensor:
            """After each of the last prefixes, as many at a time as a batch takes."""
            rows = []
            for end in range(len(tokens) - last + 1, len(tokens) + 1, self._most):
                drafts = chain(tokens[end : end + self._most - 1])
                reply = self._alone(self._looked_at(Asked(tokens[:end], drafts, text.asked.by)))
                if isinstance(reply, Exception):
                    raise reply
                rows.append(reply)
            return torch.cat(rows)

        try:
            return path_by_path(last_rows)(text.tokens, text.asked.drafts)
        except Exception as error:  # it is this text's
            return error

    def _together(self, texts: Sequence[_Text]) -> list[Reply]:
        """The same in one pass. What fails on the way leaves an empty memory, and each is read by itself."""
        try:
            return self._pass(texts)
        except Exception as error:
            self._clear()
            if len(texts) == 1:
                return [error]
            return [self._alone(text) for text in texts]
        except BaseException:
            self._clear()
            raise

    def _alone(self, text: _Text) -> Tensor | Exception:
        """The same of one text, in as many passes as it takes."""
        reply: Reply = None
        while reply is None:
            (reply,) = self._together([text])
        return reply

    def _pass(self, texts: Sequence[_Text]) -> list[Reply]:
        if self._context.ctx is None:
            remedy = "keep the Llama open, or give the path of its file"
            raise DecodeError("source", "the Llama is closed", shown(self.source), remedy)
        parts: dict[int, _Part] = {}
        for i, text in enumerate(texts):
            if not self._is_being_read(text, parts.values()):
                parts[i] = _Part(text, self._memo(text))
        self._memos.make_room(len(parts))
        memos = [*self._memos, *[part.memo for part in parts.values()]]
        self._memory.give_back_all_but(number for memo in memos for number in memo.past.sequences)
        counts = shared_out([part.needs for part in parts.values()], self._most)
        self._decode([row for part, count in zip(parts.values(), counts, strict=True) for row in part.rows(count)])
        replies: list[Reply] = [None] * len(texts)
        end = 0
        for (i, part), count in zip(parts.items(), counts, strict=True):
            end += count
            if part.is_read_by(count):
                replies[i] = finite(self._logits(range(end - part.last, end)), part.length)
            else:
                self._begun.add(part.text.asked)
            part.extend(count)
            self._memos.put(part.memo)
        return replies

    def _is_being_read(self, text: _Text, parts: Collection[_Part]) -> bool:
        """Whether it is worth a pass of waiting: another text of this one reads what this begins with."""
        if not parts:
            return False
        known, reading = self._memos.covered(text.tokens, 0), [(part.text.tokens, True) for part in parts]
        return self._waiting.waits(text.asked, text.tokens, known, reading)

    def _memo(self, text: _Text) -> Memo[Line]:
        """The memo that a text goes on with. It covers what was read of the text, but never all."""
        memo = self._memos.take(text.tokens, 0, owner=text.asked.by)
        memo = memo or Memo(Line(self._memory, self._memory.take()), 0, owner=text.asked.by)
        known = memo.past.length
        is_new = not known or text.asked in self._begun
        self._unread = max(self._unread, MOST if is_new else len(text.tokens) - known - 1)
        memo.past.settle()
        del memo.tokens[memo.past.length :]
        return memo

    def _decode(self, rows: Sequence[_Row]) -> None:
        from llama_cpp import llama_cpp  # noqa: PLC0415

        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, among, asked) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, len(among), asked
            for k, sequence in enumerate(among):
                batch.seq_id[i][k] = sequence
        code = llama_cpp.llama_decode(self._context.ctx, batch)
        if code:
            remedy = "give a shorter text, or a larger context"
            raise DecodeError("source", "llama.cpp fails at a pass", f"its code {code}", remedy)

    def _logits(self, rows: range) -> Tensor:
        """Logits [n, V] after these rows of the batch."""
        from llama_cpp import llama_cpp  # noqa: PLC0415

        width = cast(int, self._limits.vocab_size)
        found = torch.empty(len(rows), width, dtype=torch.float32, device="cpu")
        for k, i in enumerate(rows):
            row = llama_cpp.llama_get_logits_ith(self._context.ctx, i)
            if not row:
                happened, remedy = "llama.cpp gives no logits", "give a model that says what follows"
                raise DecodeError("source", happened, shown(self.source), remedy)
            found[k] = torch.from_numpy(as_array(row, (width,)))
        return found

    def _clear(self) -> None:
        self._memos.clear()
        self._memory.clear()


@final
@frozen(eq=False)
class _Text:
    """What is asked, looked at."""

    asked: Asked
    tokens: Tokens
    tree: Tree


_Row: TypeAlias = tuple[int, int, Sequence[int], bool]
"""Of a token in a batch: its id, its position, the sequences that it belongs to, and whether its logits are wanted."""


@final
@frozen(eq=False)
class _Part:
    """What a pass may read of one text: what its memo does not cover, and its drafts."""

    text: _Text
    memo: Memo[Line]

    @property
    def needs(self) -> tuple[int, int]:
        """How many tokens are read before those whose logits are wanted, and of how many those are."""
        return self.length - len(self.memo.tokens) - self.last, self.last

    @property
    def last(self) -> int:
        """After how many tokens logits are wanted."""
        return len(self.text.tree.drafted) + 1

    @property
    def length(self) -> int:
        """How long the text is with its drafts."""
        return len(self.text.tokens) + len(self.text.tree.drafted)

    def is_read_by(self, count: int) -> bool:
        """Whether so many tokens are all of it."""
        return count == sum(self.needs)

    def rows(self, count: int) -> list[_Row]:
        """The first `count` tokens. Where these are all, drafts get their sequences."""
        start, parents = len(self.memo.tokens), self.text.tree.parents
        if not self.is_read_by(count):
            piece = self.text.tokens[start : start + count]
            return [(token, start + i, [self.memo.past.number], False) for i, token in enumerate(piece)]
        *below, all_of_them = self.memo.past.branch(parents)
        piece, last = self.text.tokens[start:], len(self.text.tokens) - 1
        found: list[_Row] = [(token, i, all_of_them, i == last) for i, token in enumerate(piece, start)]
        depth = depths(parents)
        return found + [(token, last + 1 + depth[i], below[i], True) for i, token in enumerate(self.text.tree.drafted)]

    def extend(self, count: int) -> None:
        """They were read."""
        tree = self.text.tree if self.is_read_by(count) else NO_TREE
        tokens = count - len(tree.drafted)
        self.memo.past.extend(tokens, len(tree.drafted))
        self.memo.tokens += self.text.tokens[len(self.memo.tokens) :][:tokens]
        self.memo.tree = tree


def shared_out(needs: Sequence[tuple[int, int]], most: int) -> list[int]:
    """How many of the `most` tokens of a pass each text reads: all that it needs, or some of those before its last.

    A text needs (before, last) tokens, the last ones in one pass. Short ones are all read, as far as there is room for
    those that were asked about first, and long ones share what is left: the first of all always gets on.

    >>> shared_out([(0, 3), (90, 1), (1, 2), (90, 4)], 32)
    [3, 18, 3, 8]
    >>> shared_out([(20, 1), (20, 1), (0, 2)], 32)
    [20, 10, 2]
    """
    share, room, found = most // max(1, len(needs)), most, list[int]()
    for before, last in needs:
        whole = before + last
        takes = whole if whole <= (share if before else most) else min(before, share)
        found.append(takes if takes <= room else min(before, room))
        room -= found[-1]
    for i, (before, last) in enumerate(needs):
        left = before + last - found[i]
        more = left if left <= room else min(before - found[i], room)
        found[i], room = found[i] + more, room - more
    return found


def check_installed() -> None:
    """`DecodeError` where llama-cpp-python is missing."""
    try:
        import llama_cpp  # noqa: F401, PLC0415
    except ImportError as error:
        raise DecodeError("source", "llama-cpp-python is missing", said(error), f"run `{INSTALL}`") from error


def _lent(llama: Llama) -> tuple[LlamaModel, llama_context_params, int]:
    """The weights of a `Llama`, a copy of its settings, and its context."""
    if llama._model.model is None:
        raise DecodeError("source", "the Llama is closed", "a closed Llama", "keep it open, or give its path")
    if llama.lora_path is not None:
        happened, remedy = (
            "the Llama has an adapter, which belongs to its own context",
            "give a file that it is merged in",
        )
        raise DecodeError("source", happened, shown(llama.lora_path), remedy)
    given = llama.context_params
    return llama._model, type(given).from_buffer_copy(given), llama.n_ctx()


def _loaded(path: str) -> tuple[LlamaModel, llama_context_params, int]:
    """The weights in a file, usual settings with as many threads as torch has, and the usual context."""
    from llama_cpp import llama_cpp  # noqa: PLC0415
    from llama_cpp._internals import LlamaModel  # noqa: PLC0415

    logger = getLogger("llama-cpp-python")
    if logger.level == NOTSET:  # it would write a page about each model
        logger.setLevel(CRITICAL)
    llama_cpp.llama_backend_init()
    try:
        model = LlamaModel(path_model=path, params=llama_cpp.llama_model_default_params(), verbose=False)
    except Exception as error:  # no such file, no GGUF, an architecture that it does not know
        happened = f"llama.cpp cannot load the model ({said(error)})"
        raise DecodeError("source", happened, shown(path), "give the path of a GGUF file") from error
    settings = llama_cpp.llama_context_default_params()
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    return model, settings, min(model.n_ctx_train() or USUAL_CONTEXT, USUAL_CONTEXT)


def _refuse_encoders(model: LlamaModel, given: object) -> None:
    """`DecodeError` for a model that says nothing of what follows a text, or only beside what an encoder read."""
    from llama_cpp import llama_cpp  # noqa: PLC0415

    if not llama_cpp.llama_model_has_decoder(model.model):
        happened = "the model only encodes"
    elif llama_cpp.llama_model_has_encoder(model.model):
        happened = "the model is an encoder-decoder"
    elif llama_cpp.llama_model_is_diffusion(model.model):
        happened = "the model fills in a whole text by diffusion"
    else:
        return
    raise DecodeError("source", happened, shown(given), "give a model that says what follows")


def _refuse_forgetful(context: LlamaContext, given: object) -> None:
    """`DecodeError` for a context whose rows see the drafts after them, or that remembers nothing between passes.

    The context is asked: a file may say so of any architecture, and who makes a `Llama` may say otherwise.
    """
    from llama_cpp import llama_cpp  # noqa: PLC0415

    if not llama_cpp.llama_get_causal_attn(context.ctx):
        happened, remedy = "its attention is not causal", "give a model, and a Llama, of causal attention"
        raise DecodeError("source", happened, shown(given), remedy)
    if context.memory is None:
        happened, remedy = "the model has no memory of what it read", "give a model that says what follows"
        raise DecodeError("source", happened, shown(given), remedy)


def _is_recurrent(model: LlamaModel) -> bool:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    return llama_cpp.llama_model_is_recurrent(model.model) or llama_cpp.llama_model_is_hybrid(model.model)
