"""Any callable is a predictor: a bigram model in numpy as the target, and a table as its drafter.

python examples/numpy_backend.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from specflow import Dice, Fixed, MultinomialProcessor, PointMass, Proposal, Tokens, run, speculative_step, start

TEXT = "the cat sat on the mat and the dog sat on the log and the cat sat on the dog "
ALPHABET = sorted(set(TEXT))
IDS = [ALPHABET.index(character) for character in TEXT]

COUNTS = np.full((len(ALPHABET), len(ALPHABET)), 0.01)
np.add.at(COUNTS, (IDS[:-1], IDS[1:]), 1.0)


def bigram(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
    """Logits [n + 1, V] behind the text and behind each of n drafts: log counts of what follows a token."""
    return torch.from_numpy(np.log(COUNTS[[tokens[-1], *[draft.token for draft in drafts]]]))


def repeat(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """Drafts what followed the last two characters in the text."""
    seen = "".join(ALPHABET[token] for token in tokens)
    at = TEXT.find(seen[-2:]) + 2
    for token in IDS[at : at + 8] if at > 1 else []:
        yield Proposal(token, source="text")


def main() -> None:
    """Prints a sampled text, which has exactly the bigram model's law, and how much of it was drafted."""
    torch.manual_seed(1)
    step = speculative_step(repeat, bigram, MultinomialProcessor(0.5), Dice(), Fixed(6))
    state = run(step, start(IDS[:4], max_new_tokens=60).unwrap()).state
    print("".join(ALPHABET[token] for token in state.tokens))
    print(f"{state.tally.accepted} of {len(state.output)} characters were drafted")


if __name__ == "__main__":
    main()
