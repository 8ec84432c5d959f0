"""A target sharded over two processes under a drafter that each of them holds whole.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Every process runs the same decode with the same dice; the target's passes are the only places where they talk. So it
is with several texts at once: as all processes do the same, they make the same passes in the same order. What is
decided by time must be decided alike, hence the one clock for all.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from specflow import (
    CachedPredictor,
    Dice,
    Fixed,
    LLMDrafter,
    MultinomialProcessor,
    Tokens,
    run,
    speculative_step,
    start,
)
from specflow.batch import generate_many
from specflow.policies.meter import Clock

PROMPTS: Final = ([5, 9, 7], [5, 9, 7, 11], [8], [6, 6, 3, 6, 6, 3], [5, 9, 7])


def tiny() -> LlamaForCausalLM:
    """A random llama; in real life, one that does not fit into one process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def smaller() -> LlamaForCausalLM:
    """A drafter: here the same model with a little noise on its weights."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def decode(target: CachedPredictor, drafter: CachedPredictor) -> Tokens:
    """A sampled text, with dice that every process throws alike."""
    dice, processor = Dice(torch.Generator().manual_seed(7)), MultinomialProcessor(0.8)
    draft = LLMDrafter(drafter, processor, dice)
    step = speculative_step(draft, target, processor, dice, Fixed(4), (target, drafter))
    return run(step, start([5, 9, 7], max_new_tokens=30).unwrap()).state.output


def heard_by_all() -> float:
    """What the first process's clock says."""
    seconds = torch.tensor(perf_counter(), dtype=torch.float64)
    dist.broadcast(seconds, 0)
    return float(seconds)


def decode_many(target: PreTrainedModel, clock: Clock, slots: int) -> list[Tokens]:
    """Several sampled texts at once, the drafts of each paced by what they cost."""
    ends = generate_many(
        PROMPTS,
        target,
        smaller(),
        gamma=4,
        logits_processor=MultinomialProcessor(0.8),
        max_gen_len=30,
        eos_tokens_id=[],
        seed=7,
        slots=slots,
        clock=clock,
    )
    return [end.state.output for end in ends]


def main() -> None:
    """Prints, in the first process, whether all processes of the sharded target said what the whole model says."""
    whole = tiny()
    with TemporaryDirectory() as folder:
        whole.save_pretrained(folder)  # before the processes know of each other: afterwards only the first one saves
        dist.init_process_group("gloo")
        sharded = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    pieces = sum(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    ours = decode(CachedPredictor(sharded), CachedPredictor(smaller())), *decode_many(sharded, heard_by_all, 3)
    everyone: list[tuple[Tokens, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    if dist.get_rank() == 0:
        print(f"{pieces} sharded parameters in {dist.get_world_size()} processes")
        alone = decode(CachedPredictor(whole), CachedPredictor(smaller())), *decode_many(whole, perf_counter, 1)
        print(f"the same {len(alone)} texts" if set(everyone) == {alone} else "other texts")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
