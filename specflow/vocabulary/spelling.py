"""How a tokenizer spells: the bytes that each token stands for, and the tokens that a text is cut into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Final, Protocol, final

from attrs import field, frozen

from specflow.errors import DecodeError, said
from specflow.guards.checks import a, calls, does, or_none, own, shown, valid, whole
from specflow.guards.ids import Tokens, ids_of

SAMPLE: Final = 32
"""How many words show whether a tokenizer's tokens spell what it reads."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """The tokens that stand for no text, such as the end of one."""
        ...

    def __len__(self) -> int:
        """How many tokens there are."""
        ...

    def convert_ids_to_tokens(self, ids: int, /) -> str | None:
        """The name of a token, None where there is none."""
        ...

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Sequence[int]:
        """The tokens of a text, with or without those that begin and end it."""
        ...


def _bytes_each(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not value or not all(type(each) is bytes for each in value):
        raise DecodeError(name, f"{name} are not the bytes of each token", shown(value), 'give a tuple: (b"a", b"b")')


def _ids(ids: object) -> Tokens:
    return ids_of("begin", ids)


def _specials(ids: object) -> frozenset[int]:
    return frozenset(ids_of("special", list(ids) if isinstance(ids, frozenset | set) else ids))


@final
@frozen(eq=False)
class Spelling:
    """What a tokenizer's tokens stand for, and how it cuts a text into them.

    `tokens[i]` are the bytes of token i; b"" for one without a text. Give one for each token that the model has logits
    for. `encode` cuts a text into tokens and adds none. `begin` are tokens that stand before every text, `special`
    those that are no text: their bytes are their names.

    `DecodeError` for anything else, and when `encode` raises or answers what are not ids.

    >>> letters = Spelling((b"a", b"b", b"ab"), lambda text: [2] * text.count("ab") + [0] * text.count("aa"))
    >>> letters.spell("abab"), letters.bytes_of((2, 0))
    ((2, 2), b'aba')
    """

    tokens: tuple[bytes, ...] = field(validator=valid(_bytes_each), repr=False)
    encode: Callable[[str], Sequence[int]] = field(
        validator=valid(calls("what cuts a text into tokens", "give a function from a text to ids")), repr=False
    )
    begin: Tokens = field(default=(), converter=_ids)
    special: frozenset[int] = field(default=frozenset(), converter=_specials)

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int | None = None) -> Spelling:
        """How a tokenizer of transformers spells, for a model that has logits for `vocab_size` tokens.

        Byte-level tokens (Ġ for a space), metaspaces (▁) with bytes such as <0x0A>, and tokens that are their own text
        are known. `DecodeError` for tokenizers whose tokens do not spell what they read, as WordPiece's.
        """
        remedy = "give a tokenizer of transformers, or Spelling(tokens, encode)"
        does("a tokenizer", remedy, "__len__", "convert_ids_to_tokens", "encode")("tokenizer", tokenizer)
        or_none(whole(1, "give the number of tokens that the model knows", 2**24))("vocab_size", vocab_size)
        vocab_size = own(vocab_size)
        try:
            size = len(tokenizer)
            names: list[object] = [tokenizer.convert_ids_to_tokens(i) for i in range(min(size, vocab_size or size))]
            special = [i for i in tokenizer.all_special_ids if 0 <= i < len(names)]
            bare, dressed = (ids_of("ids", tokenizer.encode("a", add_special_tokens=add)) for add in (False, True))
        except Exception as error:  # somebody else's: it may raise anything
            happened = f"the tokenizer cannot be asked for its tokens ({said(error)})"
            raise DecodeError("tokenizer", happened, f"a {type(tokenizer).__name__}", remedy) from error
        tokens = _bytes_of_names(names, frozenset(special))
        padding = (b"",) * ((vocab_size or size) - len(tokens))
        start = next((i for i in range(len(dressed)) if bare and dressed[i : i + len(bare)] == bare), 0)
        made = cls((*tokens, *padding), lambda text: tokenizer.encode(text, add_special_tokens=False),
                   [i for i in dressed[:start] if i < len(names)], frozenset(special))  # fmt: skip
        if not made.spells():
            happened = "the tokens of this tokenizer do not spell what it reads"
            raise DecodeError("tokenizer", happened, f"a {type(tokenizer).__name__}", remedy)
        return made

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        """The bytes of some tokens, one after the other; those outside the vocabulary have none."""
        size = len(self.tokens)
        return b"".join([self.tokens[token] for token in ids_of("tokens", tokens) if 0 <= token < size])

    def spell(self, text: str) -> Tokens:
        """The tokens of a text, but for those that the model does not have."""
        a(str, "give a text")("text", text)
        try:
            ids = ids_of("encode", self.encode(text))
        except Exception as error:
            happened = f"the tokenizer does not give the ids of a text ({said(error)})"
            raise DecodeError("encode", happened, shown(text), "give a function from a text to ids") from error
        return tuple([token for token in ids if 0 <= token < len(self.tokens)])

    def after(self, before: bytes, new: bytes) -> Tokens | None:
        """The tokens that spell `new` where it stands behind `before`; None where no tokens do.

        A tokenizer cuts `before + new` as a whole, and perhaps not where `new` begins: it joins "he" and "llo". Then
        `new` is cut alone, or behind a line break, which nothing is joined with. That the tokens spell `new`, byte for
        byte, is looked at: a tokenizer may add a space in front, or write in small letters.

        >>> pairs = Spelling((b"a", b"b", b"ab"), lambda text: [("a", "b").index(c) for c in text if c in "ab"])
        >>> pairs.after(b"ab", b"ba"), pairs.after(b"", b"c")
        ((1, 0), None)
        """
        for name, value in (("before", before), ("new", new)):
            a(bytes, "give the bytes of a text")(name, value)
        for context in dict.fromkeys((before, b"", b"\n")):
            try:
                text = (context + new).decode()
            except UnicodeDecodeError:  # a character is not whole
                continue
            ids = self.spell(text)
            start, left = len(ids), len(new)
            while start > 0 and left > 0:
                start -= 1
                left -= len(self.tokens[ids[start]])
            if left == 0 and self.bytes_of(ids[start:]) == new:
                return ids[start:]
        return None

    def spells(self) -> bool:
        """Whether words that are tokens, written twice, are cut into tokens that spell them, most of them."""
        words = [word for word in map(_word, self.tokens) if word]
        sample = words[:: max(1, len(words) // SAMPLE)]
        good = [self.bytes_of(self.spell(word + word)).strip() == (word + word).strip().encode() for word in sample]
        return 2 * sum(good) >= len(good)


def alike(target: Tokenizer, drafter: Tokenizer) -> bool:
    """Whether two tokenizers give the ids that both have to the same tokens: all that is between them is padding."""
    for name, tokenizer in (("target", target), ("drafter", drafter)):
        does("a tokenizer", "give a tokenizer of transformers", "__len__", "convert_ids_to_tokens")(name, tokenizer)
    shared = range(min(len(target), len(drafter)))
    return all(target.convert_ids_to_tokens(i) == drafter.convert_ids_to_tokens(i) for i in shared)


def whole_characters(text: bytes) -> int:
    """How many of the first bytes are left when a character at the end that is not whole is left out.

    >>> whole_characters("né".encode()), whole_characters("né".encode()[:-1])
    (3, 1)
    """
    for back in range(1, min(4, len(text) + 1)):
        byte = text[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(text) - back if needed > back else len(text)
    return len(text)


def _word(token: bytes) -> str:
    text = token.decode(errors="ignore")
    return text if text.isascii() and text.strip().isalpha() else ""


def _printable() -> dict[str, int]:
    """The characters by which byte-level tokens are named, and their bytes. Source: GPT-2's `bytes_to_unicode`."""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]
    named_so = chain(zip(themselves, themselves, strict=True), zip(range(256, 512), others, strict=False))
    return {chr(code): byte for code, byte in named_so}


_BYTES: Final = _printable()
_SPACE, _METASPACE = "Ġ", "▁"


def _bytes_of_names(names: Sequence[object], special: frozenset[int]) -> list[bytes]:
    texts = [name if isinstance(name, str) else "" for name in names]
    ordinary = [text for i, text in enumerate(texts) if i not in special]
    # Either mark may be a letter of the other kind's, too: Maltese has a Ġ.
    spaces, metaspaces = (sum(text.startswith(mark) for text in ordinary) for mark in (_SPACE, _METASPACE))
    spell: Callable[[str], bytes] = _plain
    if spaces > metaspaces:
        spell = _byte_level
    elif metaspaces:
        spell = _metaspaced
    return [(_plain if i in special else spell)(text) for i, text in enumerate(texts)]


def _plain(name: str) -> bytes:
    return name.encode(errors="replace")


def _byte_level(name: str) -> bytes:
    """The bytes of a byte-level token; one that was added by its text has other characters, too."""
    known = [_BYTES.get(character) for character in name]
    return _plain(name) if None in known else bytes([byte for byte in known if byte is not None])


def _metaspaced(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            pass
    return _plain(name.replace(_METASPACE, " "))
