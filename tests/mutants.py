"""Decoders with one mistake each, all of which have been made somewhere. The certificate must refuse every one.

`python -m tests.mutants` prints the table of docs/certificate.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final, final

import torch
from attrs import evolve, frozen
from returns.functions import tap
from returns.pipeline import flow
from torch import Tensor
from typing_extensions import override

from specflow import (
    Adjusted,
    Categorical,
    Committed,
    DecodeState,
    Distribution,
    Drafted,
    DraftedTree,
    Drafter,
    Finished,
    GreedyProcessor,
    INgramStorage,
    LLMDrafter,
    MultinomialProcessor,
    NGramStorage,
    Node,
    Pace,
    PointMass,
    Proposal,
    Randomness,
    Reason,
    Step,
    Tokens,
    TopKProcessor,
    Verified,
    accept_loss,
    lossy_unadjusted_step,
    max_fn,
    ngram_step,
    path_by_path,
    run,
    speculative_step,
)
from specflow.drafters import propose_nothing
from specflow.processors import Laws
from specflow.stages import Adjust, Draft, DraftTree, LossyTypicalAcceptance, RejectTokens, UpdateNgram, advance, commit
from specflow.stages.verify import Judgement, Rule, judged
from specflow.state import TEXT
from specflow.testing import Case, Ending, ExactnessError, World, certify, same_law


def samples(world: World) -> LLMDrafter:
    """The small model as drafter."""
    return LLMDrafter(world.drafter, world.processor, world.rng)


def guesses(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """A drafter without a die: it bets that 0 and 1 take turns."""
    while True:
        tokens = (*tokens, len(tokens) % 2)
        yield Proposal(tokens[-1])


def bush(tokens: Tokens) -> Iterator[Node]:
    """A tree drafter without a die: both 0 and 1 behind the text, and behind each of them the token that comes next."""
    first = len(tokens) % 2
    yield Node(first)
    yield Node(1 - first)
    yield Node(1 - first, 0)
    yield Node(first, 1)


def apart(drafter: Drafter) -> Drafter:
    """A drafter whose storage draws a token from torch's global generator where it knows nothing.

    Here that token is a function of the position, and the generator is as it was: any function would do.
    """

    def propose(tokens: Tokens) -> Iterator[Proposal]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(tokens))
            drafts = tuple(islice(drafter(tokens), 3))
        return iter(drafts)

    return propose


def by_rule(world: World, rule: Rule, drafter: Drafter | None = None) -> Step:
    """The usual step with another verification rule."""
    draft, adjust = Draft(samples(world) if drafter is None else drafter), Adjust(world.rng)

    def verify(drafted: Drafted) -> Verified:
        return judged(drafted, world.target, world.processor, rule)

    return lambda state: flow(state, draft, verify, adjust, commit, advance)


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
    draft, adjust = Draft(LLMDrafter(world.drafter, SoftmaxLaws(), Argmax())), Adjust(Argmax())
    verify = Verify(world.target, SoftmaxLaws(), Reject(world.rng))
    return lambda state: flow(state, draft, verify, adjust, commit, advance)


# Trees


def tree_by(world: World, choose: Callable[[Distribution, Sequence[int], int], int | None]) -> Step:
    """The usual step over `bush`; `choose` takes p, the siblings' tokens and their position, and says which stands."""
    read, draft, adjust = path_by_path(world.target), DraftTree(bush), Adjust(world.rng)

    def verify(drafted: DraftedTree) -> Verified:
        text, nodes = drafted.state.tokens, drafted.nodes
        logits = read(text, nodes)
        path, laws = [TEXT], list[Distribution]()
        while True:
            tokens = text + tuple([nodes[i].token for i in path[1:]])
            laws.append(world.processor.laws(tokens, logits[path[-1] + 1][None])[0])
            below = [i for i, node in enumerate(nodes) if node.parent == path[-1]]
            chosen = choose(laws[-1], [nodes[i].token for i in below], len(tokens)) if below else None
            if chosen is None:
                break
            path.append(below[chosen])
        proposals = [Proposal(nodes[i].token) for i in path[1:]]
        way = logits[[i + 1 for i in path]]
        return Verified(Drafted(drafted.state, tuple(proposals)), len(proposals), laws[-1], tuple(laws), way)

    return lambda state: flow(state, draft, verify, adjust, commit, advance)


def siblings_judged_one_by_one(world: World) -> Step:
    """Each sibling stands with probability p(x), as if none had been refused before it."""

    def choose(p: Distribution, siblings: Sequence[int], position: int) -> int | None:
        accepted = [i for i, x in enumerate(siblings) if world.rng.accept(float(dense(p)[x]))]
        return accepted[0] if accepted else None

    return tree_by(world, choose)


def redraw_behind_a_tree(world: World) -> Step:
    """The target's sample is no child, and another one is drawn in its place."""

    def choose(p: Distribution, siblings: Sequence[int], position: int) -> int | None:
        sample = world.rng.draw(p, position)
        return siblings.index(sample) if sample in siblings else None

    return tree_by(world, choose)


# Verification


def redraw_after_a_miss(world: World) -> Step:
    def rule(proposals: Sequence[Proposal], laws: Laws, start: int) -> Judgement:
        for i, draft in enumerate(proposals):
            if world.rng.draw(laws[i], start + i) != draft.token:
                return i, laws[i]
        return len(proposals), laws[-1]

    return by_rule(world, rule, guesses)


def residual_of_a_point_mass(world: World) -> Step:
    def rule(proposals: Sequence[Proposal], laws: Laws, start: int) -> Judgement:
        for i, draft in enumerate(proposals):
            if not world.rng.accept(ratio(laws[i], draft)):
                rest = dense(laws[i])
                rest[draft.token] = 0.0
                return i, Categorical(max_fn(rest)) if rest.any() else laws[i]
        return len(proposals), laws[-1]

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
    def rule(proposals: Sequence[Proposal], laws: Laws, start: int) -> Judgement:
        for i, draft in enumerate(proposals):
            if not LessOrEqual(world.rng).accept(ratio(laws[i], draft)):
                return i, Categorical(max_fn(dense(laws[i]) - dense(draft.q)))
        return len(proposals), laws[-1]

    return by_rule(world, rule)


def reused_uniform(world: World) -> Step:
    """`noise` is one uniform for each position: the one that refused the draft also draws its replacement."""

    def rule(proposals: Sequence[Proposal], laws: Laws, start: int) -> Judgement:
        for i, draft in enumerate(proposals):
            accepted = ratio(laws[i], draft)
            decision = Categorical(torch.tensor([accepted, 1.0 - accepted], dtype=torch.float64))
            if world.noise.draw(decision, start + i) == 1:
                rest = Categorical(max_fn(dense(laws[i]) - dense(draft.q)))
                return i, PointMass(world.noise.draw(rest, start + i))
        return len(proposals), laws[-1]

    return by_rule(world, rule)


def shared_noise_under_rejection(world: World) -> Step:
    """Seed coupling with the wrong rule: the noise that made the draft also draws its replacement."""
    draft, adjust = Draft(LLMDrafter(world.drafter, world.processor, world.noise)), Adjust(world.noise)
    verify = Verify(world.target, world.processor, Reject(world.rng))
    return lambda state: flow(state, draft, verify, adjust, commit, advance)


def first_failure_in_the_block(world: World) -> Step:
    def rule(proposals: Sequence[Proposal], laws: Laws, start: int) -> Judgement:
        weight, rest = 1.0, laws[0]
        for i, draft in enumerate(proposals):
            p, q = dense(laws[i]), dense(draft.q)
            left = (weight * p - q).clamp(min=0)
            rest = Categorical(max_fn(left)) if left.any() else laws[i]
            weight = min(1.0, weight * float(p[draft.token] / q[draft.token]))
            if i + 1 == len(proposals):
                passes = weight
            else:
                mass = float((weight * dense(laws[i + 1]) - dense(proposals[i + 1].q)).clamp(min=0).sum())
                passes = mass / (mass + 1.0 - weight) if mass else float(weight == 1.0)
            if not world.rng.accept(passes):
                return i, rest
        return len(proposals), laws[-1]

    return by_rule(world, rule)


def bonus_from_the_wrong_row(world: World) -> Step:
    def rule(proposals: Sequence[Proposal], laws: Laws, start: int) -> Judgement:
        verify = Verify(world.target, world.processor, Reject(world.rng))
        accepted, correction = verify.judge(proposals, laws, start)
        return accepted, laws[-2] if accepted == len(proposals) > 0 else correction

    return by_rule(world, rule)


def skipped_adjustment(world: World) -> Step:
    return accept_loss(lossy_unadjusted_step(samples(world), world.target, world.processor, world.rng))


def typical_acceptance(world: World) -> Step:
    draft, adjust = Draft(samples(world)), Adjust(world.rng)
    verify = LossyTypicalAcceptance(world.target, world.processor, world.rng)

    def end(verified: Verified) -> DecodeState | Finished:
        return flow(verified, adjust, commit, advance)

    return accept_loss(lambda state: flow(state, draft, verify).map(end))


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
            p = world.processor.laws(tokens, world.target(tokens, 1))[0]
            if dense(p)[proposal.token] < dense(proposal.q)[proposal.token]:
                break
            taken.append(proposal)
            tokens = (*tokens, proposal.token)
        return tuple(taken), ()

    return speculative_step(samples(world), world.target, world.processor, world.rng, knowing)


def another_law_than_the_draft_was_drawn_from(world: World) -> Step:
    def flattened(tokens: Tokens) -> Iterator[Proposal]:
        while True:
            (q,) = MultinomialProcessor(3.0).laws(tokens, world.drafter(tokens, 1))
            reported = world.processor.laws(tokens, world.drafter(tokens, 1))[0]
            tokens = (*tokens, world.rng.draw(q, len(tokens)))
            yield Proposal(tokens[-1], reported)

    return speculative_step(flattened, world.target, world.processor, world.rng)


# Committing


def past_stops(world: World) -> Callable[[DecodeState], Drafted]:
    """Drafts that go on behind a stop token, as those of `Draft` do not."""
    return lambda state: Drafted(state, tuple(islice(samples(world)(state.tokens), min(5, state.room - 1))))


def stop_looked_for_at_the_end_only(world: World) -> Step:
    draft, verify = past_stops(world), Verify(world.target, world.processor, Reject(world.rng))
    adjust = Adjust(world.rng)

    def late(adjusted: Adjusted) -> Committed:
        state = adjusted.verified.drafted.state
        after = evolve(state, tokens=state.tokens + adjusted.tokens)
        stopped = after.tokens[-1] in state.request.stop
        return Committed(adjusted, after, Reason.STOP if stopped else Reason.LIMIT if after.room <= 0 else None)

    return lambda state: flow(state, draft, verify, adjust, late, advance)


def stop_found_by_id(world: World) -> Step:
    """Several stop tokens in one step: cuts at the first *id* that occurs, not at the earliest position."""
    draft, verify = past_stops(world), Verify(world.target, world.processor, Reject(world.rng))
    adjust = Adjust(world.rng)

    def misled(adjusted: Adjusted) -> Committed:
        state = adjusted.verified.drafted.state
        for stop in sorted(state.request.stop):
            if stop in adjusted.tokens:
                end = adjusted.tokens.index(stop) + 1
                return Committed(adjusted, evolve(state, tokens=state.tokens + adjusted.tokens[:end]), Reason.STOP)
        return commit(adjusted)

    return lambda state: flow(state, draft, verify, adjust, misled, advance)


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


def learning_what_was_refused(world: World, storage: NGramStorage) -> Step:
    draft, verify = Draft(samples(world)), Verify(world.target, world.processor, Reject(world.rng))
    adjust, update = Adjust(world.rng), UpdateNgram(storage, 2)

    def too_eager(verified: Verified) -> None:
        text, accepted = verified.drafted.state.tokens + verified.drafted.tokens, verified.accepted
        refused = verified.drafted.tokens[accepted:]
        storage.learn(text, len(text) - len(refused), [[draft] for draft in refused])

    return lambda state: flow(state, draft, verify, tap(too_eager), adjust, commit, update, advance)


def contents_of(compose: Callable[[World, NGramStorage], Step], filler_top_k: int = 2) -> Callable[[Case], object]:
    """Text and contents of the storage together must have the law that they have without drafts."""

    def alone(world: World, storage: NGramStorage) -> Step:
        return learning(world, storage, propose_nothing, filler_top_k)

    return lambda case: same_law(contents(compose), contents(alone), [case])


GREEDY: Final = (Case(3, (0, 1), 4, processor=lambda rng: GreedyProcessor(), seed=13),)
SAMPLED: Final = (
    Case(2, (0,), 4, seed=15),
    Case(3, (2,), 3, seed=1),
    Case(3, (1, 1), 3, frozenset({0, 2}), seed=3),
    Case(3, (0,), 3, processor=lambda rng: TopKProcessor(1.0, 2), seed=6),
)


@final
@frozen
class Mutant:
    """A decoder with a mistake, what finds it, and the cases that it is tried on."""

    mistake: str
    check: Callable[[Case], object]
    cases: tuple[Case, ...] = SAMPLED

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
    Mutant("n-gram drafting that redraws from p after a miss", text_of(redraw_after_a_miss)),
    Mutant("a wrong residual: p without the draft, though it was sampled", text_of(residual_of_a_point_mass)),
    Mutant("`u <= p/q` at p = 0, `u` one of the 2²⁴ numbers of `torch.rand`", text_of(less_or_equal)),
    Mutant("one uniform refuses the draft and draws its replacement", text_of(reused_uniform)),
    Mutant("noise shared by drafter and target, under the rejection rule", text_of(shared_noise_under_rejection)),
    Mutant("block verification that stops at the first failure", text_of(first_failure_in_the_block)),
    Mutant("an n-gram storage that learns from refused drafts", contents_of(learning_what_was_refused)),
    Mutant("the bonus token drawn from the row before", text_of(bonus_from_the_wrong_row)),
    Mutant("a policy that drops the unlikely token it saw", text_of(policy_drops_the_token_it_saw)),
    Mutant("a policy that peeks at the target", text_of(policy_peeks_at_the_target)),
    Mutant(
        "drafts drawn at another temperature than their q",
        text_of(another_law_than_the_draft_was_drawn_from),
        SAMPLED[:3],  # of a draft outside the top k it would be seen that it was not drawn from q
    ),
    Mutant("skipped adjustment: `LossySkipAdjustment`", text_of(skipped_adjustment)),
    Mutant("typical acceptance: `LossyTypicalAcceptance`", text_of(typical_acceptance)),
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
