"""Read an address into JSON: the grammar drafts braces and keys, the prompt the values, and a quicker copy the rest.

python examples/grammar.py
"""

from __future__ import annotations

from specflow import CachedPredictor, Dice, GreedyProcessor, LLMDrafter, Reject, SuffixDrafter, first_of, run, start
from specflow.accelerate import lossy_int8
from specflow.constraints import Constrained, Grammar
from specflow.models import load
from specflow.steps import autoregressive_step, constrained_step

SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("recipient", "street", "postal_code", "city")},
    "required": ["recipient", "street", "postal_code", "city"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LETTER = "Ada Lovelace, 12 St James's Square, SW1Y 4JH London"


def main() -> None:
    """Prints the answer, who drafted it, and how many passes that saved."""
    loaded, dice, greedy = load().unwrap(), Dice(), GreedyProcessor()
    prompt = loaded.chat(f"Write this address as JSON: {LETTER}")
    state = start(prompt, 80, loaded.stop).unwrap()
    answer = Grammar.json_schema(SCHEMA, loaded.tokenizer, loaded.stop).after(prompt)
    target, law = CachedPredictor(loaded.model), Constrained(greedy, answer)
    quick = LLMDrafter(CachedPredictor(lossy_int8(loaded.model)), law, dice)  # it obeys the grammar, too
    drafter = first_of(SuffixDrafter(shortest=2), quick)
    end = run(constrained_step(answer, drafter, target, greedy, dice, Reject(dice)), state).state
    print(loaded.tokenizer.decode(end.output, skip_special_tokens=True))
    for source, count in end.tally.sources:
        print(f"{source}: {count.accepted} of {count.drafted} drafts accepted")
    alone = run(autoregressive_step(target, law, dice, until=answer.is_over), state).state
    assert alone.output == end.output
    print(f"the same text alone takes {alone.tally.steps} passes, and takes {end.tally.steps} here")


if __name__ == "__main__":
    main()
