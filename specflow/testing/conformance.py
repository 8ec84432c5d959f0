"""The conformance kit: whatever was read, drafted, rejected and gone back to, a predictor answers like a fresh pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from itertools import islice
from math import inf
from random import Random
from typing import Final, TypeAlias, final

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from specflow.asked import features_of, rows_of
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, calls, does, number, or_none, whole
from specflow.guards.ids import ids_of
from specflow.paths import last_rows, path_by_path
from specflow.predictors import CachedPredictor, UncachedPredictor, limits_of
from specflow.predictors.copying import copy_sharing_weights
from specflow.predictors.features import Features
from specflow.predictors.reader import refuse_weightless, vocabulary_of
from specflow.predictors.trial import horizons_of, specials_of
from specflow.protocols import ReadsFeatures
from specflow.state import TEXT, Predictor, Proposal, Tokens, parents_of
from specflow.trees import path_to


class Move(Enum):
    """What a step of the script does to the text before it reads."""

    READ = "read"
    DRAFT = "draft"
    ACCEPT = "accept"
    REJECT = "reject"
    FORK = "fork"
    RETURN = "return to an old state"
    TURN = "another conversation's turn"


@final
@frozen
class Divergence:
    """One row that differs: the logits after the token at `position`, in step `step` of the script."""

    step: int
    move: Move
    position: int
    difference: float


@final
@frozen
class Conformance:
    """What the script found. `divergences` are the rows that differ by more than `tolerance`, in order.

    >>> print(Conformance(2, 3, 0.5, 1e-9, (Divergence(1, Move.FORK, 7, 0.5),)))
    1 of 3 rows differ; the first in step 1 (fork) after token 7, by 0.5 where 1e-09 is allowed; by at most 0.5
    """

    steps: int
    rows: int
    largest: float
    tolerance: float
    divergences: tuple[Divergence, ...]

    @property
    def holds(self) -> bool:
        """Whether every row was within the tolerance."""
        return not self.divergences

    @override
    def __str__(self) -> str:
        if self.holds:
            found = f"{self.rows} rows in {self.steps} steps differ by at most {self.largest:.2g}"
            return f"{found} ({self.tolerance:g} is allowed)"
        first = self.divergences[0]
        return (
            f"{len(self.divergences)} of {self.rows} rows differ; the first in step {first.step} ({first.move.value}) "
            f"after token {first.position}, by {first.difference:.2g} where {self.tolerance:g} is allowed; "
            f"by at most {self.largest:.2g}"
        )


Reading: TypeAlias = tuple[Move, Tokens, int]
"""Why, which text, and how many of its last rows."""

BEYOND: Final = 24
"""How many tokens a script goes past the last edge that a config names: a window, a chunk, a context."""

FARTHEST: Final = 512
"""Edges beyond this many tokens are not gone past unless `longest` asks for it: a script reads some hundred texts."""


def conformance(
    predictor: Predictor,
    fresh: Predictor,
    vocab_size: int,
    *,
    tolerance: float,
    seed: int = 0,
    steps: int = 60,
    longest: int = 64,
    often: Tokens = (),
    prune: Callable[[Tokens], object] | None = None,
) -> Conformance:
    """Walks `predictor` through a random script of `steps` readings and compares each with `fresh`.

    The law: predictor(text, drafts) = fresh(text, drafts) whatever was read before. The script, which `seed` decides,
    reads on, drafts token by token, verifies drafts and accepts or rejects them, leaves its text for another and comes
    back, and has two conversations in turns, a new one and one that nears `longest`, the most tokens of a text: where
    something depends on the length (a window, a capacity), go past it by some 24. One token in eight is one of `often`,
    such as the ids of padding and of ends. `prune`, where given, is told the text that stands after some of the drafts.

    >>> from specflow import along_paths
    >>> lengths = along_paths(lambda tokens: torch.full((4,), float(len(tokens))))
    >>> conformance(lengths, lengths, 4, tolerance=0.0).holds
    True
    >>> wrong = along_paths(lambda tokens: torch.full((4,), len(tokens) - 1.0))
    >>> conformance(wrong, lengths, 4, tolerance=0.0).largest
    1.0
    """
    for name, one in (("predictor", predictor), ("fresh", fresh)):
        calls("a predictor", "give a function of (text, drafts)")(name, one)
    _check(vocab_size, tolerance, seed, steps, longest)
    vocab_size, longest = int(vocab_size), int(longest)
    often = ids_of("often", often)
    or_none(calls("a pruner", "give a function of tokens, or None"))("prune", prune)
    rows, largest, divergences = 0, 0.0, []
    for step, (move, tokens, last) in enumerate(islice(_script(vocab_size, seed, longest, often, prune), steps)):
        ours, theirs = last_rows(predictor, tokens, last), last_rows(fresh, tokens, last, "fresh")
        if ours.shape != theirs.shape:
            happened, received = "the predictors have different vocabularies", f"{ours.shape[1]} and {theirs.shape[1]}"
            raise DecodeError("predictor", happened, received, "give two of one model")
        differences = _differences(ours, theirs)
        rows, largest = rows + last, max(largest, *differences)
        divergences += [
            Divergence(step, move, len(tokens) - last + row, difference)
            for row, difference in enumerate(differences)
            if not difference <= tolerance
        ]
    return Conformance(steps, rows, largest, tolerance, tuple(divergences))


def model_conformance(
    model: Module,
    *,
    predictor: CachedPredictor | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    steps: int = 60,
    longest: int | None = None,
    features: Features | None = None,
) -> Conformance:
    """`conformance` of a model's memo with `fresh_passes` of the model, which is compared in evaluation mode.

    With `features` those are compared, too, with those of fresh passes by an `UncachedPredictor` of a copy.

    `predictor` is a `CachedPredictor(model)` unless given. The tolerance is absolute, on logits: 1e-9 for an fp64
    model, 1e-4 for others. Models that compute parts of themselves in fp32 need fp32's in fp64 too. `longest` is what
    goes past the windows, chunks and contexts in the model's config (up to `FARTHEST`) by `BEYOND` tokens, and
    at least 64, or as many as the model reads at all. Ids of padding, begin and end of the config are often in the
    texts. `DecodeError` where the predictor refuses the model, or the model cannot be copied.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    >>> model_conformance(model.double().eval(), steps=20).holds
    True
    """
    _check_model(model)
    or_none(does("a memo", "give a CachedPredictor", "prune"))("predictor", predictor)
    or_none(_is_tolerance)("tolerance", tolerance)
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    allowed = tolerance if tolerance is not None else 1e-9 if dtype == torch.float64 else 1e-4
    memo = CachedPredictor(model, features=features) if predictor is None else predictor
    vocab_size = _vocabulary(model)
    most = _longest(model, vocab_size) if longest is None else longest
    fresh = fresh_passes(model, vocab_size, longest=most, tolerance=allowed / 2)
    often = _special(model, vocab_size)
    target: Predictor = memo
    if features is not None:
        alone = UncachedPredictor(copy_sharing_weights(model), features=features)
        target, fresh = with_features(memo, memo), with_features(fresh, alone)
    return conformance(
        target,
        fresh,
        vocab_size,
        tolerance=allowed,
        seed=seed,
        steps=steps,
        longest=most,
        often=often,
        prune=memo.prune,
    )


def fresh_passes(model: Module, vocab_size: int, *, longest: int = 64, tolerance: float = 0.0) -> Predictor:
    """What the model says of each prefix in a pass of its own, by a copy of the model that has read nothing before.

    fresh(text, drafts)[i] = copy(model)(text and the path to draft i - 1)[-1], the weights shared, in evaluation mode.

    That is slow, so it is found out first, on a random text of up to `longest` tokens with the config's special ones
    among them, whether the rows of one long pass are those of the prefixes within `tolerance` (not so where a model
    looks ahead, or where its frequencies depend on the length), and whether one copy answers alike in another order
    (not so where a model remembers). Only where they are not is it done row by row, or by a new copy each time.
    `DecodeError` for a model that cannot be copied.

    >>> table = torch.nn.Embedding(4, 4)
    >>> fresh_passes(table, 4)((1, 2, 3), ()).shape
    torch.Size([1, 4])
    """
    _check_model(model)
    _check(vocab_size, tolerance, longest=longest)
    vocab_size, longest = int(vocab_size), int(longest)
    known = vocabulary_of(model)
    if known is not None and vocab_size > known:
        happened = f"the model reads only {known} ids"
        raise DecodeError("vocab_size", happened, vocab_size, "give a vocabulary that it reads")
    copy = copy_sharing_weights(model).eval()
    text = Random(0).choices(range(vocab_size), k=longest)
    often = _special(model, vocab_size)
    for place in range(1, longest if often else 0, 5):  # what a model hides for padding it hides by how much there is
        text[place] = often[place // 5 % len(often)]
    # The longest ones follow one another: a model that remembers a length may forget it at a shorter text.
    lengths = sorted({*range(1, min(8, longest)), *range(8, longest, 5), *range(max(1, longest - 2), longest + 1)})
    apart = torch.cat([_pass(copy_sharing_weights(copy), text[:length])[-1:] for length in lengths])
    again = torch.cat([_pass(copy, text[:length])[-1:] for length in reversed(lengths)]).flip(0)
    keeps_nothing = max(_differences(again, apart)) <= tolerance
    pristine = copy if keeps_nothing else copy_sharing_weights(model).eval()
    whole = _pass(copy_sharing_weights(pristine), text)[[length - longest - 1 for length in lengths]]
    in_one_pass = max(_differences(whole, apart)) <= tolerance

    def fresh(tokens: Tokens, last: int) -> Tensor:
        ends = [len(tokens)] if in_one_pass else range(len(tokens) - last + 1, len(tokens) + 1)
        rows = [_pass(pristine if keeps_nothing else copy_sharing_weights(pristine), tokens[:end]) for end in ends]
        return rows[0][-last:] if in_one_pass else torch.cat([row[-1:] for row in rows])

    return path_by_path(fresh)


def through_trees(target: Predictor, vocab_size: int, *, seed: int = 0) -> Predictor:
    """What a predictor says along one path of each tree, the others being made by chance: for `conformance`.

    >>> from specflow import chain
    >>> from specflow.predictors import path_by_path
    >>> logits = lambda tokens, last: torch.tensor(tokens).cumsum(0)[-last:, None].float()
    >>> through_trees(path_by_path(logits), 4)((1, 2), chain((3,))).tolist()
    [[3.0], [6.0]]
    """
    calls("a predictor", "give a function of (text, drafts), such as a CachedPredictor")("target", target)
    whole(2, "give a vocabulary with a token to take instead")("vocab_size", vocab_size)
    _is_seed("seed", seed)
    random = Random(int(seed))

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        tree: list[Proposal] = []
        wanted = [TEXT]
        for draft in drafts:
            for _ in range(random.randrange(3)):
                other = random.randrange(vocab_size - 1)
                parent = random.choice((wanted[-1], random.randrange(-1, len(tree))))
                tree.append(Proposal(other + (other >= draft.token), parent=parent))
            tree.append(Proposal(draft.token, parent=wanted[-1]))
            wanted.append(len(tree) - 1)
        return rows_of(target, tokens, tree)[[i + 1 for i in wanted]]

    return predict


def with_features(predictor: Predictor, showing: ReadsFeatures) -> Predictor:
    """What a predictor says, and what a model's layers held, side by side: [n + 1, V + 2 F], for `conformance`.

    The drafts are read first; then the features are asked for, of the text and of each path: those of the last token,
    and the mean of the last eight, most of which were read before.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=2, n_head=2))
    >>> memo, fresh = CachedPredictor(model, features=(1,)), UncachedPredictor(model, features=(1,))
    >>> conformance(with_features(memo, memo), with_features(fresh, fresh), 32, tolerance=1e-4, steps=20).holds
    True
    """
    calls("a predictor", "give a CachedPredictor(model, features=(1,))")("predictor", predictor)
    does("what shows features", "give a CachedPredictor(model, features=(1,))", "features")("showing", showing)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        logits, parents = rows_of(predictor, tokens, drafts, "predictor"), parents_of(drafts)
        texts = [tokens + tuple([drafts[k].token for k in path_to(parents, i)]) for i in range(TEXT, len(drafts))]
        held = [features_of(showing, text, min(8, len(text)), "showing") for text in texts]
        both = torch.stack([torch.cat([rows[-1], rows.mean(dim=0)]) for rows in held])
        return torch.cat([logits, both.to(logits)], dim=-1)

    return predict


_is_tolerance: Final = number("tolerance is no distance", "give a number of 0 or more", lambda x: x >= 0)
_is_seed: Final = whole(0, "give a whole number")
_is_length: Final = whole(1, "give a number of tokens", MOST)


def _check(vocab_size: int, tolerance: float, seed: int = 0, steps: int = 1, longest: int = 1) -> None:
    whole(1, "give a vocabulary of at least one token")("vocab_size", vocab_size)
    _is_tolerance("tolerance", tolerance)
    _is_seed("seed", seed)
    whole(1, "give one reading at least", MOST)("steps", steps)
    _is_length("longest", longest)


def _check_model(model: Module) -> None:
    a(Module, "give a model, such as AutoModelForCausalLM.from_pretrained makes")("model", model)
    refuse_weightless("model", model)


@torch.no_grad()
def _pass(model: Module, tokens: Sequence[int]) -> Tensor:
    """Logits [n, V] of one call; models that return no dict return logits first."""
    parameter = next(model.parameters(), torch.empty(0))
    output = model(torch.tensor([tokens], device=parameter.device))
    logits: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return logits[0]


def _vocabulary(model: Module) -> int:
    """How many ids the model reads: its embedding says, whatever its config or its head do."""
    stated = vocabulary_of(model)
    return _pass(copy_sharing_weights(model).eval(), (0,)).shape[-1] if stated is None else stated


def _special(model: Module, vocab_size: int) -> Tokens:
    """The ids of padding, begin and end in the model's config."""
    return tuple(sorted([token for token in specials_of(model) if token < vocab_size]))


def _longest(model: Module, vocab_size: int) -> int:
    """A length that goes past the edges in the config, as far as the model reads."""
    context = limits_of(model).context
    edges = [*horizons_of(model), context]
    most = max([64, *[edge + BEYOND for edge in edges if edge is not None and edge <= FARTHEST]])
    if context is None or most <= context:
        return most
    try:
        _pass(copy_sharing_weights(model).eval(), (vocab_size - 1,) * most)
    except Exception:  # learned positions end; what a model raises past them is its own affair
        return context
    return most


def _script(
    vocab_size: int, seed: int, longest: int, often: Tokens, prune: Callable[[Tokens], object] | None
) -> Iterator[Reading]:
    """An endless script of readings."""
    random = Random(int(seed))

    def some(most: int, least: int = 1) -> Tokens:
        ids = [random.randrange(vocab_size) for _ in range(random.randint(least, most))]
        return tuple([random.choice(often) if often and random.random() < 1 / 8 else token for token in ids])

    text = some(min(8, longest))
    # Near the last edge, to go past it a little at a time.
    other = some(max(1, longest - 8), max(1, longest - 8 - BEYOND))
    old = [text, other]
    yield Move.READ, text, 1
    while True:
        move = random.choice(list(Move))
        draft = some(5)
        if len(text) + len(draft) + 1 > longest and move is not Move.TURN:
            move = Move.RETURN
        match move:
            case Move.READ:
                text += draft
                yield move, text, random.randint(1, len(draft))
            case Move.DRAFT:
                for end in range(1, len(draft) + 1):
                    yield move, text + draft[:end], 1
            case Move.ACCEPT | Move.REJECT:
                text += some(1)
                draft = draft[: longest - len(text)]
                yield move, text + draft, len(draft) + 1
                text += draft if move is Move.ACCEPT else draft[: random.randrange(len(draft))] if draft else ()
                if prune is not None and random.random() < 0.5:
                    prune(text)
            case Move.FORK:
                old.append(text)
                text = (*text[: max(0, len(text) - random.randint(1, 6))], *draft)
                yield move, text, 1
            case Move.RETURN:
                text = random.choice(old)
                yield move, text, random.randint(1, min(3, len(text)))
            case Move.TURN:
                text, other = other, text
                yield move, text, random.randint(1, min(2, len(text)))


def _differences(ours: Tensor, theirs: Tensor) -> list[float]:
    """The largest difference of each row; ∞ where either holds a NaN. Equal infinities differ by nothing."""
    theirs = theirs.to(ours)
    apart = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).nan_to_num(nan=inf, posinf=inf)
    found: list[float] = apart.amax(dim=-1).tolist()
    return found
