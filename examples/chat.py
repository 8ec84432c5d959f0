"""A conversation in the model's chat template. The memo keeps what both turns share.

python examples/chat.py
"""

from __future__ import annotations

from specflow import CachedPredictor, Dice, GreedyProcessor, run, speculative_step, start
from specflow.drafters import SuffixDrafter
from specflow.models import load


def main() -> None:
    """Prints two turns; the second answer is drafted from the first."""
    loaded = load().unwrap()
    step = speculative_step(SuffixDrafter(), CachedPredictor(loaded.model), GreedyProcessor(), Dice())
    conversation: list[dict[str, str]] = []
    for question in ("Write the numbers one to six as words.", "Write the same numbers once more."):
        conversation.append({"role": "user", "content": question})
        ids = loaded.tokenizer.apply_chat_template(conversation, add_generation_prompt=True).input_ids
        state = run(step, start(ids, max_new_tokens=24, stop=loaded.stop).unwrap()).state
        answer = loaded.tokenizer.decode(state.output, skip_special_tokens=True)
        conversation.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}\n({state.tally.accepted} of {len(state.output)} tokens were drafted)")


if __name__ == "__main__":
    main()
