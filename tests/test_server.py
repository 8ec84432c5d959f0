"""The example of a server: its texts are the decoder's own, one batch decodes them, and clients may leave."""

from __future__ import annotations

import asyncio
import json
import runpy
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
from time import monotonic, sleep
from typing import Any, Final

import pytest
import torch
from attrs import define, field
from transformers import PreTrainedModel

from specflow import Dice, MultinomialProcessor, autoregressive_step, run, start
from specflow.batch import BatchPredictor
from specflow.models import Loaded
from specflow.predictors import CachedPredictor
from tests.checked import ROOT
from tests.test_chat import of_bytes
from tests.test_cli import words
from tests.toys import oracle, tiny_llama

pytest.importorskip("uvicorn", reason="the server's packages are not installed: pip install 'specflow[dev]'")
pytest.importorskip("openai", reason="openai is not installed: pip install 'specflow[dev]'")

from openai import BadRequestError, OpenAI
from openai.types import CompletionUsage
from starlette.testclient import TestClient

EXAMPLE: Final = runpy.run_path(str(ROOT / "examples" / "server.py"))
IDS: Final = (5, 6, 7, 5, 6, 7)
PROMPT: Final = "w5 w6 w7 w5 w6 w7"
SLOTS: Final = 4


def served(model: PreTrainedModel) -> Any:  # noqa: ANN401 - examples are programs, and no package
    tokenizer = words()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return EXAMPLE["Server"](Loaded(model, tokenizer), "tiny", BatchPredictor(model, SLOTS))


MODEL: Final = tiny_llama()
SERVER: Final = served(MODEL)


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(EXAMPLE["app_of"](SERVER))


@pytest.fixture(scope="module")
def openai(client: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


def spelled(ids: tuple[int, ...] | list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


OWN: Final = oracle(IDS, MODEL, 20, {1, 2})


def is_right(usage: CompletionUsage | None) -> bool:
    assert usage is not None
    details = usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens is not None
    assert details.rejected_prediction_tokens is not None
    return (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 20, 26)


def test_a_completion_is_the_targets_own_text(openai: OpenAI) -> None:
    answer = openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == spelled(OWN)
    assert answer.choices[0].finish_reason == "length"
    assert is_right(answer.usage)


def test_a_chat_is_the_same_whole_and_as_a_stream(openai: OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "w5 w6 w7"}, {"role": "user", "content": "w5 w6 w7"}]
    create = openai.chat.completions.create
    whole = create(model="tiny", messages=messages, max_completion_tokens=20, temperature=0)
    assert whole.choices[0].message.content == spelled(OWN)
    assert is_right(whole.usage)
    options: Any = {"include_usage": True}
    chunks = [
        *create(model="tiny", messages=messages, max_tokens=20, temperature=0, stream=True, stream_options=options)
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == spelled(OWN)
    assert len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert is_right(chunks[-1].usage)


@pytest.mark.parametrize("stop", [f"w{OWN[5]}", f"w{OWN[5]} w{OWN[6]}", ["w9 w9", f"{OWN[5]} w{OWN[6]} w{OWN[7]}"]])
def test_a_stop_string_ends_a_text_and_is_never_shown(openai: OpenAI, stop: str | list[str]) -> None:
    text = spelled(OWN)
    expected = text[: text.index(stop if isinstance(stop, str) else stop[-1])]
    create = openai.completions.create
    whole = create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stop=stop).choices[0]
    chunks = [*create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stop=stop, stream=True)]
    assert whole.text == "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert whole.finish_reason == chunks[-1].choices[0].finish_reason == "stop"


def test_half_a_character_at_the_end_is_told_too() -> None:
    model = tiny_llama(vocab_size=256)
    client = TestClient(EXAMPLE["app_of"](EXAMPLE["Server"](Loaded(model, of_bytes()), "tiny", BatchPredictor(model))))
    output = oracle([65], model, 3)
    body = {"model": "tiny", "prompt": "A", "max_tokens": 3, "temperature": 0}
    text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert text == Loaded(model, of_bytes()).text(output)
    assert text.endswith("\N{REPLACEMENT CHARACTER}")


def test_a_seed_has_one_text(openai: OpenAI) -> None:
    def text(seed: int) -> str:
        create = openai.completions.create
        return create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=1.5, seed=seed).choices[0].text

    dice = Dice(torch.Generator().manual_seed(3))
    step = autoregressive_step(CachedPredictor(MODEL), MultinomialProcessor(1.5), dice)
    output = run(step, start(IDS, 20, {1, 2}).unwrap()).state.output
    assert text(3) == text(3) == spelled([token for token in output if token != 1])  # w1 is eos, which is no text
    assert text(3) != text(4)


def test_the_model_is_listed(openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny"]


ASKED: Final = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", ASKED | {"model": "other"}, "there is no such model"),
        ("completions", ASKED | {"prompt": ""}, "the prompt is empty"),
        ("completions", ASKED | {"prompt": "w5 " * 200}, "longer than the target's context"),
        ("completions", ASKED | {"prompt": None}, "prompt: Input should be a valid string"),
        ("completions", ASKED | {"prompt": "\ud800"}, "JSON"),
        ("completions", ASKED | {"max_tokens": -1}, "the number of new tokens is negative"),
        ("completions", ASKED | {"max_tokens": "many"}, "max_tokens: Input should be a valid integer"),
        ("completions", ASKED | {"temperature": -1}, "temperature is not a positive number"),
        ("completions", ASKED | {"temperature": 1e99}, "temperature is beyond"),
        ("completions", ASKED | {"seed": 2**70}, "seed: Input should be"),
        ("completions", ASKED | {"stop": [""]}, "a stop string is missing or empty"),
        ("completions", ASKED | {"n": 2}, "n: Extra inputs are not permitted"),
        ("completions", ["a list"], "Input should be an object"),
        ("completions", "", "Input should be an object"),
        ("chat/completions", ASKED, "these are not messages"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user"}]}, "these are not messages"),
        ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_asked_wrongly_is_refused(
    client: TestClient, path: str, body: object, message: str, stream: bool
) -> None:
    asked = body | {"stream": stream} if isinstance(body, dict) else body
    response = client.post(f"/v1/{path}", content=json.dumps(asked))
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_openais_client_knows_a_refusal(openai: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="the prompt is empty") as caught:
        openai.completions.create(model="tiny", prompt="")
    assert caught.value.param == "prompt"


def test_an_error_in_the_middle_ends_its_text_alone() -> None:
    broken = tiny_llama()
    client = TestClient(EXAMPLE["app_of"](served(broken)))
    good = client.post("/v1/completions", json=ASKED | {"temperature": 0}).json()
    weight = dict(broken.named_parameters())["lm_head.weight"]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    response = client.post("/v1/completions", json=ASKED)
    assert response.status_code == 400
    assert "not finite" in response.json()["error"]["message"]
    lines = client.post("/v1/completions", json=ASKED | {"stream": True}).text
    assert "not finite" in json.loads(lines.removeprefix("data: "))["error"]["message"]
    with torch.no_grad():
        weight.copy_(kept)
    again = client.post("/v1/completions", json=ASKED | {"temperature": 0}).json()
    assert again["choices"] == good["choices"]


# One batch.


@define(eq=False)
class Gate:
    """Lets a model make as many passes as it is told."""

    allowed: Semaphore = field(factory=lambda: Semaphore(0))
    passes: int = 0

    def __call__(self, *_: object) -> None:
        assert self.allowed.acquire(timeout=60)
        self.passes += 1


def becomes(condition: Callable[[], bool]) -> None:
    """Waits until it is so."""
    until = monotonic() + 60
    while not condition():
        assert monotonic() < until
        sleep(0.001)


def gated() -> tuple[Any, TestClient, Gate]:
    """A server that was tried with a text, and waits at each pass from here on."""
    model = tiny_llama()
    server = served(model)
    client = TestClient(EXAMPLE["app_of"](server))
    assert client.post("/v1/completions", json=ASKED).status_code == 200
    gate = Gate()
    model.register_forward_pre_hook(gate)
    return server, client, gate


def test_texts_that_come_meanwhile_join_the_batch() -> None:
    server, client, gate = gated()

    def ask(prompt: tuple[int, ...]) -> str:
        body = {"model": "tiny", "prompt": spelled(prompt), "max_tokens": 20, "temperature": 0}
        text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    prompts = (IDS, (9, 3), (8, 21, 4), (22,), (30, 31, 32))
    with ThreadPoolExecutor(len(prompts)) as pool:
        first = pool.submit(ask, prompts[0])
        becomes(lambda: server.running == 1)
        others = [pool.submit(ask, prompt) for prompt in prompts[1:]]
        becomes(lambda: server.waiting.qsize() == len(others))
        gate.allowed.release(10_000)
        texts = [future.result(60) for future in (first, *others)]
    own = [oracle(prompt, MODEL, 20, {1, 2}) for prompt in prompts]
    assert texts == [spelled([token for token in text if token != 1]) for text in own]
    assert gate.passes < sum(map(len, own)) * 0.75
    assert server.running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream: bool) -> None:
    server, client, gate = gated()
    body = json.dumps(ASKED | {"max_tokens": 100, "temperature": 0, "stream": stream}).encode()
    steps = [{"type": "http.request", "body": body, "more_body": False}]

    async def leave() -> int:
        left = asyncio.Event()

        async def receive() -> dict[str, object]:
            if steps:
                return steps.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message.get("more_body"):
                left.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        answering = asyncio.ensure_future(client.app(scope, receive, send))
        gate.allowed.release(2)
        if not stream:
            while gate.passes < 2:
                await asyncio.sleep(0.001)
            left.set()
            gate.allowed.release()
        await answering
        passes = gate.passes
        gate.allowed.release(10_000)
        while server.running:
            await asyncio.sleep(0.001)
        return gate.passes - passes

    assert asyncio.run(leave()) <= 2
    assert client.post("/v1/completions", json=ASKED).status_code == 200


def test_what_texts_took_is_told_to_prometheus(client: TestClient, openai: OpenAI) -> None:
    def told() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = told()
    usage = openai.completions.create(model="tiny", prompt="w4 w24 w4", max_tokens=40, temperature=0).usage
    after = told()
    assert usage is not None
    assert usage.completion_tokens_details is not None
    accepted = usage.completion_tokens_details.accepted_prediction_tokens
    rejected = usage.completion_tokens_details.rejected_prediction_tokens
    assert accepted
    assert rejected
    taken = {name: after[name] - before.get(name, 0) for name in after}
    assert taken.pop("specflow_steps_total") < 40
    assert taken == {
        "specflow_tokens_total": usage.completion_tokens,
        'specflow_drafted_total{source="suffix"}': accepted + rejected,
        'specflow_accepted_total{source="suffix"}': accepted,
    }
