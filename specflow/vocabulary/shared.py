"""Two vocabularies that share some tokens: the map between them, and how one reads what the other wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import torch
from attrs import define, field, frozen
from torch import Tensor

from specflow.errors import DecodeError
from specflow.guards.checks import a, described, is_floats, valid
from specflow.guards.ids import Tokens
from specflow.prefix import tokens_of
from specflow.vocabulary.memo import Readings
from specflow.vocabulary.spelling import Spelling, whole_characters

FAR: Final = 1e4
"""How far below the largest logit a token lies that is as good as impossible: e^-10⁴ is 0 in floats."""

_is_spelling = valid(a(Spelling, "give Spelling.of(tokenizer)"))


@final
@frozen(eq=False)
class SharedTokens:
    """The tokens that a target's vocabulary and a drafter's have in common: those that spell the same bytes.

    `pairs` maps them, target's id → drafter's id, one to one; of several tokens that spell the same the tokenizer's own
    choice is taken. A special token pairs with a special one of the same name. It is made once and changes neither
    tokenizer. `DecodeError` where nothing is shared.

    >>> def letters(*tokens: bytes) -> Spelling:
    ...     return Spelling(tokens, lambda text: [tokens.index(c.encode()) for c in text])
    >>> shared = SharedTokens(letters(b"a", b"b", b"c"), letters(b"c", b"x", b"a"))
    >>> dict(shared.pairs)
    {0: 2, 2: 0}
    """

    target: Spelling = field(validator=_is_spelling)
    drafter: Spelling = field(validator=_is_spelling)
    pairs: Mapping[int, int] = field(init=False, repr=False)
    _places: dict[torch.device, tuple[Tensor, Tensor]] = field(init=False, repr=False, factory=dict)
    _spelled: dict[int, Tokens] = field(init=False, repr=False, factory=dict)
    _readings: Readings[Tokens] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        theirs = _by_text(self.drafter)
        pairs = {token: theirs[text] for text, token in _by_text(self.target).items() if text in theirs}
        if not pairs:
            received = f"{len(self.target.tokens)} tokens and {len(self.drafter.tokens)}"
            happened, remedy = "target and drafter have no token in common", "use a drafter of the same language"
            raise DecodeError("drafter", happened, received, remedy)
        object.__setattr__(self, "pairs", dict(sorted(pairs.items())))
        object.__setattr__(self, "_readings", Readings(lambda: _Read(self)))

    def read(self, tokens: Tokens) -> Tokens:
        """What the drafter reads where the target wrote `tokens`. A pure function of them.

        Behind the drafter's own `begin`, each token is its pair, and one without a pair is spelled by the drafter's
        tokenizer; a character that such tokens have not finished is not read, and neither is the target's `begin`. So
        what is read after one more token that is shared has one more token.

        What was read is remembered, and a text that grew is not read again.
        """
        return self._readings.of(tokens_of(tokens))

    def rows(self, logits: Tensor) -> Tensor:
        """Of a drafter's logits [..., W] those over the target's vocabulary, [..., V].

        A token of the target's alone lies `FAR` below the best: its softmax is that of the shared tokens, renormalised.
        Where the drafter gives no shared token a chance, all of them are alike. `DecodeError` for rows of too few
        tokens.

        >>> def letters(*tokens: bytes) -> Spelling:
        ...     return Spelling(tokens, lambda text: [tokens.index(c.encode()) for c in text])
        >>> shared = SharedTokens(letters(b"a", b"b", b"c"), letters(b"c", b"x", b"a"))
        >>> shared.rows(torch.tensor([0.7, 0.1, 0.2]).log()).softmax(-1)
        tensor([0.2222, 0.0000, 0.7778])
        """
        most = len(self.drafter.tokens)
        if not is_floats(logits) or not logits.ndim or logits.shape[-1] < most:
            remedy = "give Spelling.of(tokenizer, vocab_size) the model's vocabulary"
            happened = f"the drafter's rows are not logits of the {most} tokens that it spells"
            raise DecodeError("drafter", happened, described(logits), remedy)
        mine, theirs = self._ids_on(logits.device)
        said = logits[..., theirs]
        said = torch.where((said.amax(-1, keepdim=True) == -torch.inf), torch.zeros_like(said), said)
        floor = said.amax(-1, keepdim=True) - FAR
        rows = floor.repeat(*[1] * (logits.ndim - 1), len(self.target.tokens))
        rows[..., mine] = torch.maximum(said, floor)
        return rows

    def _ids_for(self, token: int) -> Tokens | None:
        """How the drafter reads one token of the target's; None for a part of a character that it has no token for."""
        if token not in self._spelled:
            ids = self._made(token)
            if ids is None:
                return None
            self._spelled[token] = ids
        return self._spelled[token]

    def _made(self, token: int) -> Tokens | None:
        if token in self.pairs:
            return (self.pairs[token],)
        text = self.target.bytes_of((token,))
        try:
            characters = text.decode()
        except UnicodeDecodeError:
            return None
        return (self.drafter.after(b"", text) or self.drafter.spell(characters)) if text else ()

    def _ids_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._places:
            ids = torch.tensor([*self.pairs.items()], device=device)
            self._places[device] = ids[:, 0], ids[:, 1]
        return self._places[device]


@final
@define(eq=False)
class _Read:
    """A reading of `SharedTokens`: the drafter's `ids`, how many there are behind each token, and bytes left over."""

    shared: SharedTokens
    tokens: list[int] = field(factory=list)
    ids: list[int] = field(factory=list)
    ends: list[int] = field(factory=list)
    left: list[bytes] = field(factory=list)

    def go_back(self, length: int, /) -> None:
        del self.tokens[length:], self.ends[length:], self.left[length:]
        del self.ids[self.ends[-1] if self.ends else 0 :]

    def go_on(self, new: Tokens, /) -> Tokens:
        for token in new:
            left = b""
            if not self.tokens and token in self.shared.target.begin[:1]:
                ids: Tokens | None = ()
            else:
                ids = self.shared._ids_for(token)
            if ids is None:
                text = (self.left[-1] if self.left else b"") + self.shared.target.bytes_of((token,))
                end = whole_characters(text)
                left = text[end:]
                ids = self.shared.drafter.spell(text[:end].decode(errors="ignore"))
            self.tokens.append(token)
            self.ids += ids
            self.ends.append(len(self.ids))
            self.left.append(left)
        return (*self.shared.drafter.begin, *self.ids)


def _by_text(spelling: Spelling) -> dict[tuple[bytes, bool], int]:
    """A token for each text; where several spell it, the one that the tokenizer uses."""
    known: dict[tuple[bytes, bool], int] = {}
    for token, text in enumerate(spelling.tokens):
        key = text, token in spelling.special
        if text and known.setdefault(key, token) != token:
            usual = spelling.after(b"", text)
            if usual == (token,):
                known[key] = token
    return known
