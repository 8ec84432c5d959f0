"""xgrammar as the engine of a grammar, through the same door as any other.

Source: https://github.com/mlc-ai/xgrammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, final

import torch
from attrs import frozen
from torch import Tensor

from specflow.constraints.constraint import ends_of
from specflow.constraints.grammar import Grammar, Schema
from specflow.constraints.guidance import FastTokenizer, schema_of
from specflow.constraints.matcher import following
from specflow.errors import DecodeError, said
from specflow.guards.checks import a, shown, whole
from specflow.state import Tokens

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, GrammarCompiler, GrammarMatcher


_INSTALL: Final = "pip install --no-deps xgrammar apache-tvm-ffi"
"""Its wheel asks for packages that matching does not need."""


def json_schema(schema: Schema, tokenizer: FastTokenizer, stop: int | Iterable[int], vocab_size: int) -> Grammar:
    """The JSON texts that are valid under a schema, as xgrammar has it; the model knows `vocab_size` tokens."""
    text = json.dumps(schema_of(schema))
    return _grammar(lambda compiler: compiler.compile_json_schema(text), "schema", tokenizer, stop, vocab_size)


def regex(pattern: str, tokenizer: FastTokenizer, stop: int | Iterable[int], vocab_size: int) -> Grammar:
    """The texts that a regular expression matches as a whole, as xgrammar has it."""
    a(str, "give a regular expression")("pattern", pattern)
    return _grammar(lambda compiler: compiler.compile_regex(pattern), "pattern", tokenizer, stop, vocab_size)


def ebnf(text: str, tokenizer: FastTokenizer, stop: int | Iterable[int], vocab_size: int) -> Grammar:
    """The texts of a context-free grammar, in GBNF; its first rule is `root`."""
    a(str, 'give a grammar, such as root ::= "yes" | "no"')("text", text)
    return _grammar(lambda compiler: compiler.compile_grammar(text), "text", tokenizer, stop, vocab_size)


def _grammar(
    compile_with: Callable[[GrammarCompiler], CompiledGrammar],
    name: str,
    tokenizer: object,
    stop: object,
    vocab_size: int,
) -> Grammar:
    ends = ends_of(stop)
    whole(1, "give the number of tokens that the model knows")("vocab_size", vocab_size)
    vocab_size = int(vocab_size)
    if not ends:
        raise DecodeError("stop", "xgrammar needs a token that ends the text", "none", "give the model's stop tokens")
    try:
        import xgrammar  # noqa: PLC0415 - it is not needed otherwise
    except ImportError as error:
        raise DecodeError("grammar", "xgrammar is not installed", said(error), _INSTALL) from error
    try:
        known = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(ends))
    except Exception as error:  # of any class
        remedy = "give a fast tokenizer of transformers"
        raise DecodeError("tokenizer", "xgrammar cannot use this tokenizer", shown(tokenizer), remedy) from error
    try:
        compiled = compile_with(xgrammar.GrammarCompiler(known))
    except Exception as error:  # of any class
        remedy = "see xgrammar's documentation for what it takes"
        raise DecodeError(name, "xgrammar does not take this grammar", said(error), remedy) from error
    spell = partial(tokenizer.encode, add_special_tokens=False)  # type: ignore[attr-defined] # it is one
    return Grammar(
        lambda: following(lambda: _Matching(xgrammar.GrammarMatcher(compiled), ends, vocab_size, spell)), ends
    )


@final
@frozen(eq=False)
class _Matching:
    """An engine: a matcher of xgrammar."""

    matcher: GrammarMatcher
    ends: frozenset[int]
    vocab_size: int
    spell: Callable[[str], Sequence[int]]

    def mask(self) -> Tensor:
        bits = torch.full((1, (self.vocab_size + 31) // 32), -1, dtype=torch.int32, device="cpu")
        self.matcher.fill_next_token_bitmask(bits)
        places = torch.arange(32, dtype=torch.int32, device="cpu")
        mask = ((bits[0, :, None] >> places) & 1).bool().flatten()[: self.vocab_size].clone()
        mask[[token for token in self.ends if token < self.vocab_size]] = False
        return mask

    def take(self, token: int, /) -> bool:
        return token not in self.ends and token < self.vocab_size and self.matcher.accept_token(token)

    def back(self, count: int, /) -> None:
        self.matcher.rollback(count)

    def forced(self) -> Tokens:
        """The bytes that it knows to come, cut as the tokenizer cuts a text: the model may cut them otherwise."""
        return tuple(self.spell(self.matcher.find_jump_forward_string()))

    def may_end(self) -> bool:
        return self.matcher.is_completed()
