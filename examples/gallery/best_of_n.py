"""Best of n: several samples of one prompt in one batch, and the one that the model finds likeliest.

It has no certificate: each sample has the target's law (docs/batches.md); choosing among them is meant to change it.
"""

from __future__ import annotations

from torch.nn import Module
from transformers import LlamaConfig, LlamaForCausalLM

from specflow import CachedPredictor, MultinomialProcessor, Tokens
from specflow.batch import generate_many
from specflow.paths import last_rows


def mean_log_probability(model: Module, prompt: Tokens, answer: Tokens) -> float:
    """How likely the model finds an answer, per token."""
    rows = last_rows(CachedPredictor(model), prompt + answer[:-1], len(answer)).log_softmax(-1)
    return sum(float(row[token]) for row, token in zip(rows, answer, strict=True)) / len(answer)


def best_of(n: int, model: Module, prompt: Tokens, new_tokens: int, seed: int) -> tuple[Tokens, list[float]]:
    """The likeliest of n samples, and all their scores. A seed has one answer."""
    ends = generate_many(
        [prompt] * n,
        model,
        logits_processor=MultinomialProcessor(1.0),
        max_gen_len=new_tokens,
        eos_tokens_id=0,
        seed=seed,
        slots=n,
    )
    answers = [end.state.output for end in ends]
    scores = [mean_log_probability(model, prompt, answer) for answer in answers]
    return answers[scores.index(max(scores))], scores


def check() -> None:
    """The samples differ, the best is at least as likely as the others, and a seed has one answer."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval().double()
    best, scores = best_of(4, model, (5, 6, 7), 6, seed=1)
    assert len(set(scores)) > 1
    assert abs(mean_log_probability(model, (5, 6, 7), best) - max(scores)) < 1e-9
    assert best_of(4, model, (5, 6, 7), 6, seed=1)[0] == best
