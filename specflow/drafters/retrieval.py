"""Retrieval: drafts from texts on disk, found by a suffix array over their token ids."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Final, NamedTuple, Self, TypeAlias, final

import numpy
import torch
from attrs import field, frozen
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from specflow.distribution import PointMass
from specflow.drafters.followers import trust
from specflow.drafters.likeliest import Candidate, likeliest_first
from specflow.errors import DecodeError, said
from specflow.files import checked_path, checksum, no_file, write
from specflow.guards.checks import a, shown, valid, whole
from specflow.guards.ids import ids_of
from specflow.prefix import tokens_of
from specflow.state import Proposal, Tokens

END: Final = -1
"""What stands after each text of a corpus, in place of a token."""

DEPTH: Final = 32
"""By how many tokens suffixes are in order; matches are no longer than that."""

PLACES: Final = 1024
"""How many places of a match are looked at, spread evenly over all of them."""

FOLLOWERS: Final = 8
"""How many followers of a match are told apart, the most frequent."""

FORMAT: Final = "specflow corpus 1"
REMEDY: Final = "restore it from a copy, or make it again"

Places: TypeAlias = NDArray[numpy.signedinteger]
"""Positions in the texts of a corpus."""

_is_vocabulary: Final = whole(1, "give the target's vocab_size", most=2**31)


class Found(NamedTuple):
    """The longest ending of a text that occurs in a corpus: its length, and where the corpus goes on after it."""

    length: int
    places: Places


@final
@frozen(eq=False)
class Corpus:
    """Texts as token ids, and their suffixes in order, so that a text's ending is found by binary search.

    `tokens` [N] are all texts, each with -1 after it; `suffixes` [M] are the positions of their M tokens, in the order
    of the `DEPTH` tokens that follow from there. `Corpus.of(texts, vocab_size)` makes both in memory, `save` writes
    them, 8 bytes a token, and `load` maps the file into memory: it may be larger than that, and processes share it.

    Nothing in it changes, so threads may share it. `DecodeError` for arrays that do not belong together.
    Source: He et al. 2311.08252 (REST); Manber and Myers 1990 (suffix arrays by prefix doubling).

    >>> corpus = Corpus.of([(1, 2, 3, 1, 2, 4), (1, 2, 4)], vocab_size=10)
    >>> corpus.find((9, 1, 2)).length, [(token, round(chance, 3)) for token, chance in corpus.after((9, 1, 2))]
    (2, [(4, 0.292), (3, 0.146)])
    """

    vocab_size: int = field(validator=valid(_is_vocabulary))
    tokens: NDArray[numpy.signedinteger] = field(repr=False)
    suffixes: Places = field(repr=False)

    def __attrs_post_init__(self) -> None:
        for name in ("tokens", "suffixes"):
            array: object = getattr(self, name)
            if not (isinstance(array, numpy.ndarray) and array.ndim == 1 and array.dtype.kind == "i" and len(array)):
                raise DecodeError(name, f"{name} are no whole numbers in a row", shown(array), "use Corpus.of(texts)")
        inside = self.tokens.min() >= END and self.tokens.max() < self.vocab_size and self.tokens[-1] == END
        within = self.suffixes.min() >= 0 and self.suffixes.max() < len(self.tokens)
        if not (inside and within):
            happened = "tokens are outside the vocabulary, or suffixes outside the texts"
            raise DecodeError("corpus", happened, f"{len(self.tokens)} tokens", "use Corpus.of(texts, vocab_size)")

    @classmethod
    def of(cls, texts: Iterable[Sequence[int]], vocab_size: int) -> Self:
        """The corpus of some texts of ids. `DecodeError` for what holds none, and for ids outside the vocabulary."""
        _is_vocabulary("vocab_size", vocab_size)
        given: object = texts
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | bytearray | Tensor):
            raise DecodeError("texts", "there are no texts", shown(texts), "give a list of texts of ids")
        parts = []
        for text in texts:
            ids = ids_of("texts", text)
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                received = f"{min(ids)} to {max(ids)} of {vocab_size}"
                raise DecodeError(
                    "texts", "a token id is outside the vocabulary", received, "give the right vocab_size"
                )
            parts.append(numpy.array((*ids, END), numpy.int32))
        tokens = numpy.concatenate([numpy.zeros(0, numpy.int32), *parts])
        if len(tokens) == len(parts):
            raise DecodeError("texts", "there are no texts", "no tokens", "give one at least")
        order = _in_order(tokens)
        kind = numpy.int32 if len(tokens) <= 2**31 else numpy.int64
        return cls(vocab_size, tokens, order[tokens[order] != END].astype(kind))

    def find(self, tokens: Tokens, longest: int = DEPTH) -> Found:
        """The longest ending of a text, of up to `longest` tokens, that occurs and goes on, and where.

        Of many places `PLACES` are given. A text none of whose endings occurs has length 0, and no places.
        """
        whole(1, "match one token at least")("longest", longest)
        text = tokens_of(tokens)
        ending = ids_of("tokens", text[-min(int(longest), DEPTH) :])
        length, top, found = 0, len(ending), self.suffixes[:0]
        while length < top:  # what ends in an ending that does not occur does not occur
            middle = (length + top + 1) // 2
            places = self._places(ending[-middle:])
            length, top, found = (middle, top, places) if len(places) else (length, middle - 1, found)
        return Found(length, found)

    def after(self, tokens: Tokens, /) -> Sequence[tuple[int, float]]:
        """What followed the longest match, the most frequent first; its share, times the `trust` in the match."""
        return _after(self, self.find(tokens))

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all, as `NGramStorage.save` does."""
        arrays = {"tokens": self.tokens.astype(numpy.int32), "suffixes": self.suffixes}
        metadata = {"format": FORMAT, "vocab_size": str(self.vocab_size)}
        write(path, save(arrays, metadata | {"sha256": _checksum(metadata, arrays)}))

    @classmethod
    def load(cls, path: str | PathLike[str], vocab_size: int) -> Self:
        """Map what `save` wrote into memory. It is read once, for its checksum.

        `DecodeError` for a file that is damaged, no corpus, or of another vocabulary. `save` puts a new file in the
        place of one that is mapped, which stays as it is; do not write into it otherwise.
        """
        _is_vocabulary("vocab_size", vocab_size)
        named = checked_path(path)
        try:
            with safe_open(named, framework="pt") as file:  # of which torch maps the file
                metadata = dict(file.metadata() or {})
                arrays = {name: file.get_tensor(name).numpy() for name in sorted(file.keys())}
        except FileNotFoundError as error:
            raise no_file(path, "does not exist", "name one that `save` wrote") from error
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise no_file(path, f"is truncated, corrupted or not of this kind ({said(error)})", REMEDY) from error
        sha = metadata.pop("sha256", None)
        if metadata.get("format") != FORMAT:
            raise no_file(path, "holds no corpus", "give one that `save` wrote")
        if metadata.get("vocab_size") != str(vocab_size):
            happened = f"is of a vocabulary of {metadata.get('vocab_size')} tokens, and not {vocab_size}"
            raise no_file(path, happened, "give the corpus of this target's tokenizer")
        if set(arrays) != {"tokens", "suffixes"} or sha != _checksum(metadata, arrays):
            raise no_file(path, "is damaged, its checksum does not match", REMEDY)
        return cls(vocab_size, arrays["tokens"], arrays["suffixes"])

    def _places(self, ending: Tokens) -> Places:
        """Where the texts go on after an ending."""
        length = len(ending)

        def there(position: int) -> Tokens:
            return tuple(self.tokens[position : position + length].tolist())

        first = bisect_left(self.suffixes, ending, key=there)
        last = bisect_right(self.suffixes, ending, first, key=there)
        if last - first > PLACES:
            found = self.suffixes[first + numpy.arange(PLACES) * (last - first) // PLACES]
        else:
            found = self.suffixes[first:last]
        places: Places = found.astype(numpy.int64) + length
        return places[numpy.flatnonzero(self.tokens[places] != END)]


@final
@frozen
class CorpusTree:
    """Drafts a tree of what followed the text's longest ending in a corpus, the most frequent continuations first.

    With a match of m tokens a token that followed it in a share s of its places is guessed to be taken with s · c(m),
    c = `trust`, and each draft lengthens the match by one. A draft's chance is the product down its path. Endings of
    `shortest` to `longest` tokens are looked for.

    A pure function of the text. 1 ≤ shortest ≤ longest, else `DecodeError`.
    Source: He et al. 2311.08252 (REST), sections 3.2 and 3.3; the chances are ours.

    >>> corpus = Corpus.of([(1, 2, 3, 1, 2, 4), (1, 2, 4)], vocab_size=10)
    >>> [(draft.token, draft.parent) for draft in CorpusTree(corpus)((9, 1, 2))]
    [(4, -1), (3, -1), (1, 1), (2, 2), (4, 3)]
    """

    corpus: Corpus = field(validator=valid(a(Corpus, "give Corpus.of(texts, vocab_size)")))
    longest: int = field(default=16, validator=valid(whole(1, "match one token at least")))
    shortest: int = field(default=1, validator=valid(whole(1, "match one token at least")))
    source: str = field(default="corpus", validator=valid(a(str, "name the drafter")))

    def __attrs_post_init__(self) -> None:
        whole(1, "give no more than longest", self.longest)("shortest", self.shortest)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        found = self.corpus.find(tokens, self.longest)
        if found.length < self.shortest:
            return

        def followers(found: Found) -> Iterator[Candidate]:
            for token, chance in _after(self.corpus, found):
                yield Candidate(token, chance, self.source)

        def after(found: Found, token: int) -> Found:
            return Found(found.length + 1, found.places[self.corpus.tokens[found.places] == token] + 1)

        yield from likeliest_first(found, followers, after)


def _after(corpus: Corpus, found: Found) -> list[tuple[int, float]]:
    """The most frequent tokens at the places of a match, each with its share of them, times the trust in the match."""
    here = corpus.tokens[found.places]
    several, counts = numpy.unique(here[here != END], return_counts=True)
    best = numpy.argsort(-counts, kind="stable")[:FOLLOWERS].tolist()
    return [(int(several[i]), float(counts[i]) / len(here) * trust(found.length)) for i in best]


def _in_order(tokens: NDArray[numpy.int32]) -> NDArray[numpy.int64]:
    """All positions, in the order of the `DEPTH` tokens that follow from there; `END` comes before all tokens."""
    rank, width = tokens.astype(numpy.int64) - END, 1
    while True:
        after = numpy.zeros_like(rank)
        after[:-width] = rank[width:]
        key = rank * (int(rank.max()) + 1) + after
        order = numpy.argsort(key, kind="stable")
        width *= 2
        if width >= DEPTH:
            return order
        key = key[order]
        rank[order] = numpy.concatenate([[1], key[1:] != key[:-1]]).cumsum()


def _checksum(metadata: dict[str, str], arrays: dict[str, NDArray[numpy.signedinteger]]) -> str:
    return checksum(metadata, {name: torch.from_numpy(array) for name, array in arrays.items()})
