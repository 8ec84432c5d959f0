"""llguidance: JSON schemas, regular expressions, Lark grammars and choices as matchers.

Source: https://github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, final
from weakref import WeakKeyDictionary

import numpy
import torch
from attrs import frozen
from torch import Tensor

from specflow.constraints.matcher import Matcher, following
from specflow.errors import DecodeError, said
from specflow.guards.checks import a, each, shown
from specflow.state import Tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class FastTokenizer(Protocol):
    """A fast tokenizer of transformers."""

    def __len__(self) -> int:
        """How many tokens there are."""
        ...

    def convert_ids_to_tokens(self, ids: int, /) -> str | None:
        """A token by its id."""
        ...


Tokenizer: TypeAlias = FastTokenizer | Sequence[bytes]
"""A fast tokenizer of transformers, or the bytes of each token, in the order of their ids."""

Made: TypeAlias = Callable[[], Matcher]
"""What makes the matcher of a new text."""

_JSON: Final = 'give a JSON schema, such as {"type": "object"}'


def json_schema(schema: object, tokenizer: object, stop: frozenset[int]) -> Made:
    """The matchers of JSON that is valid under a schema."""
    return _compiled("schema", {"json_schema": schema_of(schema)}, tokenizer, stop)


def schema_of(schema: object) -> object:
    """A JSON schema given as a mapping, a bool, or the text of one."""
    try:
        read: object = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise DecodeError("schema", f"the schema is not JSON ({said(error)})", shown(schema), _JSON) from error
    if not isinstance(read, Mapping | bool):
        raise DecodeError("schema", "a JSON schema is an object or a bool", shown(schema), _JSON)
    return read


def regex(pattern: object, tokenizer: object, stop: frozenset[int]) -> Made:
    """The matchers of what a regular expression matches as a whole."""
    a(str, "give a regular expression")("pattern", pattern)
    return _compiled("pattern", {"lark_grammar": f"start: /{_slashed(str(pattern))}/"}, tokenizer, stop)


def _slashed(pattern: str) -> str:
    _look_for_llguidance()
    from llguidance import regex_to_lark  # noqa: PLC0415 - an extra

    return regex_to_lark(pattern, use_ascii="")


def lark(text: object, tokenizer: object, stop: frozenset[int]) -> Made:
    """The matchers of a context-free grammar."""
    a(str, 'give a grammar in Lark, such as start: "yes" | "no"')("text", text)
    return _compiled("text", {"lark_grammar": text}, tokenizer, stop)


def choice(texts: object, tokenizer: object, stop: frozenset[int]) -> Made:
    """The matchers of some texts."""
    grammar = "start: " + " | ".join([json.dumps(text, ensure_ascii=False) for text in texts_of(texts)])
    return _compiled("texts", {"lark_grammar": grammar}, tokenizer, stop)


def texts_of(texts: object) -> tuple[str, ...]:
    """Texts to choose from, none of them empty."""
    each(a(str, "give texts"))("texts", texts)
    assert isinstance(texts, tuple | list)
    if not texts or not all(texts):
        raise DecodeError("texts", "a choice is missing or empty", shown(texts), "give texts of a character or more")
    return tuple(texts)


def _compiled(name: str, grammar: Mapping[str, object], tokenizer: object, stop: frozenset[int]) -> Made:
    known = _known(tokenizer, stop)
    from llguidance import LLMatcher  # noqa: PLC0415 - an extra

    first = LLMatcher(known, json.dumps({"grammars": [grammar]}), log_level=0)
    if first.is_error():
        remedy = "see llguidance's documentation for what it takes"
        raise DecodeError(name, "llguidance does not take this grammar", _sentence(first), remedy)
    ends = stop | frozenset(known.eos_tokens)
    return lambda: following(lambda: _Matching(first.deep_copy(), ends, known.vocab_size))


@final
@frozen(eq=False)
class _Matching:
    """An engine: a matcher of llguidance. Its own end of a text is not asked for."""

    matcher: LLMatcher
    ends: frozenset[int]
    vocab_size: int

    def mask(self) -> Tensor:
        bits = numpy.frombuffer(self.matcher.compute_bitmask(), numpy.uint8)
        self._check()
        mask = torch.from_numpy(numpy.unpackbits(bits, count=self.vocab_size, bitorder="little")).view(torch.bool)
        mask[[token for token in self.ends if token < self.vocab_size]] = False
        return mask

    def take(self, token: int, /) -> bool:
        if token in self.ends or not 0 <= token < self.vocab_size:
            return False
        taken = self.matcher.try_consume_tokens([token]) == 1
        self._check()
        return taken

    def back(self, count: int, /) -> None:
        self.matcher.rollback(count)
        self._check()

    def forced(self) -> Tokens:
        return tuple(self.matcher.compute_ff_tokens())

    def may_end(self) -> bool:
        return self.matcher.is_accepting()

    def _check(self) -> None:
        if self.matcher.is_error():
            remedy = "use a simpler grammar, or one that the tokenizer can write"
            raise DecodeError("grammar", "llguidance cannot go on with the grammar", _sentence(self.matcher), remedy)


def _sentence(matcher: LLMatcher) -> str:
    """What went wrong, on one line."""
    return shown(matcher.get_error().split("<state>")[0]).strip("'\"")


# Tokenizers: to make one takes a second, so each is made once.


_MADE: Final[WeakKeyDictionary[object, dict[tuple[int, frozenset[int]], LLTokenizer]]] = WeakKeyDictionary()


def _look_for_llguidance() -> None:
    try:
        import llguidance  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        remedy = "pip install 'specflow[grammar]'"
        raise DecodeError("grammar", "llguidance is not installed", said(error), remedy) from error


def _known(tokenizer: object, stop: frozenset[int]) -> LLTokenizer:
    """The tokenizer as llguidance wants it."""
    _look_for_llguidance()
    if isinstance(tokenizer, tuple | list):
        return _of_bytes(tuple(tokenizer), stop)
    if not callable(getattr(tokenizer, "get_vocab", None)) or not isinstance(tokenizer, Sized):
        raise _no_tokenizer(tokenizer)
    made, key = _MADE.setdefault(tokenizer, {}), (len(tokenizer), stop)
    if key not in made:
        made[key] = _of_transformers(tokenizer, [token for token in sorted(stop) if token < key[0]])
    return made[key]


def _of_transformers(tokenizer: object, ends: list[int]) -> LLTokenizer:
    from llguidance.hf import from_tokenizer  # noqa: PLC0415 - an extra

    try:
        return from_tokenizer(tokenizer, eos_token=ends or None)  # type: ignore[arg-type] # it looks itself
    except Exception as error:  # it may be of any class
        raise _no_tokenizer(tokenizer) from error


def _of_bytes(tokens: tuple[object, ...], stop: frozenset[int]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper  # noqa: PLC0415 - an extra

    if not tokens or not all(isinstance(token, bytes) for token in tokens):
        raise _no_tokenizer(tokens)
    # It wants an end, and a name for each token that has no text.
    tokens = tokens if any(token < len(tokens) for token in stop) else (*tokens, b"")
    ends = sorted(token for token in stop if token < len(tokens)) or [len(tokens) - 1]
    vocabulary = tuple([token or b"\xff<%d>" % i for i, token in enumerate(tokens) if isinstance(token, bytes)])
    special = tuple([i for i, token in enumerate(tokens) if not token or i in ends])
    return LLTokenizer(TokenizerWrapper(_Spelling(vocabulary, special, ends[0])), eos_token=ends)


@final
@frozen
class _Spelling:
    """A tokenizer of these tokens, the longest first."""

    tokens: tuple[bytes, ...]
    special_token_ids: tuple[int, ...]
    eos_token_id: int
    bos_token_id: None = None

    def __call__(self, given: bytes | str) -> list[int]:
        text = given.encode() if isinstance(given, str) else given
        said: list[int] = []
        at = 0
        while at < len(text):
            fitting = [i for i, token in enumerate(self.tokens) if text.startswith(token, at)]
            fitting = [i for i in fitting if i not in self.special_token_ids]
            if not fitting:
                raise ValueError(f"no token begins {text[at:]!r}")
            said.append(max(fitting, key=lambda i: len(self.tokens[i])))
            at += len(self.tokens[said[-1]])
        return said


def _no_tokenizer(tokenizer: object) -> DecodeError:
    happened, remedy = "llguidance cannot use this tokenizer", "give a fast tokenizer, or the bytes of each token"
    return DecodeError("tokenizer", happened, shown(tokenizer), remedy)
