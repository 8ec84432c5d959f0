"""A drafter with another tokenizer, through the tokens that both share and through the text.

The target is SmolLM2. The drafter is a random model over a tokenizer that is trained here, so it drafts badly: the text
is SmolLM2's own all the same. In real life, `shared_tokens(load(target), load(drafter))` is all that is needed.

python examples/another_tokenizer.py
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specflow import CachedPredictor, Dice, Drafter, Fixed, GreedyProcessor, LLMDrafter, run, speculative_step, start
from specflow.drafters import IntersectionDrafter, Retokenised, propose_nothing
from specflow.models import Loaded, load, shared_tokens


def other() -> Loaded:
    """A random llama over a tokenizer of its own, which knows the words of two sentences."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(("What is the capital of France?", "The capital of France is Paris."), trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return Loaded(
        LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    )


def main() -> None:
    """Prints what is shared, and three times the same text."""
    big, small = load().unwrap(), other()
    shared = shared_tokens(big, small)
    assert shared is not None
    print(f"{len(shared.pairs)} of {len(shared.drafter.tokens)} tokens are shared")
    target, own, greedy, dice = CachedPredictor(big.model), CachedPredictor(small.model), GreedyProcessor(), Dice()
    drafters: dict[str, Drafter] = {
        "nothing": propose_nothing,
        "shared tokens": IntersectionDrafter(own, shared, greedy, dice),
        "the text": Retokenised(LLMDrafter(own, greedy, dice), shared),
    }
    for name, drafter in drafters.items():
        step = speculative_step(drafter, target, greedy, dice, Fixed(4), (target,))
        state = run(step, start(big.chat("What is the capital of France?"), 10, big.stop).unwrap()).state
        text = big.tokenizer.decode(state.output, skip_special_tokens=True)
        print(f"{name}: {text!r}, {state.tally.accepted} of {state.tally.drafted} drafts accepted")


if __name__ == "__main__":
    main()
