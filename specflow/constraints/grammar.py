"""Grammars as values: JSON schemas, regular expressions, Lark grammars, choices, and matchers of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, final

from attrs import field, frozen
from torch import Tensor

from specflow.constraints import guidance
from specflow.constraints.constraint import Constraint, ends_of
from specflow.constraints.guidance import Tokenizer
from specflow.constraints.matcher import Matcher
from specflow.guards.checks import calls, valid
from specflow.guards.ids import ids_of

Schema: TypeAlias = Mapping[str, object] | bool | str
"""A JSON schema, or its text."""


def _makes_matchers(name: str, value: object) -> None:
    if not (isinstance(value, type) and callable(getattr(value, "mask", None))):  # a class of matchers makes them
        calls("what makes a matcher", "give a function of nothing, or use Grammar.regex and its like")(name, value)


@final
@frozen(eq=False)
class Grammar:
    """A set of texts, of which a model is to say one: what makes a matcher, and the tokens that end a complete text.

    The constructors compile a grammar with llguidance (`specflow[grammar]`). `tokenizer` is a fast tokenizer of
    transformers, or the bytes of each token in a tuple; `stop` are the tokens that end the text, such as `loaded.stop`.
    `start` makes the matcher of a new text, for a grammar of your own (docs/grammars.md).

    `DecodeError` for what is no grammar, or none that llguidance knows, and where it is not installed.

    >>> grammar = Grammar.choice(["ab", "bb"], (b"a", b"b", b""), stop=(2,))
    >>> answer = grammar.after((0, 0))  # a prompt of two tokens
    >>> answer.allowed((0, 0), 3).tolist(), answer.allowed((0, 0, 0, 1), 3).tolist()
    ([True, True, False], [False, False, True])
    """

    start: Callable[[], Matcher] = field(validator=valid(_makes_matchers))
    stop: frozenset[int] = field(converter=ends_of)

    @classmethod
    def json_schema(cls, schema: Schema, tokenizer: Tokenizer, stop: int | Iterable[int]) -> Grammar:
        """The JSON texts that are valid under a schema, given as a mapping or as its text."""
        return cls(guidance.json_schema(schema, tokenizer, ends_of(stop)), ends_of(stop))

    @classmethod
    def regex(cls, pattern: str, tokenizer: Tokenizer, stop: int | Iterable[int]) -> Grammar:
        """The texts that a regular expression matches as a whole (Rust's syntax: without looking around)."""
        return cls(guidance.regex(pattern, tokenizer, ends_of(stop)), ends_of(stop))

    @classmethod
    def lark(cls, text: str, tokenizer: Tokenizer, stop: int | Iterable[int]) -> Grammar:
        """The texts of a context-free grammar, in llguidance's variant of Lark; its first rule is `start`."""
        return cls(guidance.lark(text, tokenizer, ends_of(stop)), ends_of(stop))

    @classmethod
    def choice(cls, texts: Sequence[str], tokenizer: Tokenizer, stop: int | Iterable[int]) -> Grammar:
        """These texts and no others; none of them may be empty."""
        return cls(guidance.choice(texts, tokenizer, ends_of(stop)), ends_of(stop))

    def after(self, prompt: Sequence[int] | Tensor) -> Constraint:
        """The grammar for one text, which obeys it from the end of its prompt on."""
        return Constraint(self.start(), ids_of("prompt", prompt), self.stop)
