"""transformers' logits processors and stopping criteria inside a specflow decoder.

python examples/logits_processors.py
"""

from __future__ import annotations

from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from specflow import CachedPredictor, DecodeState, Dice, Finished, run, start
from specflow.drafters import SuffixDrafter
from specflow.interop import ProcessorList, stops
from specflow.models import load
from specflow.stages import Adjust, Draft, Reject, StopWhen, Verify, advance, commit


def main() -> None:
    """Prints an answer that repeats no three words, drafted from the text itself."""
    loaded = load().unwrap()
    prompt = loaded.chat("Name three colours, three times.")
    processor = ProcessorList(
        LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1), NoRepeatNGramLogitsProcessor(3)])
    )
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=len(prompt) + 24)])

    draft = Draft(SuffixDrafter())
    verify, adjust = Verify(CachedPredictor(loaded.model), processor, Reject(Dice())), Adjust(Dice())
    stop = StopWhen(stops(criteria))

    def step(state: DecodeState) -> DecodeState | Finished:
        return state.then(draft).then(verify).then(adjust).then(stop).then(commit).then(advance)

    finished = run(step, start(prompt, max_new_tokens=100, stop=loaded.stop).unwrap())
    print(loaded.tokenizer.decode(finished.state.output))
    print(f"ended by its {finished.reason.value}")


if __name__ == "__main__":
    main()
