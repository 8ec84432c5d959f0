"""An EAGLE-3 head that drafts for a model: as a chain, as EAGLE-2's tree, and behind the text's own repetitions.

The model and the head are random, so few drafts are accepted; with a published pair this is all there is to write:
`load_head("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", model)`.

python examples/eagle.py
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from specflow import (
    CachedPredictor,
    Dice,
    Drafter,
    Fixed,
    GreedyProcessor,
    SuffixDrafter,
    first_of,
    run,
    speculative_step,
    start,
)
from specflow.drafters import propose_nothing
from specflow.heads import HeadDrafter, HeadPredictor, HeadTree, load_head

V, H, DRAFTED = 64, 32, 40


def write_random_head(folder: Path) -> None:
    """A head in the layout of the original repository, over the first 40 tokens of the target's 64."""
    sizes = {"hidden_size": H, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": V}
    (folder / "config.json").write_text(json.dumps(sizes | {"draft_vocab_size": DRAFTED}))
    shapes = {
        "embed_tokens": (V, H),
        "fc": (H, 3 * H),
        **{f"midlayer.self_attn.{name}_proj": (H, 2 * H) for name in "qkv"},
        "midlayer.self_attn.o_proj": (H, H),
        "midlayer.mlp.gate_proj": (48, H),
        "midlayer.mlp.up_proj": (48, H),
        "midlayer.mlp.down_proj": (H, 48),
        **{f"midlayer.{name}": (H,) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
        "norm": (H,),
        "lm_head": (DRAFTED, H),
    }
    weights = {f"{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    maps = {"d2t": torch.zeros(DRAFTED, dtype=torch.long), "t2d": torch.arange(V) < DRAFTED}
    save_file(weights | maps, folder / "model.safetensors")


def main() -> None:
    """Prints what each drafter proposed and what was accepted of it, and that the texts are one."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=H, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval()
    with TemporaryDirectory() as folder:
        write_random_head(Path(folder))
        head = load_head(folder, model)
    target = CachedPredictor(model, features=head.reads)
    predict = HeadPredictor(head, target)
    tree = HeadTree(predict, beam=4, depth=4)
    drafters: dict[str, Drafter] = {
        "no drafts": propose_nothing,
        "a chain": HeadDrafter(predict, GreedyProcessor(), Dice()),
        "a tree": tree,
        "copies, or a tree": first_of(SuffixDrafter(shortest=2), tree),
    }
    texts = set()
    for name, drafter in drafters.items():
        step = speculative_step(drafter, target, GreedyProcessor(), Dice(), Fixed(8), prune=(target,))
        state = run(step, start([5, 9, 7], max_new_tokens=32).unwrap()).state
        texts.add(state.output)
        print(f"{name}: {state.tally.accepted} of {state.tally.drafted} accepted, {state.tally.steps} steps")
    print("the same text" if len(texts) == 1 else "other texts")


if __name__ == "__main__":
    main()
