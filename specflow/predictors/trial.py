"""In what pieces a model reads a text rightly: found out by trying, never by its name.

Three things can go wrong over a cache that do not in a fresh pass: a piece is read otherwise than the same tokens among
all others (positions, recurrent states), a row depends on what stands behind it (models that look ahead, frequencies
that depend on the length), and the model remembers by itself what it read before. Beyond a window, or the context that
the model was made for, all of that may begin anew. So a model is tried on a short text, and on a longer one where a
text first goes beyond such a horizon.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import inf
from random import Random
from typing import Final, TypeAlias, final
from weakref import WeakKeyDictionary

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig

from specflow.caches import LossyCache, Past, capacity, is_empty, offloads
from specflow.errors import DecodeError
from specflow.predictors.reader import Reader, context_of, embedded_of, soft_prompt_of
from specflow.predictors.watch import Look
from specflow.state import TEXT
from specflow.trees import path_to


@final
@frozen
class Feeding:
    """What a model reads rightly over a cache: pieces of `least` to `most` tokens; with `most` = 0, nothing.

    It is `told` its positions or counts them itself. `together` are the rows of one text that one pass gives; else each
    needs a pass of its own. `trial` is how a text is cut to try it; a shorter text is cut like the end of a longer one.

    >>> list(ONE_BY_ONE.ends(covered=4, total=7, last=2)), list(ANY_PIECES.ends(covered=4, total=7, last=2))
    ([5, 6, 7], [7])
    """

    name: str
    least: int = field(default=1, repr=False)
    most: int = field(default=sys.maxsize, repr=False)
    trial: tuple[int, ...] = field(default=(), repr=False)
    told: bool = field(default=True, repr=False)
    together: bool = field(default=True, repr=False)

    def ends(self, covered: int, total: int, last: int) -> Iterator[int]:
        """Where the pieces end in which a text of `total` tokens is read over a cache that covers some of it.

        An empty cache takes all but the last rows in one piece, whatever the model.
        """
        if covered == 0 and self.most < total:
            covered = total - last + 1
            yield covered
        while covered < total:
            covered = min(covered + self.most, total)
            yield covered

    def pieces(self, total: int) -> list[int]:
        """The trial for a text of `total` tokens.

        >>> TWO_OR_MORE.pieces(14)
        [2, 2, 5, 5]
        """
        before = accumulate((*self.trial[::-1], total), initial=0)
        sizes = [min(size, total - end) for size, end in zip(self.trial[::-1], before, strict=False)]
        return [size for size in sizes[::-1] if size > 0]


ANY_PIECES: Final = Feeding("any pieces", trial=(7, *[1] * 10, 4, *[1] * 10, 5))
"""What every model should be able to read, and most do."""

AT_ONCE: Final = Feeding("any pieces", trial=(7, 1, 4, 5))
"""The same, tried on fewer pieces: whoever reads these rightly over rows of keys and values needs no longer trial."""

OWN_POSITIONS: Final = Feeding("any pieces, at positions of its own", trial=ANY_PIECES.trial, told=False)
"""Its positions do not count from 0 (the RoBERTa family as decoders)."""

ONE_BY_ONE: Final = Feeding("one token at a time", most=1, trial=(20, *[1] * 16))
"""Longer pieces ignore the state that they start from (transformers' Mamba, Jamba, Zamba)."""

TWO_OR_MORE: Final = Feeding("two tokens or more", least=2, trial=(7, 2, 4, 8, 3, 2, 5, 5))
"""For one token alone the model computes something else (transformers' Zamba 2 and Nemotron-H)."""

AFRESH: Final = Feeding("the whole text afresh", most=0)
"""No pieces: a model without a cache, or one that goes wrong over it."""

EACH_AFRESH: Final = Feeding("each row afresh", most=0, together=False)
"""Its rows depend on what stands behind them: a model that looks ahead, or whose frequencies depend on the length."""

FEEDINGS: Final = (ANY_PIECES, OWN_POSITIONS, ONE_BY_ONE, TWO_OR_MORE)
"""What is tried over a cache, in this order."""

LENGTH: Final = sum(AT_ONCE.trial)
"""How many tokens a model is tried on first."""

SHORTEST: Final = 8
"""How many tokens a text has at least on which faults can be told."""


@final
@frozen
class Stretch:
    """How texts of more than `over` tokens are read, up to the next horizon.

    `carries` tells whether what was read of a shorter text is of use here. `forgetful` models remember the length of
    what they read until they read a short text again.
    """

    over: int
    feeding: Feeding
    carries: bool = True
    forgetful: bool = False


_Key: TypeAlias = tuple[object, ...]


@final
@define(eq=False)
class _Found:
    """What was found out about a model as it was at one look."""

    look: Look
    over_caches: bool
    stretches: dict[int, Stretch] = field(factory=dict)
    trees: bool | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing went wrong, so that other weights need no other trial."""
        fed = [stretch.feeding for stretch in self.stretches.values()]
        return self.trees is not False and all(each.most > 0 if self.over_caches else each.together for each in fed)


_FOUND: Final[WeakKeyDictionary[Module, dict[_Key, _Found]]] = WeakKeyDictionary()


@final
@define(eq=False)
class Caches:
    """Where the caches of a model come from: from the model, or from the user, who makes them with `make`.

    `DecodeError` for a new cache that is not empty, and for one that offloads from anything but CUDA.
    """

    reader: Reader
    make: Callable[[], object] | None = None
    _given: bool = field(init=False, default=False)
    _capacity: int | None = field(init=False, default=None)

    @property
    def are_own(self) -> bool:
        """Whether the model is tried over its own caches. Those that are known to round tell nothing of it."""
        return self.make is None or isinstance(self.make, LossyCache)

    @property
    def room(self) -> int | None:
        """How many tokens one takes; None where there is no limit."""
        if self.make is not None and self._capacity is None:
            self._capacity = capacity(self.new()) or sys.maxsize
        return None if self._capacity == sys.maxsize else self._capacity

    def tried(self) -> object | None:
        """One that the model is tried over."""
        return None if self.are_own else self.new()

    def to_be_given(self) -> object | None:
        """transformers' own, from now on, as the model keeps what it makes by itself."""
        self._given = True
        return self.new()

    def new(self) -> object | None:
        """One to start from; None where the model makes it."""
        if self.make is None:
            return self.reader.default_cache() if self._given else None
        cache = self.make()
        if not is_empty(cache):
            received, remedy = type(cache).__name__, "make another cache at each call"
            raise DecodeError("make_cache", "a new cache is not empty", received, remedy)
        if offloads(cache) and self.reader.device.type != "cuda":
            happened, remedy = "transformers offloads a cache only from CUDA", "make it without offloading"
            raise DecodeError("make_cache", happened, f"a model on {self.reader.device.type}", remedy)
        return cache


@final
@define(eq=False)
class Trials:
    """What is found out about a model, each thing when it is first asked for.

    Over the model's own caches, or with `feedings` = () over none, a model object is tried once for
    each dtype, kind of device, implementation of attention and set of adapters, whoever asks. What went wrong is tried
    again when the weights have changed. Caches of the user's are tried for each predictor.

    `DecodeError` for a model that cannot read ids alone, and for one whose logits depend on what it read before.
    """

    caches: Caches
    feedings: tuple[Feeding, ...] = FEEDINGS
    reader: Reader = field(init=False)
    horizons: tuple[int, ...] = field(init=False, default=())
    """The lengths beyond which the model is tried anew: all that the first trial does not cross by as much again."""
    _crosses: bool = field(init=False, default=False)
    _recurs: bool = field(init=False, default=False)
    _private: dict[_Key, _Found] = field(init=False, factory=dict)
    _now: _Found = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.reader = self.caches.reader

    def meet(self, look: Look) -> None:
        """Answer for the model as it is now."""
        horizons, crossed = horizons_of(self.reader.model), min(LENGTH, self._room) // 2
        self.horizons = tuple([horizon for horizon in horizons if horizon > crossed])
        self._crosses = len(self.horizons) < len(horizons)
        kept = _FOUND.setdefault(self.reader.model, {}) if self.caches.are_own else self._private
        key = (self.reader.dtype, self.reader.device.type, len(self.feedings), *look.kind)
        found = kept.get(key)
        if found is None or not (found.holds or found.look.same(look)):
            found = kept[key] = _Found(look, bool(self.feedings))
        self._now = found

    def stretch(self, length: int) -> Stretch:
        """How a text of `length` tokens is read."""
        return self._begun(length)[-1]

    def region(self, length: int) -> int:
        """Where the last stretch began in which nothing is of use that was read of shorter texts."""
        return max(0 if stretch.carries else stretch.over for stretch in self._begun(length))

    def parts(self, length: int, last: int) -> list[tuple[int, int]]:
        """(length, rows) of the texts to read for the last `last` rows: several where those lie in several regions."""
        first = length - last
        over = [stretch.over for stretch in self._begun(length) if not stretch.carries]
        ends = [first, *[cut for cut in over if first < cut < length], length]
        return [(end, end - begin) for begin, end in pairwise(ends)]

    def reads_trees(self, length: int) -> bool:
        """Whether a tree that ends a text of `length` tokens is read in one pass as its paths are.

        A text of 7 tokens and a tree of 6 behind it, then a token behind one of its paths, which the cache keeps, are
        compared with fresh passes. Only up to the first horizon is a tree read so.
        """
        reader, found = self.reader, self._now
        if not (reader.takes_parents or reader.takes_masks) or length > min(self.horizons, default=sys.maxsize):
            return False
        if found.trees is None:
            found.trees = self._try_trees()
        return found.trees

    def _begun(self, length: int) -> list[Stretch]:
        """The stretches that a text of `length` tokens has entered, that of the shortest texts first."""
        stretches = self._now.stretches
        begun = [0, *[horizon for horizon in self.horizons if horizon < length]]
        for over in begun:
            if over not in stretches:
                stretch = self._try(over)
                if stretch is None:  # nothing can be told from logits that are not finite: nothing is relied on
                    return [Stretch(0, EACH_AFRESH)]
                stretches[over] = stretch
        return [stretches[over] for over in begun]

    def _try(self, over: int) -> Stretch | None:
        """How texts are read that are longer than `over` tokens; None where the logits are not finite.

        A random text, with the config's special tokens in it, is read afresh, its beginning alone before and behind it,
        and then the whole in the pieces of each feeding's trial, with a wrong turn and a way back among them. Errors
        are differences of logits, relative to the largest logit. A feeding is right whose error is of the order of
        rounding (8 ε of the dtype, or of fp32), or at most ten times that of the best of them; the first such is taken.
        None is right where all errors are above `error_bound`. A fault that this text does not bring out is not found.
        """
        further = [horizon for horizon in self.horizons if horizon - over >= SHORTEST and (over or not self._crosses)]
        total = min([over + LENGTH, self._room, *further])
        if total - over < 2:
            return Stretch(over, EACH_AFRESH, carries=False, forgetful=True)
        ids = self._ids(total)
        found = self._fresh_rows(ids, over)
        if found is None:
            return None
        truth, together, forgetful, noise = found
        if not together or forgetful:
            return Stretch(over, EACH_AFRESH, carries=over == 0, forgetful=forgetful)
        if over:
            return self._beyond(over, ids, truth)
        return Stretch(0, self._first(ids, truth, noise, min([sum(ANY_PIECES.trial), self._room, *further])))

    def _fresh_rows(self, ids: Tensor, over: int) -> tuple[Tensor, bool, bool, float] | None:
        """The rows behind more than `over` tokens, whether one pass may give them, whether the model is forgetful, and
        by how much fresh passes of several lengths differ in the rows that they share.

        None where they are not finite. `DecodeError` for a model that remembers what it read and does not forget it.
        """
        most, bound = over + max(1, (ids.shape[1] - over) // 4), error_bound(self.reader.dtype)
        if over:
            self._fresh(ids[:, :1], 1)  # a model that remembers the length of a text forgets it
        shared, truth = self._fresh(ids[:, :most], most - over), self._fresh(ids, ids.shape[1] - over)
        alone, noise = shared[-1:], _error(shared, truth[: most - over])
        if not (_has_law(alone) and _has_law(truth)):
            return None
        forgetful = not _error(self._fresh(ids[:, :most], 1), alone) <= bound
        if forgetful:
            self._fresh(ids[:, :1], 1)
            if not _error(self._fresh(ids[:, :most], 1), alone) <= bound:
                happened, remedy = "the model's logits depend on what it read before", "give a function of tokens alone"
                raise DecodeError("model", happened, type(self.reader.model).__name__, remedy)
        return truth, _error(truth[most - over - 1 : most - over], alone) <= bound, forgetful, noise

    def _beyond(self, over: int, ids: Tensor, truth: Tensor) -> Stretch:
        """How texts longer than `over` tokens are fed: as shorter ones are, or not at all."""
        feeding = self._now.stretches[0].feeding
        if not feeding.most:
            return Stretch(over, feeding, carries=False, forgetful=self._now.stretches[0].forgetful)
        if len(truth) < SHORTEST:
            return Stretch(over, AFRESH, carries=False)
        if self._best(ids, truth, (feeding,), over - 2 * feeding.least):
            return Stretch(over, feeding)
        beyond = over + feeding.least
        return Stretch(over, self._best(ids, truth, (feeding,), beyond) or AFRESH, carries=False)

    def _first(self, ids: Tensor, truth: Tensor, noise: float, longer: int) -> Feeding:
        """How short texts are fed: tried on one of up to `longer` tokens where the few pieces of `ids` leave a doubt.

        They leave none where they differ from fresh passes by no more than ten times what those differ by themselves.
        They do where a cache is more than rows of keys and values: in a state errors add up. `DecodeError` where
        nothing is right over caches of the user's.
        """
        if not self.feedings or len(truth) < SHORTEST:
            return AFRESH
        clear = max(self._rounding, min(10 * noise, error_bound(self.reader.dtype)))
        if self._errors(ids, truth, (AT_ONCE,), 0).get(AT_ONCE, inf) <= clear and not self._recurs:
            return ANY_PIECES
        if longer > len(truth):
            ids = self._ids(longer)
            truth = self._fresh(ids, longer)
        best = self._best(ids, truth, self.feedings, 0)
        if best is None and not self.caches.are_own:
            raise DecodeError(
                "make_cache",
                "the model's logits over this cache are not those of a fresh pass",
                type(self.caches.tried()).__name__,
                "let the model make its own cache, or name this one a LossyCache",
            )
        return best or AFRESH

    def _best(self, ids: Tensor, truth: Tensor, feedings: Sequence[Feeding], start: int) -> Feeding | None:
        """The first feeding that is right where the trial's pieces begin behind a piece of `start` tokens."""
        errors = self._errors(ids, truth, feedings, start)
        best = min(errors.values(), default=inf)
        if best > error_bound(self.reader.dtype):
            return None
        return next(feeding for feeding, error in errors.items() if error <= max(self._rounding, 10 * best))

    def _errors(self, ids: Tensor, truth: Tensor, feedings: Sequence[Feeding], start: int) -> dict[Feeding, float]:
        """By how much each feeding goes wrong; one that the model refuses is left out."""
        errors: dict[Feeding, float] = {}
        for feeding in feedings:
            try:
                rows = self._in_pieces(ids, feeding, start)
            except torch.OutOfMemoryError:
                raise
            except DecodeError as error:
                if error.parameter != "model":  # it is the caches that are at fault
                    raise
                continue
            except Exception:  # whatever a model raises here says that it cannot be fed so
                continue
            known = min(len(rows), len(truth))
            errors[feeding] = _error(rows[-known:], truth[-known:])
        return errors

    @property
    def _rounding(self) -> float:
        return 8 * max(torch.finfo(self.reader.dtype).eps, torch.finfo(torch.float32).eps)

    def _in_pieces(self, ids: Tensor, feeding: Feeding, start: int) -> Tensor:
        """Logits [k, V] of the last rows of `ids` [1, n], a wrong piece read and taken back before the last.

        The first piece has `start` tokens, or one less, where that is not 0.
        """
        sizes = feeding.pieces(ids.shape[1] - start)
        while start and sum(sizes) < ids.shape[1] - start:
            sizes = [feeding.least, *sizes]
        if start:
            if sizes[0] < feeding.least:
                sizes[:2] = [sizes[0] + sizes[1]]
            sizes = [0, *sizes]
        sizes[0] += ids.shape[1] - sum(sizes)
        past = Past(self.caches.tried(), 0)

        def extend(piece: Tensor, last: int) -> Tensor:
            logits, cache = self.reader.read(piece, past.cache, past.length, last, told=feeding.told)
            past.extend(cache, past.length + piece.shape[1])
            return logits[0]

        *before, end = torch.split(ids, sizes, dim=1)
        rows = [extend(piece, piece.shape[1] if i or not start else 1) for i, piece in enumerate(before)]
        self._recurs = past.needs_marks
        if past.needs_marks:
            past.mark()
        covered = past.length
        extend(end.flip(1), 1)
        assert past.go_back(covered)
        return torch.cat([*rows, extend(end, end.shape[1])])

    def _try_trees(self) -> bool:
        parents, kept = (TEXT, TEXT, 0, 2, 1, 3), (0, 2, 3)
        ids = self._ids(7 + len(parents) + 1)
        tokens: list[int] = ids[0].tolist()
        text, drafted, behind = tuple(tokens[:7]), tokens[7:-1], tokens[-1]
        reader = self.reader
        try:
            _, cache = reader.read(reader.ids([text]), self.caches.tried(), 0, 1)
            past = Past(None, 0)
            past.extend(cache, len(text))
            logits, cache = reader.read(reader.ids([tuple(drafted)]), past.cache, len(text), len(drafted), parents)
            past.extend(cache, len(text) + len(drafted))
            past.keep(len(text), kept)
            row, _ = reader.read(reader.ids([(behind,)]), past.cache, past.length, 1)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model raises here says that it cannot read trees
            return False
        rows: dict[int, Tensor] = {}
        for leaf in (5, 4):
            path = path_to(parents, leaf)
            drafts = tuple([drafted[i] for i in path])
            rows |= zip(path, self._fresh(reader.ids([text + drafts]), len(path)), strict=True)
        end = self._fresh(reader.ids([text + tuple([drafted[i] for i in kept]) + (behind,)]), 1)
        truth = torch.cat([torch.stack([rows[i] for i in range(len(drafted))]), end])
        return _error(torch.cat([logits[0], row[0]]), truth) <= error_bound(reader.dtype)

    def _fresh(self, ids: Tensor, last: int) -> Tensor:
        """Logits [last, V] of the text `ids` [1, n]. `DecodeError` where the model cannot read it."""
        try:
            return self.reader.read_afresh(ids, last)[0]
        except (torch.OutOfMemoryError, DecodeError):
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            happened = f"the model cannot read ids alone ({type(error).__name__}: {reason})"
            remedy = "give a language model that needs nothing beside ids"
            raise DecodeError("model", happened, type(self.reader.model).__name__, remedy) from error

    def _ids(self, length: int) -> Tensor:
        """A random text [1, length] with the config's special tokens in it."""
        size = embedded_of(self.reader.model)
        if size is None:  # a config may say anything
            width = self._fresh(self.reader.ids([(0,)]), 1).shape[-1]
            size = min(width, self.reader.vocab_size or width)
        text = Random(length).choices(range(size), k=length)
        special = [token for token in specials_of(self.reader.model) if token < size]
        # Among the last, where texts are compared, and none at their end. And among the first: where padding hides
        # something of a text, what it hides depends on what stands behind it (XLM).
        for places in (range(1, min(3, length)), range(length - 10, length - 1, 3)):
            for place, token in zip(places, special, strict=False):
                text[max(place, 0)] = token
        return self.reader.ids([tuple(text)])

    @property
    def _room(self) -> int:
        """How long a text may be that the model is tried on."""
        sizes = context_of(self.reader.model), self.caches.room
        return min([size for size in sizes if size is not None], default=sys.maxsize)


def horizons_of(model: Module) -> tuple[int, ...]:
    """The lengths of text beyond which the config says that a model may read otherwise, in order.

    Windows and chunks of attention, and the context that frequencies of a kind were made for which depend on the
    length ("longrope", "dynamic", and kinds that are not known). Behind a soft prompt a text gets there sooner.

    >>> from transformers import MistralConfig
    >>> model = torch.nn.Module()
    >>> model.config = MistralConfig(sliding_window=16)
    >>> horizons_of(model)
    (16,)
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return ()
    text = config.get_text_config(decoder=True)
    settings = vars(text)
    sizes = [size for name, size in settings.items() if any(word in name for word in WINDOWS) and "layers" not in name]
    sizes += [each for size in sizes if isinstance(size, list | tuple) for each in size]
    rope = settings.get("rope_parameters") or {}
    parts = [rope, *[part for part in rope.values() if isinstance(part, dict)]]
    for part in parts:
        if part.get("rope_type", "default") not in STEADY:
            made_for = part.get("original_max_position_embeddings"), getattr(text, "max_position_embeddings", None)
            # "dynamic" frequencies that grew are put back by texts that are shorter than this, not by one as long.
            sizes += [size - less for size in made_for if isinstance(size, int) for less in (0, 1)]
    before = soft_prompt_of(model)
    whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
    return tuple(sorted({size - before for size in whole if size > before}))


WINDOWS: Final = ("window", "chunk", "local_attention")
"""What the names of settings hold that limit how far attention sees."""

STEADY: Final = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
"""The kinds of rotary frequencies that do not depend on the length of the text."""


def specials_of(model: Module) -> tuple[int, ...]:
    """The ids of padding, ends and beginnings in a config."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else None
    named = [getattr(text, f"{name}_token_id", None) for name in ("pad", "eos", "bos")]
    many = [each for ids in named for each in (ids if isinstance(ids, list | tuple) else [ids])]
    return tuple([token for token in dict.fromkeys(many) if isinstance(token, int) and token >= 0])


def error_bound(dtype: torch.dtype) -> float:
    """The largest error of a model that reads rightly, relative to the largest logit."""
    return {torch.float16: 0.03, torch.bfloat16: 0.1}.get(dtype, 1e-4)


def _error(logits: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest logit. Equal infinities differ by nothing, NaN by ∞.

    In half precision the third quartile of the rows' differences: rounding may send a token to another expert there.
    """
    apart = torch.where(logits == truth, 0.0, (logits - truth).abs()).nan_to_num(nan=inf, posinf=inf)
    rows = apart.amax(dim=-1).double().sort().values
    typical = rows[len(rows) * 3 // 4 - 1] if truth.dtype in (torch.float16, torch.bfloat16) else rows[-1]
    return float(typical / truth[truth.isfinite()].abs().max()) if typical else 0.0


def _has_law(logits: Tensor) -> bool:
    return bool(logits.amax(dim=-1).isfinite().all())
