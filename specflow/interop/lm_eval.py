"""Decoders under EleutherAI's lm-eval, to see that accuracy is the same: `pip install 'specflow[lm-eval]'`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, TypeVar, cast, final

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from specflow.batch import Failed, together
from specflow.errors import DecodeError, said, unwrap
from specflow.guards.checks import a, calls, shown, whole
from specflow.guards.ids import stops_of
from specflow.loop import grow, start
from specflow.processors import GreedyProcessor, MultinomialProcessor, Processor
from specflow.protocols import Limits, checked_limits
from specflow.state import Proposal, Step, Tokens, chain

INSTALL: Final = "pip install 'specflow[lm-eval]'"

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
    from lm_eval.models.utils import postprocess_generated_text as cut
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise DecodeError("lm_eval", "lm-eval is missing", said(error), f"run `{INSTALL}`") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

T = TypeVar("T")

Compose: TypeAlias = Callable[[Processor], Step]
"""(which law tokens are drawn from) → the step that decodes one text. It is called for each text."""

Pair: TypeAlias = tuple[tuple[str, str], Sequence[int], Sequence[int]]
"""(context and continuation, the ids of the context, those of the continuation)."""

USUAL_CONTEXT: Final = 2048
"""The context of a target that does not tell its own, as in lm-eval."""

SAMPLING_ONLY: Final = frozenset({"temperature", "top_k", "top_p", "min_p"})
"""Arguments of generation that say nothing where the likeliest token is taken."""


class Limited(Protocol):
    """A predictor that tells what a text can take, as `CachedPredictor`, `BatchPredictor` and `LlamaCpp` do."""

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        ...

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each of the n drafts."""
        ...


@final
class SpecflowLM(TemplateLM):
    """A decoder as a model of lm-eval: `lm_eval.simple_evaluate(model=SpecflowLM(target, tokenizer, compose), …)`.

    Texts are decoded by `compose(processor)`; log p(continuation | context) = Σ log softmax(row)[token] over the rows
    that `target` gives, in fp64. What is cut, where texts end and what an empty context is are as in lm-eval's `hf`
    model, so scores are those of the model itself. Up to `slots` texts are decoded at a time; over a `BatchPredictor`
    they share passes. `stop` are the ids that end a text, beside the tokenizer's eos.

    `DecodeError` for parts that cannot be what they are given for, for arguments of generation that would change the
    text in another way than `do_sample` and `temperature` do, and where a text has no room.

    Source: lm-evaluation-harness, "New Model Guide".
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        target: Limited,
        tokenizer: PreTrainedTokenizerBase,
        compose: Compose,
        stop: Iterable[int] = (),
        slots: int = 8,
    ) -> None:
        calls("a target", "give a predictor, such as CachedPredictor(model)")("target", target)
        limits = checked_limits(getattr(target, "limits", None), "target")
        a(PreTrainedTokenizerBase, "give the target's tokenizer")("tokenizer", tokenizer)
        calls("what composes a step", "give a function that returns a step for a processor")("compose", compose)
        whole(1, "decode one text at a time at least")("slots", slots)
        if tokenizer.eos_token_id is None:
            remedy = "set tokenizer.eos_token"
            raise DecodeError("tokenizer", "the tokenizer names no token that ends a text", None, remedy)
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, limits.context or USUAL_CONTEXT
        self._eos = tokenizer.eos_token_id
        self._target, self._compose, self._slots = target, compose, int(slots)
        self._stop = stops_of("stop", stop) | {self._eos}

    @property
    @override
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self._eos

    @property
    @override
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self._eos if bos is None else bos

    @property
    @override
    def tokenizer_name(self) -> str:
        """By which lm-eval tells cached requests apart."""
        return self.tokenizer.name_or_path.replace("/", "__")

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the text of a prompt."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of a text, which gets no second bos."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    @override
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its stop strings."""
        asked = [cast(tuple[str, Mapping[str, object]], request.args) for request in requests]
        decodes = [partial(self._text, context, arguments) for context, arguments in asked]
        return self._all("generate_until", asked, decodes, quiet=disable_tqdm)

    @override
    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, read in windows of the context's length."""
        asked = [cast(tuple[str], request.args) for request in requests]
        decodes = [partial(self._rolling, text) for (text,) in asked]
        return self._all("loglikelihood_rolling", asked, decodes, quiet=disable_tqdm)

    @override
    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked = [texts for texts, _, _ in requests]
        decodes = [partial(self._scored, context, continuation) for _, context, continuation in requests]
        return self._all("loglikelihood", asked, decodes, quiet=disable_tqdm)

    def _all(self, kind: str, asked: Sequence[object], decodes: Sequence[Callable[[], T]], *, quiet: bool) -> list[T]:
        """What each decode says, told to lm-eval's cache as it comes. The first that fails ends all."""
        found: dict[int, T] = {}
        about, console = f"Running {kind} requests", Console(stderr=True)
        with closing(together(decodes, self._slots)) as ends:
            for number, end in track(ends, about, len(decodes), console=console, disable=quiet):
                if isinstance(end, Failed):
                    end.error.add_note(f"in request {number} of {kind}")
                    raise end.error
                found[number] = end
                self.cache_hook.add_partial(kind, asked[number], end)
        return [found[number] for number in range(len(decodes))]

    def _text(self, context: str, arguments: Mapping[str, object]) -> str:
        most, until, processor = _asked_for(arguments, self.tokenizer.decode([self._eos]))
        room = self.max_length - most
        if room < 1:
            happened = f"a context of {self.max_length} tokens has no room for a prompt and so many new ones"
            raise DecodeError("max_gen_toks", happened, most, "ask for fewer")
        state = unwrap(start(self.tok_encode(context)[-room:], most, self._stop, self._target.limits))
        output: Tokens = ()
        for new, _ in grow(self._compose(processor), state):
            output += new
            if self._holds(until, output):
                # What the step adds behind the first string may hold another one, which begins before it.
                ends = range(len(output) - len(new) + 1, len(output))
                output = next((output[:end] for end in ends if self._holds(until, output[:end])), output)
                break
        return cut(self._said(output), until, None)

    def _holds(self, until: Iterable[str], output: Tokens) -> bool:
        text = self._said(output)
        return any(string in text for string in until)

    def _said(self, output: Tokens) -> str:
        return self.tokenizer.decode(output, skip_special_tokens=True)

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return sum(self._scored(*make_disjoint_window(window))[0] for window in windows)

    def _scored(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """log p of a continuation, and whether it is the likeliest throughout. A long context loses its beginning."""
        read = (*context, *continuation)[-self.max_length - 1 : -1]
        text = len(read) - len(continuation) + 1
        if text < 1:
            happened, remedy = f"a continuation is longer than the context of {self.max_length}", "give a shorter one"
            raise DecodeError("continuation", happened, f"{len(continuation)} tokens", remedy)
        rows = self._target(read[:text], chain(read[text:])).log_softmax(-1, dtype=torch.float64)
        wanted = torch.tensor(continuation, device=rows.device)
        total = rows.gather(-1, wanted[:, None]).sum()
        return total.item(), bool((rows.argmax(-1) == wanted).all())


def _asked_for(arguments: Mapping[str, object], eos: str) -> tuple[int, list[str], Processor]:
    """The most new tokens, the strings that end the text, and the processor that arguments of generation ask for."""
    given = normalize_gen_kwargs(dict(arguments))
    most, until = given.pop("max_gen_toks"), handle_stop_sequences(given.pop("until"), eos)
    is_sampled, temperature = given.pop("do_sample"), given.pop("temperature", 1.0)
    unknown = sorted(given if is_sampled else given.keys() - SAMPLING_ONLY)
    if unknown:
        remedy = "leave it out, or compose a step with a processor of your own"
        raise DecodeError("gen_kwargs", "an argument of generation is not known here", shown(unknown[0]), remedy)
    return most, [s for s in until if s], MultinomialProcessor(temperature) if is_sampled else GreedyProcessor()
