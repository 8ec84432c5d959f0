"""A target in another process: a predictor that sends ids over a pipe and gets logits back.

The text and the drafts are all that a predictor is asked with, so a target may be anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from threading import Thread
from typing import final

import torch
from attrs import frozen
from torch import Tensor

from specflow import LLMDrafter, Predictor, Proposal, Step, Tokens, speculative_step
from specflow.testing import CASES, World, certify


@final
@frozen(eq=False)
class Remote:
    """A predictor at the other end of a connection."""

    connection: Connection

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        self.connection.send((tokens, [(draft.token, draft.parent) for draft in drafts]))
        return torch.from_numpy(self.connection.recv())


def serve(predictor: Predictor, connection: Connection) -> None:
    """Answers until the other end hangs up."""
    try:
        while True:
            tokens, drafts = connection.recv()
            rows = predictor(tokens, [Proposal(token, parent=parent) for token, parent in drafts])
            connection.send(rows.numpy())
    except EOFError:
        return


def check() -> None:
    """Exact, sampled and greedy. A thread stands for the other process here."""

    def decoder(world: World) -> Step:
        here, there = Pipe()
        Thread(target=serve, args=(world.target, there), daemon=True).start()
        drafter = LLMDrafter(world.drafter, world.processor, world.rng)
        return speculative_step(drafter, Remote(here), world.processor, world.rng)

    certify(decoder, cases=CASES[:2])
