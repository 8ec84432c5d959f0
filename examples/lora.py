"""A LoRA-wrapped model (PEFT) as the target, and the model under it as the drafter.

pip install peft && python examples/lora.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from specflow import CachedPredictor, Dice, Fixed, GreedyProcessor, LLMDrafter, run, speculative_step, start


def tiny() -> LlamaForCausalLM:
    """A random llama; in real life, a pretrained one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Prints a text and how many of the base model's drafts the adapted model accepted."""
    adapted = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    target, drafter = CachedPredictor(adapted), CachedPredictor(tiny())
    draft = LLMDrafter(drafter, GreedyProcessor(), Dice())
    step = speculative_step(draft, target, GreedyProcessor(), Dice(), Fixed(4), (target, drafter))
    state = run(step, start([5, 9, 7], max_new_tokens=24).unwrap()).state
    print(state.output)
    print(f"{state.tally.accepted} of {state.tally.drafted} drafts accepted; fed in {target.feeding}")


if __name__ == "__main__":
    main()
