"""Decoders with one mistake each, all of which have been made somewhere. The certificate must refuse every one.

`python -m tests.mutants` prints the table of docs/certificate.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Final, final

import torch
from attrs import evolve, frozen
from returns.pipeline import flow
from torch import Tensor
from torch.nn import Embedding, Linear
from typing_extensions import override

from specflow import (
    TEXT,
    Adjusted,
    Categorical,
    DecodeState,
    Drafted,
    Drafter,
    EachPrefix,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    NGramStorage,
    PointMass,
    Processor,
    Proposal,
    Reject,
    Rule,
    Scored,
    Step,
    Tokens,
    TopKProcessor,
    Verdict,
    Verified,
    chain,
    ngram_step,
    run,
    speculative_step,
    verified_step,
)
from specflow.constraints import Constrained, Grammar
from specflow.distribution import Distribution, max_fn
from specflow.drafters import INgramStorage, propose_nothing
from specflow.heads import HeadPredictor, Jump, Vocabulary
from specflow.lossy import accept_loss
from specflow.randomness import Randomness, Sampling
from specflow.stages import (
    Adjust,
    Draft,
    LossyJudge,
    LossyTypical,
    Score,
    UpdateNgram,
    Verify,
    advance,
    commit,
    ending,
    never,
    unobserved,
)
from specflow.state import Committed, Pace, Reason
from specflow.steps import lossy_unadjusted_step
from specflow.testing import Case, Ending, ExactnessError, TableModel, World, certify, same_law
from specflow.testing.certificate import autoregressive


def samples(world: World) -> LLMDrafter:
    """The small model as drafter."""
    return LLMDrafter(world.drafter, world.processor, world.rng)


def guesses(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """A drafter without a die: it bets that 0 and 1 take turns."""
    while True:
        tokens = (*tokens, len(tokens) % 2)
        yield Proposal(tokens[-1])


FEW: Final = 3
"""How many drafts of a drawn tree are enough to show a mistake: two siblings, and one behind the first."""


def bush(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """A tree drafter without a die: both 0 and 1 behind the text, and behind each of them the token that comes next."""
    first = len(tokens) % 2
    yield Proposal(first, parent=TEXT)
    yield Proposal(1 - first, parent=TEXT)
    yield Proposal(1 - first, parent=0)
    yield Proposal(first, parent=1)


def forked(world: World, widths: tuple[int, ...] = (2, 1)) -> LLMDrafter:
    """The small model as drafter of a tree: siblings drawn without putting back, the next level behind each of them."""
    return LLMDrafter(world.drafter, world.processor, world.rng, widths=widths)


def thicket(world: World) -> Drafter:
    """A tree drafter with two draws of one law behind the text, which may be equal, and a certain draft beside them.

    Behind the first draw the drafter draws again, and behind the certain draft there is a certain one.
    """

    def propose(tokens: Tokens) -> Iterator[Proposal]:
        sampled, certain = samples(world), len(tokens) % 2
        first = next(sampled(tokens))
        yield evolve(first, parent=TEXT)
        yield evolve(next(sampled(tokens)), parent=TEXT)
        yield Proposal(certain, parent=TEXT)
        yield evolve(next(sampled((*tokens, first.token))), parent=0)
        yield Proposal(1 - certain, parent=2)

    return propose


def apart(drafter: Drafter) -> Drafter:
    """A drafter whose storage draws a token from torch's global generator where it knows nothing.

    Here that token is a function of the position, and the generator is as it was: any function would do.
    """

    def propose(tokens: Tokens) -> Iterator[Proposal]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(len(tokens))
            drafts = tuple(islice(drafter(tokens), 3))
        return iter(drafts)

    return propose


def by_rule(world: World, rule: Rule, drafter: Drafter | None = None, gamma: int = 5) -> Step:
    """The usual step with another verification rule."""
    drafter = samples(world) if drafter is None else drafter
    return verified_step(drafter, world.target, world.processor, world.rng, rule, Fixed(gamma))


def ratio(p: Distribution, draft: Proposal) -> float:
    """min(1, p(x) / q(x)), for laws that are known."""
    x = draft.token
    return min(1.0, float(dense(p)[x] / dense(draft.q)[x]))


def dense(law: Distribution) -> Tensor:
    """The probabilities as [4], of a vocabulary of at most 4; a sampler's, as if it drew from them."""
    if isinstance(law, PointMass):
        return torch.eye(4, dtype=torch.float64)[law.token]
    return torch.cat([law.probs, torch.zeros(4 - len(law.probs), dtype=torch.float64)])


# Greedy by softmax


@final
@frozen
class SoftmaxLaws:
    """Takes the softmax for the law of a processor that chooses greedily."""

    def laws(self, tokens: Tokens, logits: Tensor, /) -> tuple[Distribution, ...]:
        """The softmax of each row."""
        return MultinomialProcessor(1.0).laws(tokens, logits)


@final
@frozen
class Argmax:
    """Draws by argmax, whatever the law."""

    def draw(self, law: Distribution, position: int, /) -> int:
        """The most probable token."""
        return int(dense(law).argmax())

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """`draw`, where the law is."""
        return probs.argmax()


def greedy_by_softmax(world: World) -> Step:
    draft, adjust = Draft(LLMDrafter(world.drafter, SoftmaxLaws(), Undecided(Argmax()))), Adjust(Argmax())
    verify = Verify(world.target, SoftmaxLaws(), Reject(world.rng))
    return lambda state: flow(state, draft, verify, adjust, commit, advance)  # type: ignore[arg-type] # as mypy sees


# Trees


def walking(world: World, choose: Callable[[Distribution, Sequence[int], int], int | None]) -> Step:
    """The usual step over `bush`; `choose` takes p, the siblings' tokens and their position, and says which stands."""

    def rule(scored: Scored) -> Verdict:
        drafted, here = scored.drafted, TEXT
        while children := drafted.children(here):
            siblings = [drafted.proposals[i].token for i in children]
            chosen = choose(scored.law(here), siblings, len(drafted.text(here)))
            if chosen is None:
                break
            here = children[chosen]
        return Verdict(drafted.path(here))

    return by_rule(world, rule, bush)


def siblings_judged_one_by_one(world: World) -> Step:
    """Each sibling stands with probability p(x), as if none had been rejected before it."""

    def choose(p: Distribution, siblings: Sequence[int], position: int) -> int | None:
        accepted = [i for i, x in enumerate(siblings) if world.rng.accept(float(dense(p)[x]))]
        return accepted[0] if accepted else None

    return walking(world, choose)


def redraw_behind_a_tree(world: World) -> Step:
    """The target's sample is no child, and another one is drawn in its place."""

    def choose(p: Distribution, siblings: Sequence[int], position: int) -> int | None:
        sample = world.rng.draw(p, position)
        return siblings.index(sample) if sample in siblings else None

    return walking(world, choose)


def by_siblings(world: World, judged_by: Callable[[Sequence[Distribution]], int], leaves: int) -> Step:
    """Token rejection on a tree of drawn siblings: p, and what the rejected siblings left of it one after the other.

    `judged_by` says which of these laws so far judges the next sibling, and `leaves` which of them all is the
    correction's.
    """

    def rule(scored: Scored) -> Verdict:
        drafted, here = scored.drafted, TEXT
        while children := drafted.children(here):
            laws = [scored.law(here)]
            for child in children:
                draft = drafted.proposals[child]
                if world.rng.accept(ratio(laws[judged_by(laws)], draft)):
                    here = child
                    break
                laws.append(left_by(draft, laws[-1]))
            else:
                return Verdict(drafted.path(here), laws[leaves])
        return Verdict(drafted.path(here))

    return by_rule(world, rule, forked(world), FEW)


def left_by(draft: Proposal, p: Distribution) -> Distribution:
    """norm(max(0, p - q)), and p where nothing is left."""
    rest = max_fn(dense(p) - dense(draft.q))
    return Categorical(rest) if rest.any() else p


def siblings_judged_by_one_law(world: World) -> Step:
    """Each sibling stands with probability p(x) / q(x), whatever was rejected before it."""
    return by_siblings(world, lambda laws: 0, -1)


def residual_of_the_first_sibling_alone(world: World) -> Step:
    """What the first sibling left judges all others, and is what the correction is drawn from."""
    return by_siblings(world, lambda laws: min(1, len(laws) - 1), 1)


def siblings_as_if_put_back(world: World) -> Step:
    """Siblings are drawn without putting back, and each comes with the law that the first was drawn from."""

    def forgetful(tokens: Tokens) -> Iterator[Proposal]:
        laws: dict[int, Distribution] = {}
        for draft in forked(world)(tokens):
            yield evolve(draft, q=laws.setdefault(draft.parent, draft.q))

    return by_rule(world, Reject(world.rng), forgetful, FEW)


def equal_siblings_kept_once(world: World) -> Step:
    """Two tokens are drawn from one law, and the second is dropped where it is the first again."""

    def propose(tokens: Tokens) -> Iterator[Proposal]:
        first, second = (next(samples(world)(tokens)) for _ in range(2))
        yield evolve(first, parent=TEXT)
        if second.token != first.token:
            yield evolve(second, parent=TEXT)

    return speculative_step(propose, world.target, world.processor, world.rng)


def traversal(world: World, rejected: Callable[[float, float], float]) -> Step:
    """`Traverse` for drafts that were all drawn; `rejected` makes a weight and a mass the weight after a rejection."""

    def below(scored: Scored, here: int, weight: float) -> tuple[int, Distribution] | None:
        drafted, p = scored.drafted, scored.law(here)
        for child in drafted.children(here):
            draft = drafted.proposals[child]
            q, x = dense(draft.q), draft.token
            found = below(scored, child, min(1.0, weight * float(dense(p)[x] / q[x]))) if weight > 0 else None
            if found is not None:
                return found
            mass = float((weight * dense(p) - q).clamp(min=0).sum())
            p = Categorical(max_fn(weight * dense(p) - q)) if mass > 0 else p
            weight = rejected(weight, mass)
        return (here, p) if world.rng.accept(weight) else None

    def rule(scored: Scored) -> Verdict:
        found = below(scored, TEXT, 1.0)
        return Verdict(()) if found is None else Verdict(scored.drafted.path(found[0]), found[1])

    return by_rule(world, rule, forked(world), FEW)


def traversed(weight: float, mass: float) -> float:
    """The right weight after a rejection."""
    return mass / (mass + (1.0 - weight)) if mass > 0 else float(weight >= 1)


def traversal_that_keeps_its_weight(world: World) -> Step:
    return traversal(world, lambda weight, mass: weight)


def traversal_that_takes_the_mass_for_a_weight(world: World) -> Step:
    return traversal(world, lambda weight, mass: weight if weight >= 1 else min(mass, 1.0))


# Verification


def redraw_after_a_miss(world: World) -> Step:
    def rule(scored: Scored) -> Verdict:
        start = len(scored.drafted.state.tokens)
        for i, draft in enumerate(scored.drafted.proposals):
            if world.rng.draw(scored.law(i - 1), start + i) != draft.token:
                return Verdict(tuple(range(i)), scored.law(i - 1))
        return all_stand(scored)

    return by_rule(world, rule, guesses)


def all_stand(scored: Scored) -> Verdict:
    """The whole of a chain stands."""
    return Verdict(tuple(range(len(scored.drafted.proposals))))


def residual_of_a_point_mass(world: World) -> Step:
    def rule(scored: Scored) -> Verdict:
        for i, draft in enumerate(scored.drafted.proposals):
            p = scored.law(i - 1)
            if not world.rng.accept(ratio(p, draft)):
                rest = dense(p)
                rest[draft.token] = 0.0
                return Verdict(tuple(range(i)), Categorical(max_fn(rest)) if rest.any() else p)
        return all_stand(scored)

    return by_rule(world, rule)


@final
@frozen
class LessOrEqual:
    """u <= probability, with u one of the 2²⁴ numbers that `torch.rand` gives: true at probability 0 when u is 0."""

    rng: Randomness

    def draw(self, law: Distribution, position: int, /) -> int:
        """One token of the law."""
        return self.rng.draw(law, position)

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """`draw`, where the law is."""
        return self.rng.draw_there(probs, position)

    def accept(self, probability: float, /) -> bool:
        """True with the given probability, except that 0 is not impossible."""
        return self.rng.accept(max(probability, 2.0**-24))


def less_or_equal(world: World) -> Step:
    def rule(scored: Scored) -> Verdict:
        for i, draft in enumerate(scored.drafted.proposals):
            p = scored.law(i - 1)
            if not LessOrEqual(world.rng).accept(ratio(p, draft)):
                return Verdict(tuple(range(i)), Categorical(max_fn(dense(p) - dense(draft.q))))
        return all_stand(scored)

    return by_rule(world, rule)


@final
@frozen
class Undecided:
    """What is no fresh randomness, taken for it. It draws, and takes no decisions."""

    noise: Sampling

    def draw(self, law: Distribution, position: int, /) -> int:
        """One token of the law."""
        return self.noise.draw(law, position)

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """`draw`, where the law is."""
        return self.noise.draw_there(probs, position)

    def accept(self, probability: float, /) -> bool:
        """Fails the test."""
        raise AssertionError("noise was asked for a decision")


def reused_uniform(world: World) -> Step:
    """`noise` is one uniform for each position: the one that rejected the draft also draws its replacement."""

    def rule(scored: Scored) -> Verdict:
        start = len(scored.drafted.state.tokens)
        for i, draft in enumerate(scored.drafted.proposals):
            p = scored.law(i - 1)
            accepted = ratio(p, draft)
            decision = Categorical(torch.tensor([accepted, 1.0 - accepted], dtype=torch.float64))
            if world.noise.draw(decision, start + i) == 1:
                rest = Categorical(max_fn(dense(p) - dense(draft.q)))
                return Verdict(tuple(range(i)), PointMass(world.noise.draw(rest, start + i)))
        return all_stand(scored)

    return by_rule(world, rule)


def shared_noise_under_rejection(world: World) -> Step:
    """Seed coupling with the wrong rule: the noise that made the draft also draws its replacement."""
    draft, adjust = Draft(LLMDrafter(world.drafter, world.processor, Undecided(world.noise))), Adjust(world.noise)
    verify = Verify(world.target, world.processor, Reject(world.rng))
    return lambda state: flow(state, draft, verify, adjust, commit, advance)  # type: ignore[arg-type] # as mypy sees


def first_failure_in_the_block(world: World) -> Step:
    def rule(scored: Scored) -> Verdict:
        proposals = scored.drafted.proposals
        weight, rest = 1.0, scored.law(TEXT)
        for i, draft in enumerate(proposals):
            p, q = dense(scored.law(i - 1)), dense(draft.q)
            left = (weight * p - q).clamp(min=0)
            rest = Categorical(max_fn(left)) if left.any() else scored.law(i - 1)
            weight = min(1.0, weight * float(p[draft.token] / q[draft.token]))
            if i + 1 == len(proposals):
                passes = weight
            else:
                mass = float((weight * dense(scored.law(i)) - dense(proposals[i + 1].q)).clamp(min=0).sum())
                passes = mass / (mass + 1.0 - weight) if mass else float(weight == 1.0)
            if not world.rng.accept(passes):
                return Verdict(tuple(range(i)), rest)
        return all_stand(scored)

    return by_rule(world, rule)


def hierarchical(
    rng: Randomness,
    cap: Callable[[Sequence[float]], int],
    whole: Callable[[float, float], float],
    law_of_siblings: Callable[[Distribution, Distribution], Distribution] = lambda p, left: left,
) -> Rule:
    """Hierarchical verification of drafts that were all drawn, as its paper has it, apart from `Block`.

    `cap` says which prefix's ratio divides the next ones, `whole` makes of the capped ratio of the whole draft and the
    plain one the probability that it stands, and `law_of_siblings` takes from p and what was left of it the law that
    judges siblings.
    Source: Zhou et al. 2601.05724, definitions 4 to 6, equations 19 and 20, algorithms 2 and 3.
    """

    def judged(proposals: Sequence[Proposal], laws: Sequence[Distribution]) -> tuple[int, Distribution]:
        """How many drafts of a path stand, and the law of what follows them."""
        ratios, capped = [1.0], list[float]()
        for draft, law in zip(proposals, laws, strict=False):
            m = cap(ratios)
            capped.append(ratios[-1] / ratios[m] if ratios[m] > 1 else ratios[-1])
            ratios.append(ratios[-1] * float(dense(law)[draft.token] / dense(draft.q)[draft.token]))
        stands = whole(capped[-1] * ratios[-1] / ratios[-2] if ratios[-2] > 0 else 0.0, ratios[-1])
        if rng.accept(min(1.0, stands)):
            return len(proposals), laws[-1]
        for t in reversed(range(len(proposals))):
            p, q = dense(laws[t]), dense(proposals[t].q)
            lacking, excess = (float(part.clamp(min=0).sum()) for part in (capped[t] * p - q, q - capped[t] * p))
            if t == 0 or rng.accept(min(1.0, lacking / excess) if excess > 0 else 1.0):
                return t, Categorical(max_fn(capped[t] * p - q)) if lacking > 0 else laws[t]
        raise AssertionError("no draft always stands")

    def rule(scored: Scored) -> Verdict:
        drafted, here, law = scored.drafted, TEXT, scored.law(TEXT)
        siblings, correction = drafted.children(TEXT), scored.law(TEXT)
        while siblings:
            path = drafted.trunk(siblings[0])
            several = [drafted.proposals[i] for i in path]
            stand, correction = judged(several, [law, *[scored.law(i) for i in path]])
            if stand == len(path):
                return Verdict(drafted.path(path[-1]), correction)
            here = path[stand - 1] if stand else here
            siblings = (drafted.children(here) if stand else siblings)[1:]
            law = law_of_siblings(scored.law(here), correction)
        return Verdict(drafted.path(here), correction)

    return rule


def highest(ratios: Sequence[float]) -> int:
    """Definition 4: the prefix whose ratio is the largest, or none where no ratio is above 1."""
    return max(range(len(ratios)), key=ratios.__getitem__)


def last_above_one(ratios: Sequence[float]) -> int:
    """Section C.3 of the paper: the last prefix whose ratio is above 1, and whose last token's ratio is, too."""
    return max((i for i in range(1, len(ratios)) if ratios[i] > 1 and ratios[i] > ratios[i - 1]), default=0)


def capped_ratio(capped: float, plain: float) -> float:
    """Equation 19."""
    return capped


def plain_ratio(capped: float, plain: float) -> float:
    """Listing 2 of the paper."""
    return plain


def whole_draft_by_its_plain_ratio(world: World) -> Step:
    return by_rule(world, hierarchical(world.rng, highest, plain_ratio))


def capped_at_the_last_peak(world: World) -> Step:
    return by_rule(world, hierarchical(world.rng, last_above_one, capped_ratio))


def siblings_of_a_block_judged_by_p(world: World) -> Step:
    rule = hierarchical(world.rng, highest, capped_ratio, lambda p, left: p)
    return by_rule(world, rule, forked(world), FEW)


def bonus_from_the_wrong_row(world: World) -> Step:
    def rule(scored: Scored) -> Verdict:
        verdict, drafts = Reject(world.rng)(scored), len(scored.drafted.proposals)
        return Verdict(verdict.path, scored.law(drafts - 2)) if len(verdict.path) == drafts > 0 else verdict

    return by_rule(world, rule)


def skipped_adjustment(world: World) -> Step:
    return accept_loss(lossy_unadjusted_step(samples(world), world.target, world.processor, world.rng))


def typical_acceptance(world: World) -> Step:
    draft, score = Draft(samples(world)), Score(world.target, world.processor)
    judge, adjust, end = LossyJudge(LossyTypical(world.rng)), Adjust(world.rng), ending()
    return accept_loss(
        lambda state: state.then(draft).then(score).then(judge).map(lambda verified: verified.then(adjust).then(end))
    )


# Drafting


def policy_drops_the_token_it_saw(world: World) -> Step:
    def confident(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Pace]:
        taken: list[Proposal] = []
        for proposal in islice(stream, 5):
            if dense(proposal.q)[proposal.token] < 0.5:
                break
            taken.append(proposal)
        return tuple(taken), ()

    return speculative_step(samples(world), world.target, world.processor, world.rng, confident)


def policy_peeks_at_the_target(world: World) -> Step:
    def knowing(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Pace]:
        tokens, taken = state.tokens, []
        for proposal in islice(stream, 5):
            p = world.processor.laws(tokens, world.target(tokens, ()))[0]
            if dense(p)[proposal.token] < dense(proposal.q)[proposal.token]:
                break
            taken.append(proposal)
            tokens = (*tokens, proposal.token)
        return tuple(taken), ()

    return speculative_step(samples(world), world.target, world.processor, world.rng, knowing)


def another_law_than_the_draft_was_drawn_from(world: World) -> Step:
    def flattened(tokens: Tokens) -> Iterator[Proposal]:
        while True:
            (q,) = MultinomialProcessor(3.0).laws(tokens, world.drafter(tokens, ()))
            reported = world.processor.laws(tokens, world.drafter(tokens, ()))[0]
            tokens = (*tokens, world.rng.draw(q, len(tokens)))
            yield Proposal(tokens[-1], reported)

    return speculative_step(flattened, world.target, world.processor, world.rng)


# Heads


def jumping(world: World) -> HeadPredictor:
    """A random linear head over the target; it drafts the target's tokens in another order."""
    target = world.target
    assert isinstance(target, TableModel)
    size, width = target.vocab_size, target.width
    with torch.random.fork_rng():
        torch.manual_seed(target.seed)
        ids = torch.arange(size).flip(0)
        head = Jump(width, Vocabulary(size, size, ids), (0,), Embedding(size, width), Linear(width, size, bias=False))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_(0, 1)
    return HeadPredictor(head.double().eval().requires_grad_(False), target)


def heard_from(world: World, say: Callable[[HeadPredictor, Tokens, Tokens], tuple[int, Distribution]]) -> Step:
    """The usual step with drafts of a head, where it has something to read: `say` has each and the q that is told."""
    predict = jumping(world)

    def propose(tokens: Tokens) -> Iterator[Proposal]:
        drafted: Tokens = ()
        while predict.reach(tokens) != 0:
            token, q = say(predict, tokens, drafted)
            yield Proposal(token, q)
            drafted = (*drafted, token)

    return speculative_step(propose, world.target, world.processor, world.rng, Fixed(3))


def q_of_a_head(world: World, predict: HeadPredictor, text: Tokens, drafted: Tokens) -> Distribution:
    """The head's law after a text and drafts."""
    return world.processor.laws(text + drafted, predict(text, chain(drafted))[-1:])[0]


def head_heard_a_place_too_early(world: World) -> Step:
    def say(predict: HeadPredictor, text: Tokens, drafted: Tokens) -> tuple[int, Distribution]:
        q = q_of_a_head(world, predict, text, drafted)
        before = q_of_a_head(world, predict, text, drafted[:-1])
        return world.rng.draw(before, len(text) + len(drafted)), q

    return heard_from(world, say)


def q_in_the_heads_own_vocabulary(world: World) -> Step:
    def say(predict: HeadPredictor, text: Tokens, drafted: Tokens) -> tuple[int, Distribution]:
        row = predict.rows(text, chain(drafted), 1)
        q = world.processor.laws(text + drafted, row)[0]
        token = world.rng.draw(q, len(text) + len(drafted))
        return int(predict.head.vocabulary.named(torch.tensor(token))), q

    return heard_from(world, say)


def likeliest_token_of_a_head_with_its_law(world: World) -> Step:
    def say(predict: HeadPredictor, text: Tokens, drafted: Tokens) -> tuple[int, Distribution]:
        q = q_of_a_head(world, predict, text, drafted)
        return int(predict(text, chain(drafted))[-1].argmax()), q

    return heard_from(world, say)


def head_that_goes_on_from_rejected_drafts(world: World) -> Step:
    """The head's states of the step before are not forgotten: what is drawn first comes after the drafts made then."""
    stale: list[tuple[Tokens, Tokens]] = []

    def say(predict: HeadPredictor, text: Tokens, drafted: Tokens) -> tuple[int, Distribution]:
        q = q_of_a_head(world, predict, text, drafted)
        before = q_of_a_head(world, predict, *stale[-1]) if stale and not drafted else q
        token = world.rng.draw(before, len(text) + len(drafted))
        stale.append((text, (*drafted, token)))
        return token, q

    return heard_from(world, say)


# Stopping


def without_stops(scored: Scored) -> Scored:
    """The same, of a text that nothing ends."""
    drafted = scored.drafted
    endless = evolve(drafted.state, request=evolve(drafted.state.request, stop=frozenset()))
    return Scored(Drafted(endless, drafted.proposals), scored.logits, scored.make)


def past_stops(world: World) -> Callable[[DecodeState], Drafted]:
    """Drafts that go on behind a stop token, as chains of `Draft` do not."""
    return lambda state: Drafted(state, tuple(islice(samples(world)(state.tokens), min(5, state.room - 1))))


def reject_past_stops(world: World) -> Rule:
    """Token rejection that goes on behind a stop token."""
    return lambda scored: Reject(world.rng)(without_stops(scored))


def judged_past_stops(world: World, end: Callable[[Adjusted], Committed]) -> Step:
    """The usual step, but no stage looks for stop tokens, and another one commits."""
    draft, score, adjust = past_stops(world), Score(world.target, world.processor), Adjust(world.rng)
    rule = reject_past_stops(world)

    def judge(scored: Scored) -> Verified:
        verdict = rule(scored)
        behind = scored.law(verdict.path[-1] if verdict.path else TEXT)
        return Verified(scored, verdict.path, verdict.correction or behind)

    return lambda state: draft(state).then(score).then(judge).then(adjust).then(end).then(advance)


def stop_looked_for_at_the_end_only(world: World) -> Step:
    def late(adjusted: Adjusted) -> Committed:
        state = adjusted.verified.drafted.state
        after = evolve(state, tokens=state.tokens + adjusted.tokens)
        stopped = after.tokens[-1] in state.request.stop
        return Committed(adjusted, after, Reason.STOP if stopped else Reason.LIMIT if after.room <= 0 else None)

    return judged_past_stops(world, late)


def stop_found_by_id(world: World) -> Step:
    """Several stop tokens in one step: cuts at the first *id* that occurs, not at the earliest position."""

    def misled(adjusted: Adjusted) -> Committed:
        state = adjusted.verified.drafted.state
        for stop in sorted(state.request.stop):
            if stop in adjusted.tokens:
                end = adjusted.tokens.index(stop) + 1
                return Committed(adjusted, evolve(state, tokens=state.tokens + adjusted.tokens[:end]), Reason.STOP)
        return commit(adjusted)

    return judged_past_stops(world, misled)


@final
@frozen
class Heard:
    """A text, and the texts behind a stop token whose law a processor was asked for."""

    ending: Ending
    over: frozenset[Tokens]

    @override
    def __str__(self) -> str:
        return f"{self.ending}; asked behind {', '.join(map(str, sorted(self.over))) or 'no stop token'}"


def heard_of(compose: Callable[[World, Processor], Step]) -> Callable[[Case], object]:
    """The target's processor must not be asked about a text that is over: a strict automaton has no law there."""

    def program(world: World) -> Heard:
        prompt, stop = world.start.request.prompt, world.start.request.stop
        over: set[Tokens] = set()

        def law(prefix: Tokens, logits: Tensor) -> Distribution:
            if stop.intersection(prefix[len(prompt) :]):
                over.add(prefix[len(prompt) :])
            return world.processor.laws(prefix, logits[None])[0]

        ending = Ending.of(run(compose(world, EachPrefix(law)), world.start))
        return Heard(ending, frozenset(over))

    def reference(world: World) -> Heard:
        return Heard(autoregressive(world, world.rng), frozenset())

    return lambda case: same_law(program, reference, [case])


def rule_that_goes_behind_a_stop_token(world: World, processor: Processor) -> Step:
    """The text is cut at its first stop token, so that it is exact; but what is behind that was asked for."""
    return judged_past_stops(evolve(world, processor=processor), commit)


# Learning


@final
@frozen
class Taught:
    """A text and what a storage has learned from it: (context, token, how often)."""

    ending: Ending
    learned: frozenset[tuple[Tokens, int, int]]

    @override
    def __str__(self) -> str:
        learned = ", ".join(f"{context} → {token}: {times}" for context, token, times in sorted(self.learned))
        return f"{self.ending}; learned {learned}"


def contents(compose: Callable[[World, NGramStorage], Step]) -> Callable[[World], Taught]:
    """Decodes with a new storage, and tells what it holds afterwards."""

    def program(world: World) -> Taught:
        storage = NGramStorage(2, 4)
        ending = Ending.of(run(compose(world, storage), world.start))
        counts = storage.counts().items()
        return Taught(ending, frozenset((context, *one) for context, row in counts for one in row.items()))

    return program


def learning(world: World, storage: INgramStorage, drafter: Drafter, filler_top_k: int = 2) -> Step:
    update = UpdateNgram(storage, filler_top_k)
    return ngram_step(drafter, world.target, world.processor, world.rng, update)


def learning_what_was_rejected(world: World, storage: NGramStorage) -> Step:
    draft, verify = Draft(samples(world)), Verify(world.target, world.processor, Reject(world.rng))
    adjust, end = Adjust(world.rng), ending(never, unobserved, UpdateNgram(storage, 2))

    def too_eager(verified: Verified) -> Verified:
        text, accepted = verified.drafted.state.tokens + verified.drafted.tokens, verified.accepted
        rejected = verified.drafted.tokens[accepted:]
        storage.learn(text, len(text) - len(rejected), [[draft] for draft in rejected])
        return verified

    return lambda state: state.then(draft).then(verify).then(too_eager).then(adjust).then(end)


def contents_of(compose: Callable[[World, NGramStorage], Step], filler_top_k: int = 2) -> Callable[[Case], object]:
    """Text and contents of the storage together must have the law that they have without drafts."""

    def alone(world: World, storage: NGramStorage) -> Step:
        return learning(world, storage, propose_nothing, filler_top_k)

    return lambda case: same_law(contents(compose), contents(alone), [case])


# Grammars


@final
@frozen
class Pairs:
    """The tokens are a, b and aa, and a b may only come after an even number of as.

    After an odd number of them an a is sure to come, as bytes go; as tokens go, a model may say a or aa.
    """

    even: bool = True

    def mask(self) -> Tensor:
        """What may come next."""
        return torch.tensor([True, self.even, True])

    def after(self, token: int, /) -> Pairs:
        """One a more, or two, or none."""
        return Pairs(self.even != (token == 0))

    def forced(self) -> Tokens:
        """What a library makes of bytes that are forced."""
        return () if self.even else (0,)

    def may_end(self) -> bool:
        """Always."""
        return True


PAIRS: Final = Grammar(Pairs, stop=())


def in_pairs(inner: Processor, read: Callable[[Tokens], Tokens] = lambda output: output) -> Processor:
    """The law under `Pairs` of cases with one token as their prompt, without our code for grammars.

    `read` makes what the mask is of out of what was said.
    """

    def law(prefix: Tokens, logits: Tensor) -> Distribution:
        even = read(prefix[1:]).count(0) % 2 == 0
        return inner.laws(prefix, logits.masked_fill(~Pairs(even).mask(), -torch.inf)[None])[0]

    return EachPrefix(law)


def obeying(world: World, processor: Processor, drafter: Drafter | None = None) -> Step:
    """The usual step with another processor; its drafts know nothing of the grammar."""
    drafter = LLMDrafter(world.drafter, MultinomialProcessor(1.0), world.rng) if drafter is None else drafter
    return speculative_step(drafter, world.target, processor, world.rng, Fixed(3))


def matcher_that_is_not_rolled_back(world: World) -> Step:
    """The matcher takes each draft as it comes, and keeps those that are rejected."""
    kept: list[int] = []
    inner = MultinomialProcessor(1.0)

    @final
    @frozen
    class Ahead:
        """Advances over all drafts at once."""

        def laws(self, tokens: Tokens, logits: Tensor, /) -> tuple[Distribution, ...]:
            """The law after each row, of a matcher that never goes back."""
            first, said = len(tokens) - len(logits) + 1, tokens[1:]
            laws: list[Distribution] = []
            for row in range(len(logits)):
                kept.extend(said[len(kept) : first + row - 1])
                law = in_pairs(inner, lambda _: tuple(kept)).laws(tokens[: first + row], logits[row : row + 1])[0]
                laws.append(law)
            return tuple(laws)

    return obeying(world, Ahead())


def forced_token_that_is_injected(world: World) -> Step:
    """What the grammar forces is written into the text, and the target is not asked."""
    answer = PAIRS.after(world.start.tokens)
    step = obeying(world, Constrained(MultinomialProcessor(1.0), answer))

    def injecting(state: DecodeState) -> DecodeState | Finished:
        forced = answer.at(state.tokens).forced()
        if not forced:
            return step(state)
        after = evolve(state, tokens=(*state.tokens, *forced))
        return after if after.room > 0 else Finished(after, Reason.LIMIT)

    return injecting


def mask_that_lags_a_token(world: World) -> Step:
    """The mask is that of the text without its last token."""
    return obeying(world, in_pairs(MultinomialProcessor(1.0), lambda output: output[:-1]))


def drawn_drafts_cut_where_they_are_forbidden(world: World) -> Step:
    """A drawn draft that the grammar forbids is taken out, as if nothing had been drawn."""
    answer = PAIRS.after(world.start.tokens)
    draft = Draft(LLMDrafter(world.drafter, MultinomialProcessor(1.0), world.rng), Fixed(3))

    def cut(drafted: Drafted) -> Drafted:
        allowed = [
            bool(answer.allowed(drafted.text(i)[:-1], 3)[draft.token]) for i, draft in enumerate(drafted.proposals)
        ]
        end = allowed.index(False) if False in allowed else len(allowed)
        return evolve(drafted, proposals=drafted.proposals[:end])

    verify = Verify(world.target, Constrained(MultinomialProcessor(1.0), answer), Reject(world.rng))
    adjust, end = Adjust(world.rng), ending()
    return lambda state: state.then(draft).then(cut).then(verify).then(adjust).then(end)


PAIRED: Final = tuple(
    Case(3, (0,), 3, frozenset(), lambda rng: in_pairs(MultinomialProcessor(1.0)), seed) for seed in (2, 3)
)


GREEDY: Final = (Case(3, (0, 1), 4, processor=lambda rng: GreedyProcessor(), seed=13),)
SAMPLED: Final = (
    Case(2, (0,), 4, seed=15),
    Case(3, (2,), 3, seed=1),
    Case(3, (1, 1), 3, frozenset({0, 2}), seed=3),
    Case(3, (0,), 3, processor=lambda rng: TopKProcessor(1.0, 2), seed=6),
)


FULL: Final = SAMPLED[:3]
"""Of a draft outside the top k it would be seen that it was not drawn from its q."""


@final
@frozen
class Mutant:
    """A decoder with a mistake, what finds it, and the cases that it is tried on."""

    mistake: str
    check: Callable[[Case], object]
    cases: tuple[Case, ...] = SAMPLED

    @cache  # noqa: B019 - mutants live as long as the program
    def refusals(self) -> list[ExactnessError]:
        """What is said about it, the largest distance first."""
        return sorted(filter(None, map(self._refusal, self.cases)), key=lambda error: -error.distance)

    def _refusal(self, case: Case) -> ExactnessError | None:
        try:
            self.check(case)
        except ExactnessError as error:
            return error
        return None


def text_of(compose: Callable[[World], Step]) -> Callable[[Case], object]:
    """The certificate, on one case."""
    return lambda case: certify(compose, cases=[case])


MUTANTS: Final = (
    Mutant("greedy by softmax: p and q are softmaxes, choices argmax", text_of(greedy_by_softmax), GREEDY),
    Mutant("siblings of a tree judged one by one by p", text_of(siblings_judged_one_by_one)),
    Mutant("a tree that redraws where the sample is no child", text_of(redraw_behind_a_tree)),
    Mutant("siblings of a tree all judged by p/q", text_of(siblings_judged_by_one_law)),
    Mutant("a residual that is not updated between siblings", text_of(residual_of_the_first_sibling_alone)),
    Mutant("siblings drawn without putting back, their q as if they were put back", text_of(siblings_as_if_put_back)),
    Mutant("equal siblings, each drawn from q, kept once", text_of(equal_siblings_kept_once)),
    Mutant("traversal whose weight stays as it is after a rejection", text_of(traversal_that_keeps_its_weight)),
    Mutant(
        "traversal with the mass as its weight after a rejection", text_of(traversal_that_takes_the_mass_for_a_weight)
    ),
    Mutant("a rule that goes behind a stop token", heard_of(rule_that_goes_behind_a_stop_token)),
    Mutant("n-gram drafting that redraws from p after a miss", text_of(redraw_after_a_miss)),
    Mutant("a wrong residual: p without the draft, though it was sampled", text_of(residual_of_a_point_mass)),
    Mutant("`u <= p/q` at p = 0, `u` one of the 2²⁴ numbers of `torch.rand`", text_of(less_or_equal)),
    Mutant("one uniform rejects the draft and draws its replacement", text_of(reused_uniform)),
    Mutant("noise shared by drafter and target, under the rejection rule", text_of(shared_noise_under_rejection)),
    Mutant("block verification that stops at the first failure", text_of(first_failure_in_the_block)),
    Mutant(
        "hierarchical verification that accepts the whole draft by its plain ratio",
        text_of(whole_draft_by_its_plain_ratio),
    ),
    Mutant(
        "hierarchical verification capped at the last prefix above 1, not the highest",
        text_of(capped_at_the_last_peak),
        (Case(2, (0,), 5, seed=55),),  # it takes a fourth draft, after ratios that rose, fell, and rose again
    ),
    Mutant("siblings behind a block judged by p, not by what it left", text_of(siblings_of_a_block_judged_by_p)),
    Mutant("an n-gram storage that learns from rejected drafts", contents_of(learning_what_was_rejected)),
    Mutant("the bonus token drawn from the row before", text_of(bonus_from_the_wrong_row)),
    Mutant("a policy that drops the unlikely token it saw", text_of(policy_drops_the_token_it_saw)),
    Mutant("a policy that peeks at the target", text_of(policy_peeks_at_the_target)),
    Mutant(
        "drafts drawn at another temperature than their q",
        text_of(another_law_than_the_draft_was_drawn_from),
        FULL,
    ),
    Mutant(
        "a head read a place too early, with the law of the right place", text_of(head_heard_a_place_too_early), FULL
    ),
    Mutant("a head's q over its own vocabulary, not the target's", text_of(q_in_the_heads_own_vocabulary), FULL),
    Mutant(
        "a head's most likely token, with the law that it was not drawn from",
        text_of(likeliest_token_of_a_head_with_its_law),
        FULL,
    ),
    Mutant(
        "a head that goes on from rejected drafts, its q from a fresh reading",
        text_of(head_that_goes_on_from_rejected_drafts),
        FULL,
    ),
    Mutant("skipped adjustment: `LossySkipAdjustment`", text_of(skipped_adjustment)),
    Mutant("typical acceptance: `LossyTypical`", text_of(typical_acceptance)),
    Mutant("a matcher of a grammar that is not rolled back", text_of(matcher_that_is_not_rolled_back), PAIRED),
    Mutant("a forced token that is injected instead of verified", text_of(forced_token_that_is_injected), PAIRED),
    Mutant("a mask that lags a token", text_of(mask_that_lags_a_token), PAIRED),
    Mutant(
        "drawn drafts cut because the grammar forbids them", text_of(drawn_drafts_cut_where_they_are_forbidden), PAIRED
    ),
    Mutant("a stop token inside the block is overlooked", text_of(stop_looked_for_at_the_end_only)),
    Mutant("of two stop tokens the first id wins, not the first position", text_of(stop_found_by_id)),
)


def table() -> str:
    """The refused mutants in Markdown: where each is most wrong, and how wrong."""
    lines = ["| the mistake | total variation | worst text | has probability | should have |", "|---|---|---|---|---|"]
    for mutant in MUTANTS:
        error = mutant.refusals()[0]
        lines.append(
            f"| {mutant.mistake} | {error.distance:.2g} | {error.worst} "
            f"| {error.probability:.2g} | {error.expected:.2g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
