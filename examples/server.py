"""A server that speaks OpenAI's protocol over one batch: a text that comes while others are decoded joins them.

pip install pydantic starlette uvicorn; python examples/server.py
curl localhost:8000/v1/completions -d '{"model": "smollm2", "prompt": "The sky is", "stream": true}'
curl localhost:8000/metrics

An example, not a product: it knows no users, its queue has no end, and it takes no tools.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from time import time
from typing import TypeAlias
from uuid import uuid4

import torch
import uvicorn
from attrs import asdict, define, field, frozen
from pydantic import AliasChoices, BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import specflow as s
from specflow.batch import BatchPredictor, together
from specflow.commands import Told
from specflow.errors import said, unwrap
from specflow.loop import grow
from specflow.models import Loaded, load
from specflow.stages import never, stop_string
from specflow.state import Reason, Tally
from specflow.usage import Usage

Grown: TypeAlias = tuple[s.Tokens, s.DecodeState | s.Finished]
JSON: TypeAlias = dict[str, object]


class Asked(BaseModel, extra="forbid"):
    """What a request may say. Whatever else it says is refused: it would ask for another text."""

    model: str
    prompt: str = ""
    messages: list[dict[str, str]] = []
    max_tokens: int = Field(256, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: float = 1.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: dict[str, bool] = {}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


@frozen
class Kind:
    """An endpoint: the ids that are asked about, and what it calls an answer, and a piece of one."""

    ids: Callable[[Loaded, Asked], s.Tokens]
    objects: tuple[str, str]
    answer: Callable[[str], JSON]
    piece: Callable[[str], JSON]


def plain(text: str) -> JSON:
    return {"text": text}


COMPLETION = Kind(lambda loaded, asked: loaded.ids(asked.prompt), ("text_completion", "text_completion"), plain, plain)
CHAT = Kind(
    lambda loaded, asked: loaded.conversation(asked.messages),
    ("chat.completion", "chat.completion.chunk"),
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"role": "assistant", "content": text}},
)


@define(eq=False)
class Text:
    """A text that is asked for. `told` takes what its steps add from the batch's thread to the event loop."""

    step: s.Step
    state: s.DecodeState
    loop: asyncio.AbstractEventLoop = field(factory=asyncio.get_running_loop)
    told: asyncio.Queue[Grown | Exception] = field(factory=asyncio.Queue)
    reason: Reason | None = None
    is_left: bool = False


@define(eq=False)
class Server:
    """A model, the texts that wait for a place in its batch, and what all texts took."""

    loaded: Loaded
    name: str
    target: BatchPredictor
    waiting: SimpleQueue[Text] = field(factory=SimpleQueue)
    running: int = 0
    tally: Tally = Tally()
    tokens: int = 0

    def __iter__(self) -> Server:
        return self

    def __next__(self) -> Callable[[], None]:
        """The next decode. Where none waits, and others run, it has none, and is asked again after their next pass."""
        try:
            text = self.waiting.get(block=self.running == 0)
        except Empty:
            raise StopIteration from None
        self.running += 1
        return partial(self.decode, text)

    def decode(self, text: Text) -> None:
        """Decode a text for as long as its client stays."""
        try:
            growing = grow(text.step, text.state)
            while not text.is_left and (grown := next(growing, None)) is not None:
                text.loop.call_soon_threadsafe(text.told.put_nowait, grown)
        except Exception as error:  # it ends this text alone
            text.loop.call_soon_threadsafe(text.told.put_nowait, error)
        finally:
            self.running -= 1

    def step(self, asked: Asked) -> s.Step:
        processor = s.MultinomialProcessor(asked.temperature) if asked.temperature else s.GreedyProcessor()
        dice = s.Dice() if asked.seed is None else s.Dice(torch.Generator().manual_seed(asked.seed))
        until = stop_string(self.loaded.tokenizer, *asked.stops) if asked.stops else never
        return s.speculative_step(s.SuffixDrafter(), self.target, processor, dice, s.Fixed(4), until=until)

    async def pieces(self, request: Request, text: Text, stops: list[str]) -> AsyncIterator[str]:
        """The text, piece by piece as it is certain, up to its stop string."""
        words, known, sent = Told(self.loaded), "", 0
        held = max(map(len, stops), default=1) - 1  # what may be the beginning of a stop string
        try:
            self.waiting.put(text)
            while text.reason is None and not await request.is_disconnected():
                told = await text.told.get()
                if isinstance(told, Exception):
                    raise told
                new, outcome = told
                known += "".join(map(words.more, new))
                text.state = outcome.state if isinstance(outcome, s.Finished) else outcome
                if isinstance(outcome, s.Finished):
                    text.reason, known = outcome.reason, known + words.rest()
                certain = len(known) - (held if text.reason is None else 0)
                end = min([known.index(stop) for stop in stops if stop in known], default=certain)
                if end > sent:
                    yield known[sent:end]
                    sent = end
        finally:
            text.is_left = True
            self.tally, self.tokens = self.tally + text.state.tally, self.tokens + len(text.state.output)

    async def answer(self, kind: Kind, request: Request) -> Response:
        """What is asked, whole or as it comes."""
        asked = Asked.model_validate_json(await request.body())
        if asked.model != self.name:
            raise s.DecodeError("model", "there is no such model", asked.model, f"ask for {self.name}")
        ids = kind.ids(self.loaded, asked)
        text = Text(self.step(asked), unwrap(s.start(ids, asked.max_tokens, self.loaded.stop, self.target.limits)))
        pieces = self.pieces(request, text, asked.stops)
        common = {"id": f"cmpl-{uuid4().hex}", "created": int(time()), "model": self.name}
        if asked.stream:
            counts = asked.stream_options.get("include_usage", False)
            lines = events(text, pieces, kind.piece, common | {"object": kind.objects[1]}, counts)
            return StreamingResponse(lines, media_type="text/event-stream")
        choices = [choice(kind.answer("".join([piece async for piece in pieces])), text.reason)]
        usage = asdict(Usage.of(text.state))
        return JSONResponse(common | {"object": kind.objects[0], "choices": choices, "usage": usage})

    async def models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "specflow"}
        return JSONResponse({"object": "list", "data": [model]})

    async def metrics(self, request: Request) -> Response:
        """What all texts took, as Prometheus reads it."""
        lines = [f"specflow_tokens_total {self.tokens}", f"specflow_steps_total {self.tally.steps}"]
        for source, count in self.tally.sources:
            lines.append(f'specflow_drafted_total{{source="{source}"}} {count.drafted}')
            lines.append(f'specflow_accepted_total{{source="{source}"}} {count.accepted}')
        return PlainTextResponse("".join(f"{line}\n" for line in lines))


def choice(said: JSON, reason: Reason | None) -> JSON:
    finish = None if reason is None else "length" if reason is Reason.LIMIT else "stop"
    return {"index": 0, "logprobs": None, "finish_reason": finish, **said}


async def events(
    text: Text, pieces: AsyncIterator[str], shape: Callable[[str], JSON], common: JSON, counts: bool
) -> AsyncIterator[str]:
    """A text as server-sent events. An error that comes after its first piece can only be told there."""
    try:
        async for piece in pieces:
            yield event(common | {"choices": [choice(shape(piece), None)]})
        yield event(common | {"choices": [choice(shape(""), text.reason)]})
        if counts:
            yield event(common | {"choices": [], "usage": asdict(Usage.of(text.state))})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(refusal(error))


def event(body: JSON) -> str:
    return f"data: {json.dumps(body)}\n\n"


def refusal(error: Exception) -> JSON:
    """An error in the words of OpenAI's API."""
    message, parameter = said(error), error.parameter if isinstance(error, s.DecodeError) else None
    if isinstance(error, ValidationError):
        message = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return {"error": {"message": message, "type": "invalid_request_error", "param": parameter, "code": None}}


async def refused(request: Request, error: Exception) -> Response:
    return JSONResponse(refusal(error), status_code=400)


def app_of(server: Server) -> Starlette:
    """The server as an application, its batch running."""
    Thread(target=lambda: deque(together(server, server.target.slots), maxlen=0), daemon=True).start()
    routes = [
        Route("/v1/models", server.models),
        Route("/v1/completions", partial(server.answer, COMPLETION), methods=["POST"]),
        Route("/v1/chat/completions", partial(server.answer, CHAT), methods=["POST"]),
        Route("/metrics", server.metrics),
    ]
    return Starlette(routes=routes, exception_handlers={s.DecodeError: refused, ValidationError: refused})


def main() -> None:
    """Serves a model until Ctrl-C."""
    parser = argparse.ArgumentParser(description="specflow behind OpenAI's protocol")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    loaded = unwrap(load(options.model))
    server = Server(loaded, options.model, BatchPredictor(loaded.model, options.slots))
    uvicorn.run(app_of(server), port=options.port)


if __name__ == "__main__":
    main()
