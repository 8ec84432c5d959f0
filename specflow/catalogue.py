"""Drafters, policies and rules by name, for the commands and whatever else lets somebody choose.

A new one is a file of its own, one line here, one test and one page. What is none of what it is given for is refused
with a `DecodeError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeAlias, final

from attrs import field, frozen
from torch.nn import Module
from typing_extensions import TypeVar

from specflow.batch import BatchPredictor
from specflow.drafters import (
    Bigrams,
    Followers,
    IntersectionDrafter,
    LLMDrafter,
    LogitTree,
    LookupTree,
    NGramDrafter,
    NGramStorage,
    PromptLookup,
    Recycled,
    RecyclingTree,
    Retokenised,
    SuffixDrafter,
    at_most,
    first_of,
    longest,
    merged,
    propose_nothing,
)
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, calls, does, each, flag, or_none, valid, whole
from specflow.heads import HeadDrafter, HeadPredictor, HeadTree
from specflow.policies import EGAG, SVIP, AdaEDL, CostAware, CostMeter, Fixed, Heuristic, StopAfter, Unsure
from specflow.predictors import CachedPredictor, limits_of
from specflow.processors import GreedyProcessor, Processor
from specflow.protocols import Prunable
from specflow.randomness import Randomness, Sampling
from specflow.stages import (
    Adjust,
    Block,
    Condition,
    Draft,
    Match,
    Observer,
    PruneCache,
    Recycle,
    Reject,
    Traverse,
    UpdateNgram,
    Verify,
    ending,
    never,
    unobserved,
)
from specflow.state import Committed, Drafted, Drafter, GammaPolicy, Predictor, Rule, Step, Tokens
from specflow.vocabulary import SharedTokens

S = TypeVar("S", bound=Sampling)
T = TypeVar("T")


def _are_stages(name: str, value: object) -> None:
    a(tuple, "give stages in a tuple")(name, value)
    each(calls("a stage", "give one such as UpdateNgram(storage)"))(name, value)


_are_memos = each(does("a provider that forgets", "give the predictors themselves", "prune"))


# Drafters.


@final
@frozen(eq=False)
class Setting:
    """What a drafter is made for: the target and its vocabulary, the text so far, and how tokens are drawn.

    `assistant` is a smaller model, and `bigrams` gives the target's own, each where there is one. `reading` makes the
    predictor that the assistant is read through: of texts that are decoded at once, one `BatchPredictor` for all.
    `shared` is what its vocabulary and the target's have in common, None where they are one.
    `head` drafts from what the target holds, where there is one; all texts share it.
    """

    model: Module = field(validator=valid(a(Module, "give the target")))
    vocab_size: int = field(validator=valid(whole(1, "give the target's vocabulary", MOST)))
    text: Tokens = field(validator=valid(a(tuple, "give ids as a tuple, such as state.tokens")))
    processor: Processor = field(validator=valid(does("a processor", "give one, such as GreedyProcessor()", "laws")))
    rng: Sampling = field(validator=valid(does("a source of draws", "give Dice() or SharedNoise(seed)", "draw")))
    assistant: Module | None = field(default=None, validator=valid(or_none(a(Module, "give a model, or None"))))
    bigrams: Callable[[], Bigrams | None] = field(
        default=lambda: None, validator=valid(calls("what gives bigrams", "give a function of nothing"))
    )
    reading: Callable[[Module], CachedPredictor | BatchPredictor] = field(
        default=partial(CachedPredictor),
        validator=valid(calls("what reads a model", "give a function of one")),
    )
    shared: SharedTokens | None = field(
        default=None, validator=valid(or_none(a(SharedTokens, "give SharedTokens(…), or None for one vocabulary")))
    )
    head: HeadPredictor | None = field(
        default=None, validator=valid(or_none(a(HeadPredictor, "give HeadPredictor(head, target), or None")))
    )


@final
@frozen(eq=False)
class Drafting:
    """A drafter, the stages that teach it what was committed, and its memos, which forget what was not."""

    drafter: Drafter = field(validator=valid(calls("a drafter", "give a function of the tokens so far")))
    teach: tuple[Callable[[Committed], Committed], ...] = field(default=(), validator=valid(_are_stages))
    memos: tuple[Prunable, ...] = field(default=(), validator=valid(_are_memos))


Make: TypeAlias = Callable[[Setting], Drafting]
"""Makes a drafter for one text."""


@final
@frozen(eq=False)
class Entry:
    """A drafter of the catalogue: `make()` serves all texts of a decoder, so that it may remember what they said.

    One that is `assisted` needs a draft model, one that is `headed` a head; one that takes `bigrams` knows what to do
    with the target's.
    """

    make: Callable[[], Make] = field(validator=valid(calls("a maker", "give a function that returns a Make")))
    assisted: bool = field(default=False, validator=valid(flag))
    bigrams: bool = field(default=False, validator=valid(flag))
    headed: bool = field(default=False, validator=valid(flag))


def _each(drafter: Callable[[], Drafter]) -> Callable[[], Make]:
    return lambda: lambda setting: Drafting(drafter())


def _ngram(setting: Setting) -> Drafting:
    """What the text has said, the prompt included."""
    storage = NGramStorage(4, setting.vocab_size)
    storage.initialize(setting.text)
    return Drafting(NGramDrafter(storage), (UpdateNgram(storage),))


def _kept(first: Callable[[Setting], T], drafting: Callable[[Setting, T], Drafting]) -> Callable[[], Make]:
    """Drafts from something that all texts of a decoder share, made for the first of them."""

    def begun() -> Make:
        kept: list[T] = []

        def make(setting: Setting) -> Drafting:
            if not kept:
                kept.append(first(setting))
            return drafting(setting, kept[0])

        return make

    return begun


def _memory(setting: Setting, storage: NGramStorage) -> Drafting:
    """The text's own repetitions first, then what all texts so far have said."""
    drafter = first_of(SuffixDrafter(), at_most(5, NGramDrafter(storage, source="memory")))
    return Drafting(drafter, (UpdateNgram(storage, filler_top_k=1),))


def _recycling(drafter: Callable[[Setting, Recycled], Drafter]) -> Callable[[], Make]:
    """A drafter over a table of all that was read, for all texts so far; it begins with the target's bigrams."""
    return _kept(
        lambda setting: Recycled(setting.vocab_size, before=setting.bigrams()),
        lambda setting, table: Drafting(drafter(setting, table), (Recycle(table),)),
    )


def _llm(setting: Setting) -> Drafting:
    """The assistant's own samples, of the tokens that are shared where it has another vocabulary."""
    model = setting.assistant
    if model is None:
        raise DecodeError("drafter", "there is no assistant to draft", "None", "give a smaller model")
    predictor, known, target = setting.reading(model), limits_of(model), limits_of(setting.model)
    if setting.shared is not None:  # its memo is not told of the text, which is in the target's ids
        shared = IntersectionDrafter(predictor, setting.shared, setting.processor, setting.rng, known.context)
        return Drafting(shared)
    drafter = LLMDrafter.fitting(predictor, known, target, setting.processor, setting.rng)
    return Drafting(drafter, memos=(predictor,))


def _retokenised(setting: Setting) -> Drafting:
    """What an assistant with another vocabulary finds most probable, as text; of one vocabulary its own samples."""
    model, shared = setting.assistant, setting.shared
    if model is None or shared is None:
        return _llm(setting)
    # The setting's processor may know the target's ids by heart, as a grammar does.
    drafter = LLMDrafter(setting.reading(model), GreedyProcessor(), setting.rng, limits_of(model).context)
    return Drafting(Retokenised(drafter, shared))


def _head(setting: Setting) -> HeadPredictor:
    if setting.head is None:
        raise DecodeError("drafter", "there is no head to draft", "None", "give one that was made for the target")
    return setting.head


def _with_head(setting: Setting, followers: Followers | None) -> Drafter:
    """What the head finds most probable, and what the text repeats and `followers` say, in one tree."""
    return merged(LookupTree(followers), HeadTree(_head(setting)))


def _head_chain(setting: Setting) -> Drafting:
    """Samples of the head."""
    return Drafting(HeadDrafter(_head(setting), setting.processor, setting.rng))


DRAFTERS: Final[Mapping[str, Entry]] = {
    "none": Entry(_each(lambda: propose_nothing)),
    "suffix": Entry(_each(SuffixDrafter)),
    "lookup": Entry(_each(PromptLookup)),
    "suffix+lookup": Entry(_each(lambda: longest(SuffixDrafter(), PromptLookup()))),
    "ngram": Entry(lambda: _ngram),
    "memory": Entry(_kept(lambda setting: NGramStorage(4, setting.vocab_size), _memory)),
    "llm": Entry(lambda: _llm, assisted=True),
    "retokenised": Entry(lambda: _retokenised, assisted=True),
    "tree": Entry(lambda: lambda setting: Drafting(LookupTree(setting.bigrams())), bigrams=True),
    "head": Entry(lambda: lambda setting: Drafting(HeadTree(_head(setting))), headed=True),
    "head-chain": Entry(lambda: _head_chain, headed=True),
    "recycle": Entry(_recycling(lambda setting, table: RecyclingTree(table)), bigrams=True),
    "logits": Entry(_recycling(lambda setting, table: LogitTree(table)), bigrams=True),
    "tree+recycle": Entry(_recycling(lambda setting, table: LookupTree(table)), bigrams=True),
    "head+tree": Entry(
        lambda: lambda setting: Drafting(_with_head(setting, setting.bigrams())), bigrams=True, headed=True
    ),
    "head+tree+recycle": Entry(_recycling(_with_head), bigrams=True, headed=True),
}


# Policies.


Policy: TypeAlias = Callable[[int, float, CostMeter], GammaPolicy]
"""(the most tokens that it drafts, temperature, the target's meter) → a policy.

A policy that learns is taught by one text at a time: one for all texts of a decoder, or one for each text of a batch.
"""

POLICIES: Final[Mapping[str, Policy]] = {
    "cost": lambda most, temperature, meter: CostAware(meter, most),
    "fixed": lambda most, temperature, meter: Fixed(most),
    "heuristic": lambda most, temperature, meter: Heuristic(min(5, most), most),
    "egag": lambda most, temperature, meter: EGAG(gamma_max=most, temperature=temperature),
    "confidence": lambda most, temperature, meter: StopAfter(Unsure(temperature=temperature), Fixed(most)),
    "svip": lambda most, temperature, meter: StopAfter(SVIP(temperature=temperature), Fixed(most)),
    "adaedl": lambda most, temperature, meter: StopAfter(AdaEDL(temperature=temperature), Fixed(most)),
}

USUAL_POLICY: Final = "cost"
"""What says how many tokens are drafted where nobody does: by what they cost here, so that no draft makes it slower."""

USUAL_MOST: Final = 16
"""The most tokens that are drafted in a step where nobody says."""


# Rules, and the step that all of them make.


COUPLED: Final[Mapping[str, Callable[[Sampling], Rule[Sampling]]]] = {"match": Match}
"""The rules under which a seed of `SharedNoise` has one text, whatever is drafted."""

RULES: Final[Mapping[str, Callable[[Randomness], Rule]]] = {
    "reject": Reject,
    "block": Block,
    "traverse": Traverse,
    **COUPLED,
}


def all_drafts(drafted: Drafted) -> Drafted:
    """The stage that cuts nothing."""
    return drafted


def step_of(
    drafting: Drafting,
    gamma: GammaPolicy,
    target: Predictor,
    processor: Processor,
    rng: S,
    rule: Rule[S],
    prune: tuple[Prunable, ...] = (),
    until: Condition = never,
    cut: Callable[[Drafted], Drafted] = all_drafts,
    observe: Observer = unobserved,
) -> Step:
    """The step that a drafter, a policy and a rule make. Lossless, as all of the catalogue is.

    `cut` is a lossless stage between drafting and verifying, such as `CutForbidden(answer)`; `observe` sees each step.

    >>> from specflow import MultinomialProcessor, SharedNoise, run, start
    >>> from specflow.testing import TableModel
    >>> noise, processor = SharedNoise(1), MultinomialProcessor(1.0)
    >>> drafting = DRAFTERS["suffix"].make()(Setting(Module(), 3, (0,), processor, noise))
    >>> step = step_of(drafting, Fixed(5), TableModel(3), processor, noise, COUPLED["match"](noise))
    >>> run(step, start((0,), 6).unwrap()).state.output
    (0, 0, 2, 0, 0, 1)
    """
    a(Drafting, "give what an entry makes of a Setting")("drafting", drafting)
    _are_memos("prune", prune)
    calls("a stage of drafts", "give one such as CutForbidden(answer)")("cut", cut)
    draft, adjust = Draft(drafting.drafter, gamma), Adjust(rng)
    verify = Verify(target, processor, rule)
    end = ending(until, observe, PruneCache((*drafting.memos, *prune)), *drafting.teach)
    # Not `.then`: verify says what is wrong with a cut that answers something else.
    return lambda state: verify(cut(draft(state))).then(adjust).then(end)
