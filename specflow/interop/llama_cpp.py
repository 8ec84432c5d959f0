"""llama.cpp's models as predictors, through llama-cpp-python: `pip install 'specflow[llama-cpp]'`."""

from __future__ import annotations

from collections.abc import Sequence
from logging import CRITICAL, NOTSET, getLogger
from os import PathLike, fspath
from threading import Lock
from typing import TYPE_CHECKING, Final, cast, final
from weakref import finalize

import torch
from attrs import define, field, frozen
from numpy.ctypeslib import as_array
from torch import Tensor

from specflow.errors import DecodeError, said
from specflow.guards.checks import MOST, a, or_none, shown, valid, whole
from specflow.guards.finite import finite
from specflow.guards.ids import ids_of, text_of
from specflow.paths import path_by_path
from specflow.policies import CostMeter
from specflow.predictors.memo import DRAFTS
from specflow.prefix import common_prefix
from specflow.protocols import Limits
from specflow.state import TEXT, Proposal, Tokens, chain, parents_of
from specflow.trees import depths, leaves, path_along, path_to

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp._internals import LlamaContext, LlamaModel
    from llama_cpp.llama_cpp import llama_batch, llama_context_params

INSTALL: Final = "pip install 'specflow[llama-cpp]'"

USUAL_CONTEXT: Final = 4096
"""The most tokens of a text where none are named: a model's whole context may take more memory than there is."""

MAIN: Final = 0
"""The sequence of the text in llama.cpp's memory; each further leaf of a tree has one of its own."""


@final
@frozen
class _Read:
    """What llama.cpp's memory holds: a text, and the drafts after it that were read with it."""

    tokens: Tokens = ()
    drafts: tuple[Proposal, ...] = ()


@final
@define(eq=False)
class LlamaCpp:
    """A GGUF file, or a `Llama`, as llama.cpp runs it: a predictor like any other, on its own KV memory.

    `predict(text, drafts)` gives logits [n + 1, V] in fp32, as `CachedPredictor` does, and the same laws hold: it is
    the row of a fresh pass over each prefix, within llama.cpp's rounding, or an error. Only rows that are asked for are
    computed. A pass that fails or is interrupted loses the memory and never leaves a wrong one. Threads may share it.

    A `Llama` lends its weights and its settings; its own context is not touched, and has to stay open. `context` is the
    most tokens of a text, drafts included: that of the `Llama`, or `USUAL_CONTEXT` and no more than the model was
    trained for. A tree of up to `leaves` paths is read in one pass, a sequence of the memory for each of them; wider
    ones, and those of models with recurrent layers, path by path. Such models cannot go back, so that a text of which
    drafts were refused is read anew. `meter` hears what passes take, but those that read a prompt.

    `DecodeError` where llama-cpp-python is missing, for what it cannot load, a `Llama` with an adapter, ids that the
    model does not have, a text beyond the context, where a pass fails, and for logits that are not finite.
    """

    source: str | PathLike[str] | Llama
    context: int | None = field(default=None, validator=valid(or_none(whole(1, "give a number of tokens", MOST))))
    leaves: int = field(default=16, validator=valid(whole(1, "a tree has one leaf at least", 64)))
    meter: CostMeter = field(
        factory=CostMeter, repr=False, kw_only=True, validator=valid(a(CostMeter, "give CostMeter()"))
    )
    _limits: Limits = field(init=False, repr=False)
    _context: LlamaContext = field(init=False, repr=False)
    _batch: llama_batch = field(init=False, repr=False)
    _most: int = field(init=False, repr=False)
    _reads_trees: bool = field(init=False, repr=False)
    _read: _Read = field(init=False, default=_Read(), repr=False)
    _unread: int = field(init=False, default=0, repr=False)
    """How many tokens before the drafts were never read before this pass; `MOST` where the text is a new one."""
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
        else:
            remedy = "give the path of a GGUF file, or a Llama"
            raise DecodeError("source", "this is no model of llama.cpp", shown(given), remedy)
        if not llama_cpp.llama_model_has_decoder(model.model):
            happened, remedy = "the model only encodes", "give a model that says what follows"
            raise DecodeError("source", happened, shown(given), remedy)
        settings.n_ctx = int(self.context or context)
        settings.n_batch = min(settings.n_ctx, max(settings.n_batch, 32))
        settings.n_seq_max = int(self.leaves)
        settings.embeddings = False
        settings.kv_unified = settings.swa_full = True  # so that sequences share cells, and windows can go back
        try:
            self._context = LlamaContext(model=model, params=settings, verbose=False)
        except ValueError as error:
            happened, remedy = "llama.cpp cannot make room for its memory", "give a smaller context"
            raise DecodeError("context", happened, settings.n_ctx, remedy) from error
        self._limits = Limits(model.n_vocab(), settings.n_ctx)
        self._most = llama_cpp.llama_n_batch(self._context.ctx)
        self._reads_trees = not _is_recurrent(model)
        self._batch = llama_cpp.llama_batch_init(self._most, 0, int(self.leaves))
        finalize(self, llama_cpp.llama_batch_free, self._batch)

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        return self._limits

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each of the n drafts."""
        tokens, parents = text_of(tokens), parents_of(drafts)
        drafted = ids_of("drafts", [draft.token for draft in drafts])
        self._check(tokens, drafted, len(tokens) + max(depths(parents), default=-1) + 1)
        paths = len(leaves(parents))
        with self._lock:
            self._unread, begun = 0, self.meter.now()
            if paths <= 1:
                rows = self._last(tokens + drafted, len(drafted) + 1)
            elif self._reads_trees and paths <= self.leaves and self._holds(tokens, drafted):
                rows = self._pass(tokens, tuple(drafts), parents)
            else:
                rows = path_by_path(self._last)(tokens, drafts)
            if self._unread <= DRAFTS:
                self.meter.note(len(drafted) + 1, self.meter.since(begun))
            return rows

    def prune(self, tokens: Tokens, /) -> None:
        """Nothing: what was refused lies behind the text until the next reading, which needs its place."""
        text_of(tokens)

    def forget(self) -> None:
        """Forget all that was read."""
        with self._lock:
            self._clear()

    def _last(self, tokens: Tokens, last: int) -> Tensor:
        """Logits [last, V] after each of the last prefixes of a text, as many at a time as a batch takes."""
        rows = []
        for end in range(len(tokens) - last + 1, len(tokens) + 1, self._most):
            drafts = chain(tokens[end : end + self._most - 1])
            rows.append(self._pass(tokens[:end], drafts, parents_of(drafts)))
        return torch.cat(rows)

    def _holds(self, tokens: Tokens, drafted: Tokens) -> bool:
        """Whether memory and a batch have room for all the drafts of a tree."""
        return len(drafted) < self._most and len(tokens) + len(drafted) <= cast(int, self._limits.context)

    def _check(self, tokens: Tokens, drafted: Tokens, longest: int) -> None:
        vocab_size, context = self._limits.vocab_size, self._limits.context
        assert vocab_size is not None
        assert context is not None
        strange = next((i for i in (*ids_of("tokens", tokens), *drafted) if not 0 <= i < vocab_size), None)
        if strange is not None:
            remedy = "use the tokenizer that belongs to the model"
            raise DecodeError("tokens", f"the model has {vocab_size} tokens", strange, remedy)
        if longest > context:
            happened, remedy = f"the text outgrows a context of {context} tokens", "give a larger context"
            raise DecodeError("context", happened, longest, remedy)

    def _pass(self, tokens: Tokens, drafts: tuple[Proposal, ...], parents: tuple[int, ...]) -> Tensor:
        """The same, over as many sequences as there are leaves. What fails on the way leaves an empty memory."""
        from llama_cpp import llama_cpp  # noqa: PLC0415

        read, self._read = self._read, _Read()
        try:
            known = self._go_back(read, tokens)
            # Those before the last batch only fill the memory.
            start = known
            while len(tokens) - start + len(drafts) > self._most:
                end = min(start + self._most, len(tokens) - 1)
                self._decode(tokens[start:end], start, (), (), [MAIN])
                start = end
            ends = leaves(parents) or [TEXT]
            sequences = [*range(len(ends))]
            for sequence in sequences[1:]:
                llama_cpp.llama_memory_seq_cp(self._context.memory, MAIN, sequence, 0, -1)
            logits = self._decode(tokens[start:], start, drafts, parents, sequences)
        except BaseException:
            self._clear()
            raise
        self._read = _Read(tokens, drafts)
        return finite(logits, len(tokens) + len(drafts))

    def _go_back(self, read: _Read, tokens: Tokens) -> int:
        """How many of the first of `tokens` the memory holds, and nothing else; never all of them."""
        from llama_cpp import llama_cpp  # noqa: PLC0415

        ctx, memory = self._context.ctx, self._context.memory
        if ctx is None:
            remedy = "keep the Llama open, or give the path of its file"
            raise DecodeError("source", "the Llama is closed", shown(self.source), remedy)
        if not read.tokens:
            self._unread = MOST
            self._clear()
            return 0
        parents = parents_of(read.drafts)
        path = (
            path_along(read.drafts, parents, tokens[len(read.tokens) :])
            if tokens[: len(read.tokens)] == read.tokens
            else []
        )
        keep = min(common_prefix(read.tokens, tokens) + len(path), len(tokens) - 1)
        self._unread = max(self._unread, len(tokens) - keep - 1 if keep else MOST)
        ends = leaves(parents) or [TEXT]
        # Of the leaves one is below the path: its sequence becomes the text's.
        here = path[-1] if path else TEXT
        mine = next((k for k, leaf in enumerate(ends) if here in (TEXT, *path_to(parents, leaf))), MAIN)
        if mine != MAIN:
            llama_cpp.llama_memory_seq_rm(memory, MAIN, len(read.tokens), -1)
            llama_cpp.llama_memory_seq_cp(memory, mine, MAIN, len(read.tokens), len(read.tokens) + len(path))
        for other in range(1, len(ends)):
            llama_cpp.llama_memory_seq_rm(memory, other, -1, -1)
        held = len(read.tokens) + len(path_to(parents, ends[MAIN])) if mine == MAIN else len(read.tokens) + len(path)
        if keep < held and not llama_cpp.llama_memory_seq_rm(memory, MAIN, keep, -1):
            self._clear()  # a recurrent state cannot go back
            return 0
        return keep

    def _decode(
        self, piece: Tokens, start: int, drafts: Sequence[Proposal], parents: Sequence[int], sequences: list[int]
    ) -> Tensor:
        """Read `piece`, which stands at `start`, and drafts after it: logits [n + 1, V] after it and after each."""
        from llama_cpp import llama_cpp  # noqa: PLC0415

        batch, ends = self._batch, leaves(parents) or [TEXT]
        below: list[list[int]] = [[] for _ in drafts]
        for sequence, leaf in enumerate(ends):
            for i in path_to(parents, leaf):
                below[i].append(sequence)
        depth = depths(parents)
        last = len(piece) - 1
        rows = [(token, start + i, sequences, i == last) for i, token in enumerate(piece)]
        rows += [(draft.token, start + len(piece) + depth[i], below[i], True) for i, draft in enumerate(drafts)]
        batch.n_tokens = len(rows)
        for i, (token, position, among, asked) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, len(among), asked
            for k, sequence in enumerate(among):
                batch.seq_id[i][k] = sequence
        code = llama_cpp.llama_decode(self._context.ctx, batch)
        if code:
            remedy = "give a shorter text, or a larger context"
            raise DecodeError("source", "llama.cpp fails at a pass", f"its code {code}", remedy)
        width = cast(int, self._limits.vocab_size)
        found = torch.empty(1 + len(drafts), width)
        for k in range(1 + len(drafts)):
            row = llama_cpp.llama_get_logits_ith(self._context.ctx, last + k)
            if not row:
                happened, remedy = "llama.cpp gives no logits", "give a model that says what follows"
                raise DecodeError("source", happened, shown(self.source), remedy)
            found[k] = torch.from_numpy(as_array(row, (width,)))
        return found

    def _clear(self) -> None:
        from llama_cpp import llama_cpp  # noqa: PLC0415

        self._read = _Read()
        if self._context.ctx is not None:
            llama_cpp.llama_memory_clear(self._context.memory, True)


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


def _is_recurrent(model: LlamaModel) -> bool:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    return llama_cpp.llama_model_is_recurrent(model.model) or llama_cpp.llama_model_is_hybrid(model.model)
