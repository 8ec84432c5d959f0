"""Predictors made of functions of one text, which read a tree of drafts path by path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from specflow.asked import looked_at, rows_of
from specflow.errors import DecodeError
from specflow.guards.checks import calls, described, is_floats, named
from specflow.guards.ids import reading_of
from specflow.state import TEXT, Predictor, Proposal, Tokens, chain, parents_of
from specflow.trees import is_chain, leaves, path_to

Rows: TypeAlias = Callable[[Tokens, int], Tensor]
"""(tokens, last) → logits [last, V] of what follows each of the last `last` prefixes. A pure function of tokens."""


def path_by_path(rows: Rows) -> Predictor:
    """A predictor made of what gives the last rows of one text: each path down to a leaf, one after the other.

    It serves the models that cannot read a tree in one pass.

    >>> sums = lambda tokens, last: torch.tensor(tokens).cumsum(0)[-last:, None].float()
    >>> path_by_path(sums)((1, 1), (Proposal(5), Proposal(6, parent=TEXT), Proposal(7, parent=0)))[:, 0].tolist()
    [2.0, 7.0, 8.0, 14.0]
    """
    calls("a function of texts", "give one of (tokens, last)")("rows", rows)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        parents = parents_of(drafts)
        known: dict[int, Tensor] = {}
        for leaf in leaves(parents) or (TEXT,):
            path = path_to(parents, leaf)
            text = tokens + tuple([drafts[i].token for i in path])
            logits = looked_at(rows(text, len(path) + 1), len(path) + 1, rows, len(text), "predictor")
            if is_chain(parents):
                return logits
            known |= zip((TEXT, *path), logits, strict=True)
        return torch.stack([known[i] for i in range(TEXT, len(drafts))])

    return predict


def along_paths(model: Callable[[Tokens], Tensor]) -> Predictor:
    """A predictor made of any function of one text that gives a row of logits [V]: the meaning of all faster ones.

    >>> along_paths(lambda tokens: torch.tensor([float(sum(tokens))]))((1, 1), (Proposal(5), Proposal(6))).tolist()
    [[2.0], [7.0], [13.0]]
    """
    calls("a function of a text", "give one that returns logits [V]")("model", model)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        texts = [tokens]
        for parent, draft in zip(parents_of(drafts), drafts, strict=True):
            texts.append((*texts[parent - TEXT], draft.token))
        return torch.stack([_row(model, text) for text in texts])

    return predict


def _row(model: Callable[[Tokens], Tensor], text: Tokens) -> Tensor:
    row: object = model(text)
    if not is_floats(row) or row.ndim != 1 or not row.numel():
        happened, where = f"the function {named(model)} gives no row of logits", f"position {len(text) - 1}"
        raise DecodeError("model", happened, f"{described(row)} after {where}", "return floats of shape [V]")
    return row.detach() if row.requires_grad else row


def last_rows(predictor: Predictor, tokens: Tokens, last: int, name: str = "predictor") -> Tensor:
    """Logits [last, V] of what follows each of the last `last` prefixes of a text, in one reading.

    `name` is what errors call the predictor. `DecodeError` unless 1 ≤ last ≤ the length of the text.

    >>> sums = along_paths(lambda tokens: torch.tensor([float(sum(tokens))]))
    >>> last_rows(sums, (1, 1, 5), 2).tolist()
    [[2.0], [7.0]]
    """
    calls("a predictor", "give a function of (text, drafts)")(name, predictor)
    tokens, last = reading_of(tokens, last)
    end = len(tokens) - last + 1
    return rows_of(predictor, tokens[:end], chain(tokens[end:]), name)
