"""In what pieces a model reads a text rightly: found out by trying, never by its name.

Three things can go wrong over a cache that do not in a fresh pass: a piece is read otherwise than the same tokens among
all others (positions, recurrent states), a row depends on what follows it (models that look ahead, frequencies that
depend on the length), and the model remembers by itself what it read before. Beyond a window, or the context that the
model was made for, all of that may begin anew. So a model is tried on a short text, and on a longer one where a text
first goes beyond such a horizon.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from math import inf
from random import Random
from typing import Final, NamedTuple, final

import torch
from attrs import Factory, define, field, frozen
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache, PreTrainedConfig

from specflow.caches import LossyCache, Past, capacity, is_empty, lasting, offloads
from specflow.errors import DecodeError
from specflow.guards.finite import checked
from specflow.paths import Rows, path_by_path
from specflow.predictors.company import refuse_company
from specflow.predictors.reader import (
    STATIC_ROTARY,
    Reader,
    config_of,
    embedded_of,
    ropes_of,
    soft_prompt_of,
)
from specflow.predictors.watch import Findings, Kinds, Look
from specflow.state import TEXT, Proposal, Tokens


@final
@frozen
class Feeding:
    """What a model reads rightly over a cache: pieces of `least` to `most` tokens; with `most` = 0, nothing.

    It is `told` its positions or counts them itself. Its rows are right `together`, in one pass; else each needs a pass
    of its own. A `forgetful` model remembers the length of what it read until it reads a short text again. `trial` is
    how a text is cut to try it; a shorter text is cut like the end of a longer one.

    >>> list(ONE_BY_ONE.ends(covered=4, total=7, last=2)), list(ANY_PIECES.ends(covered=4, total=7, last=2))
    ([5, 6, 7], [7])
    """

    name: str
    least: int = field(default=1, repr=False)
    most: int = field(default=sys.maxsize, repr=False)
    trial: tuple[int, ...] = field(default=(), repr=False)
    told: bool = field(default=True, repr=False)
    together: bool = field(default=True, repr=False)
    forgetful: bool = field(default=False, repr=False)

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
"""Its rows depend on what follows them: a model that looks ahead, or whose frequencies depend on the length."""

FORGETFUL: Final = Feeding("each row afresh, after a short text", most=0, together=False, forgetful=True)
"""Its frequencies grow with the longest text it has read, until it reads a short one."""

FEEDINGS: Final = (ANY_PIECES, OWN_POSITIONS, ONE_BY_ONE, TWO_OR_MORE)
"""What is tried over a cache, in this order."""

LENGTH: Final = sum(AT_ONCE.trial)
"""How many tokens a model is tried on first."""

SHORTEST: Final = 8
"""How many tokens a text has at least on which faults can be told."""


@final
@frozen
class Regime:
    """How texts of more than `over` tokens are read, up to the next horizon.

    `carries` tells whether what was read of a shorter text is of use here.
    """

    over: int
    feeding: Feeding
    carries: bool = True


@final
class Region(NamedTuple):
    """Texts of which the longer ones go on with what was read of the shorter: of more than `over` tokens, read by a
    model of one `kind`."""

    over: int
    kind: Kinds


@final
@define(eq=False)
class _Found:
    """What was found out about a model, as far as it was asked for."""

    over_caches: bool
    regimes: dict[int, Regime] = field(factory=dict)
    trees: bool | None = None

    def holds(self) -> bool:
        """Whether nothing went wrong, so that other weights of the same parts need no other trial."""
        fed = [regime.feeding for regime in self.regimes.values()]
        return self.trees is not False and all(each.most > 0 if self.over_caches else each.together for each in fed)


_FOUND: Final = Findings(_Found.holds)


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
            config = getattr(self.reader.model, "config", None)
            return DynamicCache(config=config) if self._given and isinstance(config, PreTrainedConfig) else None
        with lasting():
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

    Over the model's own caches, or with `feedings` = () over none, a model object is tried once for each dtype, kind of
    device, implementation of attention and set of adapters, whoever asks. It is tried again when modules were replaced,
    or weights by some of another kind, as quantization does it; and what went wrong also when the weights have changed.
    Caches of the user's are tried for each predictor.

    `DecodeError` for a model that cannot read ids alone, for one whose logits depend on what it read before, and for
    one with a layer whose rows depend on the others in their pass.
    """

    caches: Caches
    feedings: tuple[Feeding, ...] = FEEDINGS
    reader: Reader = field(init=False, default=Factory(lambda self: self.caches.reader, takes_self=True))
    horizons: tuple[int, ...] = field(init=False, default=())
    """The lengths beyond which the model is tried anew: all that the first trial does not cross by as much again."""
    kind: Kinds = field(init=False, default=())
    """What of the model may change and change back while what was read of it stays: its adapters, autocast."""
    renewed: bool = field(init=False, default=True)
    """Whether what was met last was of other weights or modules than before, and not just of another kind."""
    _crosses: bool = field(init=False, default=False)
    _findings: Findings[_Found] = field(
        init=False,
        default=Factory(lambda self: _FOUND if self.caches.are_own else Findings(_Found.holds), takes_self=True),
    )
    _seen: Look | None = field(init=False, default=None)
    _now: _Found = field(init=False)

    def meet(self) -> bool:
        """Answer for the model as it is now; whether it is another than it was when it was last met."""
        look = self.reader.watch.look()
        if self._seen is not None and self._seen.same(look):
            return False
        self.reader.ask_again()
        horizons, crossed = horizons_of(self.reader.model), min(LENGTH, self.room) // 2
        self.horizons = tuple([horizon for horizon in horizons if horizon > crossed])
        self._crosses = len(self.horizons) < len(horizons)
        key = (self.reader.dtype, self.reader.device.type, len(self.feedings), *look.kind)
        self.renewed = self._seen is None or not self._seen.of_same_weights(look)
        self._now = self._findings.of(self.reader.model, key, look, lambda: _Found(bool(self.feedings)))
        self._seen, self.kind = look, look.kind
        return True

    def forget(self) -> None:
        """Meet the model as a new one: its config, which is not watched, may tell of other horizons."""
        self._seen = None

    def regime(self, length: int) -> Regime:
        """How a text of `length` tokens is read."""
        return self._entered(length)[-1]

    def region(self, length: int) -> Region:
        """The region of a text: it begins with the last regime in which nothing is of use that was read of shorter
        texts."""
        return Region(max(0 if regime.carries else regime.over for regime in self._entered(length)), self.kind)

    def in_parts(self, tokens: Tokens, last: int, rows: Rows) -> Tensor:
        """Rows [last, …], of logits or features, finite where they are on the host, by one call of `rows` for each
        region they lie in."""
        length, first = len(tokens), len(tokens) - last
        over = [regime.over for regime in self._entered(length) if not regime.carries]
        cuts = [first, *[cut for cut in over if first < cut < length], length]
        parts = [rows(tokens[:end], end - begin) for begin, end in pairwise(cuts)]
        return checked(parts[0] if len(parts) == 1 else torch.cat(parts), length)

    def read_afresh(self, tokens: Tokens, last: int) -> Tensor:
        """Logits [last, V] by passes over whole texts: one where its rows are right together, else one for each row."""
        return self._afresh(tokens, last, self.reader.read_afresh)

    def features_afresh(self, tokens: Tokens, last: int) -> Tensor:
        """The same of features [last, F]."""
        return self._afresh(tokens, last, self.reader.features_afresh)

    def _afresh(self, tokens: Tokens, last: int, rows: Rows) -> Tensor:
        reader, feeding = self.reader, self.regime(len(tokens)).feeding
        reader.refuse_strange(tokens)
        if feeding.together:
            return rows(tokens, last)
        found = []
        for end in range(len(tokens) - last + 1, len(tokens) + 1):
            if feeding.forgetful:
                reader.read_afresh(tokens[:1], 1)
            found.append(rows(tokens[:end], 1))
        return torch.cat(found)

    def reads_trees(self, length: int) -> bool:
        """Whether a tree that ends a text of `length` tokens is read in one pass as its paths are.

        A text of 7 tokens and a tree of 6 after it, then a token after one of its paths, which the cache keeps, are
        compared with fresh passes. Only up to the first horizon is a tree read so.
        """
        reader, found = self.reader, self._now
        if not (reader.takes_parents or reader.takes_masks) or length > min(self.horizons, default=sys.maxsize):
            return False
        if found.trees is None:
            found.trees = self._try_trees()
        return found.trees

    def _entered(self, length: int) -> list[Regime]:
        """The regimes that a text of `length` tokens has entered, that of the shortest texts first."""
        regimes = self._now.regimes
        entered: list[Regime] = []
        for over in (0, *self.horizons):
            if over >= length:
                break
            if over not in regimes:
                regime = self._try(over)
                if regime is None:  # nothing can be told from logits that are not finite: nothing is relied on
                    return [Regime(0, EACH_AFRESH)]
                regimes[over] = regime
            entered.append(regimes[over])
        return entered

    def _try(self, over: int) -> Regime | None:
        """How texts are read that are longer than `over` tokens; None where the logits are not finite.

        A random text, with the config's special tokens in it, is read afresh, its beginning alone before and after it,
        and then the whole in the pieces of each feeding's trial, with a wrong turn and a way back among them. Errors
        are differences of logits, relative to the largest logit. A feeding is right whose error is of the order of
        rounding (8 ε of the dtype, or of fp32), or at most ten times that of the best of them; the first such is taken.
        None is right where all errors are above `error_bound`. A fault that this text does not bring out is not found.
        `DecodeError` for a model that remembers what it read and does not forget it, and for one with a linear layer
        whose rows depend on each other.
        """
        further = [horizon for horizon in self.horizons if horizon - over >= SHORTEST and (over or not self._crosses)]
        total = min([over + LENGTH, self.room, *further])
        if total - over < 2:
            return Regime(over, FORGETFUL, carries=False)
        if not over:
            refuse_company(self.reader)
        text, bound = self.text(total), error_bound(self.reader.rounding)
        beginning = text[: over + max(1, (total - over) // 4)]
        shorter = len(beginning) - over
        if over:
            self._fresh(text[:1], 1)  # a model that remembers the length of a text forgets it
        shared, truth = self._fresh(beginning, shorter), self._fresh(text, total - over)
        alone, noise = shared[-1:], error_of(shared, truth[:shorter])
        if not torch.cat([alone, truth]).amax(dim=-1).isfinite().all():
            return None
        if not error_of(self._fresh(beginning, 1), alone) <= bound:
            self._fresh(text[:1], 1)
            if not error_of(self._fresh(beginning, 1), alone) <= bound:
                happened, remedy = "the model's logits depend on what it read before", "give a function of tokens alone"
                raise DecodeError("model", happened, type(self.reader.model).__name__, remedy)
            return Regime(over, FORGETFUL, carries=over == 0)
        if not error_of(truth[shorter - 1 : shorter], alone) <= bound:
            return Regime(over, EACH_AFRESH, carries=over == 0)
        if over:
            return self._beyond(over, text, truth)
        return Regime(0, self._first(text, truth, noise, min([sum(ANY_PIECES.trial), self.room, *further])))

    def _beyond(self, over: int, text: Tokens, truth: Tensor) -> Regime:
        """How texts longer than `over` tokens are fed: as shorter ones are, or not at all."""
        feeding = self._now.regimes[0].feeding
        if not feeding.most:
            return Regime(over, feeding, carries=False)
        if len(truth) < SHORTEST:
            return Regime(over, AFRESH, carries=False)
        if self._best(text, truth, (feeding,), over - 2 * feeding.least):
            return Regime(over, feeding)
        return Regime(over, self._best(text, truth, (feeding,), over + feeding.least) or AFRESH, carries=False)

    def _first(self, text: Tokens, truth: Tensor, noise: float, longer: int) -> Feeding:
        """How short texts are fed: tried on one of up to `longer` tokens where the few pieces of `text` leave a doubt.

        They leave none where they differ from fresh passes by no more than ten times what those differ by themselves.
        They do where a cache is more than rows of keys and values: in a state errors add up. `DecodeError` where
        nothing is right over caches of the user's.
        """
        if not self.feedings or len(truth) < SHORTEST:
            return AFRESH
        clear = max(self._rounding, min(10 * noise, error_bound(self.reader.rounding)))
        past = Past(self.caches.tried(), 0)
        if self._wrong(past, text, truth, AT_ONCE) <= clear and not past.needs_marks:
            return ANY_PIECES
        if longer > len(truth):
            text = self.text(longer)
            truth = self._fresh(text, longer)
        best = self._best(text, truth, self.feedings)
        if best is None and not self.caches.are_own:
            raise DecodeError(
                "make_cache",
                "the model's logits over this cache are not those of a fresh pass",
                type(self.caches.tried()).__name__,
                "let the model make its own cache, or name this one a LossyCache",
            )
        return best or AFRESH

    def _best(self, text: Tokens, truth: Tensor, feedings: Sequence[Feeding], start: int = 0) -> Feeding | None:
        """The first feeding that is right where the trial's pieces begin after a piece of `start` tokens."""
        errors = [self._wrong(Past(self.caches.tried(), 0), text, truth, feeding, start) for feeding in feedings]
        if min(errors) > error_bound(self.reader.rounding):
            return None
        right = max(self._rounding, 10 * min(errors))
        return next(feeding for feeding, error in zip(feedings, errors, strict=True) if error <= right)

    def _wrong(self, past: Past, text: Tokens, truth: Tensor, feeding: Feeding, start: int = 0) -> float:
        """By how much a feeding goes wrong over an empty past; ∞ where the model refuses it."""
        try:
            rows = self._in_pieces(past, text, feeding, start)
        except torch.OutOfMemoryError:
            raise
        except DecodeError as error:
            if error.parameter != "model":  # it is the caches that are at fault
                raise
            return inf
        except Exception:  # whatever a model raises here says that it cannot be fed so
            return inf
        known = min(len(rows), len(truth))
        return error_of(rows[-known:], truth[-known:])

    @property
    def _rounding(self) -> float:
        return 8 * max(torch.finfo(self.reader.rounding).eps, torch.finfo(torch.float32).eps)

    def _in_pieces(self, past: Past, text: Tokens, feeding: Feeding, start: int) -> Tensor:
        """Logits [k, V] of the last rows of `text`, a wrong piece read and taken back before the last.

        The first piece has `start` tokens, or one less, where that is not 0.
        """
        sizes = feeding.pieces(len(text) - start)
        while start and sum(sizes) < len(text) - start:
            sizes = [feeding.least, *sizes]
        if start:
            if sizes[0] < feeding.least:
                sizes[:2] = [sizes[0] + sizes[1]]
            sizes = [0, *sizes]
        sizes[0] += len(text) - sum(sizes)

        def extend(piece: Tensor, last: int) -> Tensor:
            return self.reader.extend(past, piece, last, told=feeding.told)

        *before, end = torch.split(self.reader.ids([text]), sizes, dim=1)
        rows = [extend(piece, piece.shape[1] if i or not start else 1) for i, piece in enumerate(before)]
        if past.needs_marks:
            past.mark()
        covered = past.length
        extend(end.flip(1), 1)
        assert past.go_back(covered)
        return torch.cat([*rows, extend(end, end.shape[1])])

    def _try_trees(self) -> bool:
        parents, kept = (TEXT, TEXT, 0, 2, 1, 3), (0, 2, 3)
        tokens = self.text(7 + len(parents) + 1)
        text, drafted, after = tokens[:7], tokens[7:-1], tokens[-1:]
        reader, past = self.reader, Past(self.caches.tried(), 0)
        try:
            reader.extend(past, reader.ids([text]), 1)
            rows = reader.extend(past, reader.ids([drafted]), len(drafted), parents)
            past.keep(len(text), kept)
            row = reader.extend(past, reader.ids([after]), 1)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model raises here says that it cannot read trees
            return False
        drafts = [Proposal(token, parent=parent) for token, parent in zip(drafted, parents, strict=True)]
        truth = path_by_path(self._fresh)(text, drafts)[1:]
        end = self._fresh(text + tuple([drafted[i] for i in kept]) + after, 1)
        return error_of(torch.cat([rows, row]), torch.cat([truth, end])) <= error_bound(reader.rounding)

    def _fresh(self, tokens: Tokens, last: int) -> Tensor:
        """Logits [last, V] of a text in one pass. `DecodeError` where the model cannot read it."""
        try:
            return self.reader.read_afresh(tokens, last)
        except (torch.OutOfMemoryError, DecodeError):
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            happened = f"the model cannot read ids alone ({type(error).__name__}: {reason})"
            remedy = "give a language model that needs nothing beside ids"
            raise DecodeError("model", happened, type(self.reader.model).__name__, remedy) from error

    def text(self, length: int) -> Tokens:
        """A random text with the config's special tokens in it."""
        size = embedded_of(self.reader.model)
        if size is None:  # a config may say anything
            width = self._fresh((0,), 1).shape[-1]
            size = min(width, self.reader.limits.vocab_size or width)
        text = Random(length).choices(range(size), k=length)
        special = [token for token in specials_of(self.reader.model) if token < size]
        # Among the last, where texts are compared, and none at their end. And among the first: where padding hides
        # something of a text, what it hides depends on what follows it (XLM).
        for places in (range(1, min(3, length)), range(length - 10, length - 1, 3)):
            for place, token in zip(places, special, strict=False):
                text[max(place, 0)] = token
        return tuple(text)

    @property
    def room(self) -> int:
        """How long a text may be that the model is tried on."""
        sizes = self.reader.limits.context, self.caches.room
        return min([size for size in sizes if size is not None], default=sys.maxsize)


def horizons_of(model: Module) -> tuple[int, ...]:
    """The lengths of text beyond which the config says that a model may read otherwise, in order.

    Windows and chunks of attention, and the context that frequencies of a kind were made for which depend on the
    length ("longrope", "dynamic", and kinds that are not known). After a soft prompt a text gets there sooner.

    >>> from transformers import MistralConfig
    >>> model = torch.nn.Module()
    >>> model.config = MistralConfig(sliding_window=16)
    >>> horizons_of(model)
    (16,)
    """
    config = config_of(model)
    if not isinstance(config, PreTrainedConfig):
        return ()
    settings = vars(config)
    sizes = [size for name, size in settings.items() if any(word in name for word in WINDOWS) and "layers" not in name]
    sizes += [each for size in sizes if isinstance(size, list | tuple) for each in size]
    for rope in ropes_of(model):
        if rope.get("rope_type", "default") not in STATIC_ROTARY:
            made_for = rope.get("original_max_position_embeddings"), getattr(config, "max_position_embeddings", None)
            # "dynamic" frequencies that grew are put back by texts that are shorter than this, not by one as long.
            sizes += [size - less for size in made_for if isinstance(size, int) for less in (0, 1)]
    before = soft_prompt_of(model)
    whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
    return tuple(sorted({size - before for size in whole if size > before}))


WINDOWS: Final = ("window", "chunk", "local_attention")
"""What the names of settings hold that limit how far attention sees."""


def specials_of(model: Module) -> tuple[int, ...]:
    """The ids of padding, ends and beginnings in a config."""
    config = config_of(model)
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos")]
    many = chain.from_iterable(ids if isinstance(ids, list | tuple) else [ids] for ids in named)
    return tuple([token for token in dict.fromkeys(many) if isinstance(token, int) and token >= 0])


def error_bound(dtype: torch.dtype) -> float:
    """The largest error of a model that reads rightly, relative to the largest logit."""
    return {torch.float16: 0.03, torch.bfloat16: 0.1}.get(dtype, 1e-4)


def error_of(logits: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest logit. Equal infinities differ by nothing, NaN by ∞.

    In half precision the third quartile of the rows' differences: rounding may send a token to another expert there.
    """
    apart = torch.where(logits == truth, 0.0, (logits - truth).abs()).nan_to_num(nan=inf, posinf=inf)
    rows = apart.amax(dim=-1).double().sort().values
    typical = rows[len(rows) * 3 // 4 - 1] if truth.dtype in (torch.float16, torch.bfloat16) else rows[-1]
    return float(typical / truth[truth.isfinite()].abs().max()) if 0 < typical < inf else float(typical)
