"""N-grams in a database: a storage that several processes share and that outlives all of them."""

from __future__ import annotations

from sqlite3 import Connection, connect
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from specflow import NGramDrafter, Step, ngram_step
from specflow.drafters import INgramStorage
from specflow.stages import UpdateNgram
from specflow.testing import CASES, World, certify


def context(tokens: Tensor) -> str:
    """The last tokens as a key."""
    return ",".join(map(str, tokens.tolist()))


@final
class SqliteStorage(INgramStorage):
    """What followed the last n - 1 tokens most often."""

    def __init__(self, n: int, vocab_size: int, database: Connection) -> None:
        super().__init__(n, vocab_size)
        self.database = database
        database.execute("create table if not exists grams (context, token, count, primary key (context, token))")

    @override
    def next_token(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        query = "select token from grams where context = ? order by count desc, token limit 1"
        found = [self.database.execute(query, (context(row[1 - self.n :]),)).fetchone() for row in input_ids]
        return torch.tensor([[row[0] if row else 0] for row in found]), torch.tensor([[bool(row)] for row in found])

    @override
    def has_gram(self, ngram: Tensor) -> bool:
        row, query = ngram.reshape(-1), "select 1 from grams where context = ? and token = ?"
        return self.database.execute(query, (context(row[-self.n : -1]), int(row[-1]))).fetchone() is not None

    @override
    def update(self, input_ids: Tensor, next_tokens: Tensor) -> None:
        add = "insert into grams values (?, ?, 1) on conflict do update set count = count + 1"
        for row, followers in zip(input_ids, next_tokens, strict=True):
            self.database.executemany(add, [(context(row[1 - self.n :]), token) for token in followers.tolist()])

    @override
    def initialize(self, input_ids: Tensor) -> None:
        for end in range(self.n - 1, input_ids.shape[-1]):
            self.update(input_ids[:, :end], input_ids[:, end : end + 1])

    @override
    def reset(self) -> None:
        self.database.execute("delete from grams")


def check() -> None:
    """Exact, sampled and greedy."""

    def decoder(world: World) -> Step:
        storage = SqliteStorage(2, world.target((0,), ()).shape[-1], connect(":memory:"))
        update = UpdateNgram(storage, filler_top_k=1)
        return ngram_step(NGramDrafter(storage), world.target, world.processor, world.rng, update)

    certify(decoder, cases=CASES[:4])
