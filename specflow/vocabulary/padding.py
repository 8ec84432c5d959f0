"""One vocabulary for drafter and target, though models of one tokenizer pad it differently."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch.nn.functional as F
from returns.result import Failure, Result, Success
from torch import Tensor

from specflow.asked import rows_of
from specflow.errors import DecodeError
from specflow.guards.checks import calls, described, is_floats, whole
from specflow.protocols import Limits, checked_limits
from specflow.state import Predictor, Proposal, Tokens

_is_size = whole(1, "give the target's vocabulary", most=2**24)


def shared_vocabulary(target: Limits, drafter: Limits) -> Result[int | None, DecodeError]:
    """The vocabulary that drafts are expressed in: the target's. Refused if the two cannot be one vocabulary.

    Models of one tokenizer pad it differently (151936 and 152064), so the sizes may differ by 512 tokens and by a
    quarter. Exactness does not depend on this check: a drafter that means other tokens is rejected at each of them.

    >>> shared_vocabulary(Limits(151936), Limits(152064)).unwrap()
    151936
    >>> print(shared_vocabulary(Limits(49152), Limits(32000)).failure())
    drafter and target have different vocabularies: received 32000 and 49152; use a drafter with the target's tokenizer.
    """
    try:
        target, drafter = checked_limits(target, "target"), checked_limits(drafter, "drafter")
    except DecodeError as error:
        return Failure(error)
    if target.vocab_size is None or drafter.vocab_size is None:
        return Success(target.vocab_size)
    small, large = sorted((target.vocab_size, drafter.vocab_size))
    if large - small > min(512, small // 4):
        received = f"{drafter.vocab_size} and {target.vocab_size}"
        remedy = "use a drafter with the target's tokenizer"
        return Failure(DecodeError("drafter", "drafter and target have different vocabularies", received, remedy))
    return Success(target.vocab_size)


def fitted(predictor: Predictor, vocab_size: int) -> Predictor:
    """The predictor over a vocabulary of `vocab_size`: padding is cut off, and what is missing gets the logit -∞.

    Models of one tokenizer pad their vocabularies differently. Both laws stay laws over the target's vocabulary, so
    verification stays exact.

    >>> import torch
    >>> fitted(lambda tokens, drafts: torch.zeros(len(drafts) + 1, 3), 4)((1, 2), ())
    tensor([[0., 0., 0., -inf]])
    """

    calls("a predictor", "give a function of (text, drafts)")("predictor", predictor)
    _is_size("vocab_size", vocab_size)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        return fit(rows_of(predictor, tokens, drafts, "predictor"), vocab_size)

    return predict


def fit(logits: Tensor, vocab_size: int) -> Tensor:
    """`logits` [..., V] over a vocabulary of `vocab_size`; `DecodeError` for anything else."""
    if not is_floats(logits) or logits.ndim == 0:
        raise DecodeError("logits", "logits are not floats", described(logits), "give logits [..., V]")
    _is_size("vocab_size", vocab_size)
    missing = max(0, int(vocab_size) - logits.shape[-1])
    return F.pad(logits[..., :vocab_size], (0, missing), value=-inf)
