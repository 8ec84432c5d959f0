"""A specflow decoder behind `model.generate`: the same arguments, the same text.

python examples/custom_generate.py
"""

from __future__ import annotations

import torch

from specflow.drafters import SuffixDrafter
from specflow.interop import Generate
from specflow.models import load


def main() -> None:
    """Prints what `generate` says, with and without us."""
    loaded = load().unwrap()
    ids = torch.tensor([loaded.chat("Write one, two, three, one, two, three.")])
    settings: dict[str, object] = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.05}
    theirs = loaded.model.generate(ids, **settings)
    ours = loaded.model.generate(ids, custom_generate=Generate(SuffixDrafter()), **settings)
    print(loaded.tokenizer.decode(ours[0, ids.shape[1] :].tolist()))
    print("the same text" if torch.equal(ours, theirs) else "another text")


if __name__ == "__main__":
    main()
