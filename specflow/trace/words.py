"""Words: the bytes of tokens, and the characters that they make, of which one may take several tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, cast, final

from attrs import frozen

from specflow.errors import DecodeError, said
from specflow.guards.checks import shown
from specflow.stages.observe import Tokenizer
from specflow.vocabulary import Spelling
from specflow.vocabulary.spelling import Tokenizer as Spelled


def words_of(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[int, bytes]:
    """The bytes that each of the tokens stands for, b"" for one outside the vocabulary.

    Where a tokenizer's tokens do not spell what it reads, they are what it decodes them to, one by one. What it does
    not know, as drafts may be, has no word; `DecodeError` where nothing has one.
    """
    try:
        spelling = Spelling.of(cast(Spelled, tokenizer))
    except DecodeError:
        return _one_by_one(tokenizer, sorted(ids))
    return {i: spelling.bytes_of((i,)) for i in sorted(ids)}


def _one_by_one(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[int, bytes]:
    words: dict[int, bytes] = {}
    refused: DecodeError | None = None
    for i in ids:
        try:
            words[i] = _decoded(tokenizer, i)
        except DecodeError as error:
            refused = error
    if refused is not None and not words:
        raise refused
    return words


def _decoded(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    except Exception as error:  # somebody else's: it may raise anything
        happened = f"the tokenizer does not decode token {token} ({said(error)})"
        raise DecodeError("tokenizer", happened, f"a {type(tokenizer).__name__}", "give the target's") from error
    if not isinstance(alone, str):
        happened = f"the tokenizer does not decode token {token} to a text"
        raise DecodeError("tokenizer", happened, shown(alone), "give the target's")
    return (f" {alone}" if twice == f"{alone} {alone}" else alone).encode(errors="replace")


@final
@frozen
class Piece:
    """What a token adds to a text: the characters that are complete with it. `part` says that it splits one."""

    text: str
    part: bool


def pieces(tokens: Sequence[int], words: Mapping[int, bytes]) -> list[Piece]:
    """What each token adds; bytes that are no UTF-8 become U+FFFD. A token without a word is its number.

    >>> pieces((1, 2, 3), {1: b"a", 2: bytes([0xC3]), 3: bytes([0xA9])})
    [Piece(text='a', part=False), Piece(text='', part=True), Piece(text='é', part=True)]
    >>> [piece.text for piece in pieces((1, 2), {1: b"a"})]
    ['a', ' 2']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = []
    for token in tokens:
        began = bool(decoder.getstate()[0])
        text = decoder.decode(words.get(token, f" {token}".encode()))
        found.append(Piece(text, began or bool(decoder.getstate()[0])))
    if rest := decoder.decode(b"", final=True):
        found[-1] = Piece(found[-1].text + rest, True)
    return found


def label(token: int, words: Mapping[int, bytes]) -> str:
    r"""A token alone, as a reader may see it; bytes that are no character are escaped.

    >>> label(1, {1: bytes([0xC3])}), label(7, {})
    ('\\xc3', '7')
    """
    return words.get(token, str(token).encode()).decode(errors="backslashreplace")


def visible(text: str) -> str:
    """The text, in which control characters and marks that turn the direction of what follows are seen, not obeyed.

    Line breaks, tabs and the marks that scripts need stay.

    >>> visible(chr(27) + "[31m" + chr(0x202E) + "a")
    '␛[31m⟨U+202E⟩a'
    """
    return text.translate(_SHOWN)


_TURNS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029, 0xFEFF, 0xFFFE, 0xFFFF)
_SHOWN: Final[dict[int, str | int | None]] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **{code: f"⟨U+{code:04X}⟩" for code in (*range(0x80, 0xA0), *_TURNS)},
}
