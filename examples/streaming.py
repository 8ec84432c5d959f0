"""Stream with transformers' `TextStreamer`, and asynchronously, two texts at once.

python examples/streaming.py
"""

from __future__ import annotations

import asyncio

from transformers import TextStreamer

from specflow import CachedPredictor, Dice, GreedyProcessor, Step, Tokens, speculative_step, start
from specflow.drafters import SuffixDrafter
from specflow.interop import new_tokens, stream
from specflow.models import Loaded, load


def decoder(loaded: Loaded) -> Step:
    """A greedy decoder with a memo of its own."""
    return speculative_step(SuffixDrafter(), CachedPredictor(loaded.model), GreedyProcessor(), Dice())


async def both(loaded: Loaded, questions: tuple[str, str]) -> list[Tokens]:
    """Answers to both questions, decoded in turns."""

    async def answer(question: str) -> Tokens:
        text: Tokens = ()
        async for tokens in new_tokens(decoder(loaded), start(loaded.chat(question), 12, loaded.stop).unwrap()):
            text += tokens
        return text

    return await asyncio.gather(*map(answer, questions))


def main() -> None:
    """Prints one answer as it comes, then two that came side by side."""
    loaded = load().unwrap()
    state = start(loaded.chat("What is the capital of France?"), 12, loaded.stop).unwrap()
    stream(decoder(loaded), state, TextStreamer(loaded.tokenizer, skip_prompt=True))
    for tokens in asyncio.run(both(loaded, ("What is 2 + 2?", "Which colour is the sky?"))):
        print(loaded.tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
