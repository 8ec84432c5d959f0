"""Training an EAGLE-3 head of one layer and a reduced vocabulary, on a target's own answers.

Source: Li et al. 2503.01840 (EAGLE-3).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import cos, pi
from os import PathLike
from pathlib import Path
from random import Random
from typing import Final, cast, final

import torch
from attrs import asdict, field, frozen
from safetensors.torch import save
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from specflow.distill.answers import answers_of
from specflow.distill.folder import CONFIG, STATE, WEIGHTS, damaged, made_folder, origin_of, refuse_filled
from specflow.distill.lesson import Lesson, Text, unrolled
from specflow.errors import DecodeError
from specflow.files import write
from specflow.guards.checks import MOST, a, calls, flag, number, shown, valid, whole
from specflow.guards.ids import ids_of
from specflow.heads.eagle import Eagle3
from specflow.heads.head import Vocabulary
from specflow.heads.layer import Shape
from specflow.heads.load import LAYERS
from specflow.heads.target import Target
from specflow.predictors import CachedPredictor
from specflow.predictors.reader import config_of, refuse_weightless
from specflow.state import Tokens

LIKELY: Final = 256
"""How many of the likeliest tokens a head is told of at each place."""

_count = valid(whole(1, "give 1 or more", MOST))


@final
@frozen
class Recipe:
    """How a head is trained. `DecodeError` for what are no numbers of 1 or more, and a rate that is not positive.

    `drafts`: how many tokens the head can say, the most frequent ones of the answers. `ahead`: for how many drafts in a
    row it is trained. `steps` of `texts` texts each; the rate rises over the first twentieth of them and falls to 0 by
    a cosine. Every `every` steps it is tried on the texts that it does not learn from, one in `held_out`, and saved.
    """

    drafts: int = field(default=8192, validator=_count)
    ahead: int = field(default=3, validator=_count)
    steps: int = field(default=1000, validator=_count)
    texts: int = field(default=2, validator=_count)
    rate: float = field(
        default=1e-3, validator=valid(number("rate is not a positive number", "give 0.001", lambda rate: 0 < rate < 1))
    )
    every: int = field(default=100, validator=_count)
    held_out: int = field(default=10, validator=valid(whole(2, "learn from some texts and not from others", MOST)))
    new_tokens: int = field(default=128, validator=_count)
    seed: int = field(default=0, validator=valid(whole(0, "give a whole number", MOST)))


@final
@frozen
class Heard:
    """What was heard of the training: after `step` steps, the loss since the last time, and held-out acceptance.

    `right[i]` is how often i + 1 drafts in a row were right on texts that were not learnt from, and `length` what a
    chain of those makes: 1 + Σ right tokens a pass of the target.
    """

    step: int
    loss: float
    right: tuple[float, ...]

    @property
    def length(self) -> float:
        """Tokens a pass of the target, greedy, with a chain of drafts."""
        return 1 + sum(self.right)


def distill(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    out: str | PathLike[str],
    recipe: Recipe = Recipe(),
    stop: Sequence[int] = (),
    tell: Callable[[Heard], object] = lambda heard: None,
    answered: Callable[[int], object] = lambda done: None,
    learnt: Callable[[int], object] = lambda step: None,
    reading: Module | None = None,
    *,
    resume: bool = False,
) -> Heard:
    """Trains a head for `model` on its own greedy answers to `prompts`, and keeps it in the folder `out`.

    The folder is a checkpoint that `load_head` reads, in the layout of EAGLE-3; beside it are the answers and the state
    of the training, from which `resume` goes on after any interruption: the head is the same as without one. `tell`
    hears of each trial, `answered` of each answer and `learnt` of each step. The model stays as it is; what `reading`
    computes stands for it where it answers and is read, such as `accelerate.fast(model)`. What its layers hold at the
    tokens of all texts is kept in memory, three states a token.

    `DecodeError` for fewer texts than two, for a folder that cannot be written or that has a training in it and is not
    resumed, and for one of another recipe, other prompts or another model.
    """
    a(PreTrainedModel, "give a transformers model")("model", model)
    a(Recipe, "give Recipe()")("recipe", recipe)
    for name, listener in (("tell", tell), ("answered", answered), ("learnt", learnt)):
        calls("a listener", "give a function")(name, listener)
    rows, stops = _rows(prompts), ids_of("stop", stop)
    flag("resume", resume)
    reader: Module = model if reading is None else reading
    a(Module, "give a module, such as accelerate.fast(model)")("reading", reader)
    for name, module in (("model", model), ("reading", reader)):
        refuse_weightless(name, module)
    folder = made_folder(out)
    state = _begun(folder, resume=resume)
    texts = [
        text
        for text in answers_of(reader, folder, rows, stops, int(recipe.new_tokens), answered, origin_of(model, reader))
        if len(text.tokens) > max(2, text.prompt)
    ]
    held_out = texts[:: int(recipe.held_out)]
    known = [text for i, text in enumerate(texts) if i % recipe.held_out]
    if not known:
        happened, remedy = "there are not enough answers to learn from and to try the head on", "give more prompts"
        raise DecodeError("prompts", happened, f"{len(texts)} answers", remedy)
    head = new_head(model, [text.tokens[text.prompt :] for text in known], recipe)
    ids = head.vocabulary.ids
    assert ids is not None
    target = CachedPredictor(reader, memos=1, features=head.reads)
    lesson = cache(partial(Lesson.of, target, drafted=ids, most=LIKELY))
    training = _Training(lesson, head, recipe, known, held_out, folder)
    training.scale()
    return training.run(state, tell, learnt)


def new_head(model: Module, answers: Sequence[Tokens], recipe: Recipe) -> Eagle3:
    """A head that was not trained yet, which drafts the most frequent tokens of the answers.

    Its output layer begins as those rows of the target's, and its states as what the target holds last.
    """
    target = Target(model)
    config, hidden, like = config_of(model), target.hidden, target.like
    heads: int = getattr(config, "num_attention_heads", 1)
    rope: object = getattr(config, "rope_parameters", None)
    shape = Shape(
        hidden,
        int(getattr(config, "intermediate_size", 4 * hidden)),
        heads,
        int(getattr(config, "num_key_value_heads", None) or heads),
        int(getattr(config, "head_dim", None) or hidden // heads),
        float(getattr(config, "rms_norm_eps", 1e-6)),
        {"rope_parameters": dict(rope)} if isinstance(rope, Mapping) and "rope_theta" in rope else {},
    )
    ids = frequent(answers, int(recipe.drafts), target.vocab_size).to(like.device)
    vocabulary = Vocabulary(target.vocab_size, target.embeddings.num_embeddings, ids)
    reads = target.reads(tuple(sorted({target.layers // 3, 2 * target.layers // 3, target.layers})))
    with torch.random.fork_rng():
        lm_head = Linear(hidden, len(ids), bias=False)
        head = Eagle3(shape, vocabulary, reads, len(reads) * hidden, target.embeddings, lm_head)
        own = [module for name, module in head.named_children() if name != "embed_tokens"]
        for module in own:
            module.float()  # before a weight is drawn or copied: torch's default dtype may be of 16 bits
        torch.manual_seed(recipe.seed)
        for module in own:  # and nothing of the embeddings, which are the target's
            for part in module.modules():
                if isinstance(part, Linear):
                    part.reset_parameters()
    with torch.no_grad():
        weight: object = getattr(target.says, "weight", None)
        if isinstance(weight, Tensor):
            lm_head.weight.copy_(weight[ids])
        head.fc.weight.mul_(0.1)
        head.fc.weight[:, -hidden:].add_(torch.eye(hidden, dtype=torch.float32))
    for module in own:
        module.to(like.device)
    return head


def frequent(answers: Sequence[Tokens], most: int, vocab_size: int) -> Tensor:
    """The `most` most frequent tokens, ascending: those of the answers first, then the first ones of the vocabulary.

    >>> frequent([(5, 3, 5), (3, 5, 9)], 3, 16)
    tensor([3, 5, 9])
    """
    counted = Counter(token for tokens in answers for token in tokens)
    ordered = [*[token for token, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))]]
    rest = (token for token in range(vocab_size) if token not in counted)
    chosen = [token for _, token in zip(range(min(most, vocab_size)), [*ordered, *rest], strict=False)]
    return torch.tensor(sorted(chosen))


def save_head(folder: Path, head: Eagle3, shape: Shape) -> None:
    """Keeps a head in the layout of EAGLE-3, without the embeddings, which are the target's."""
    config = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.size,
        "num_hidden_layers": 1,
        "rms_norm_eps": shape.epsilon,
        "hidden_act": "silu",
        "vocab_size": head.vocabulary.size,
        LAYERS: list(head.reads),
        **shape.rope,
    }
    ids = head.vocabulary.ids
    assert ids is not None
    config["draft_vocab_size"] = len(ids)
    marks = torch.zeros(head.vocabulary.size, dtype=torch.bool)
    marks[ids.cpu()] = True
    tensors = {"d2t": ids.cpu() - torch.arange(len(ids)), "t2d": marks}
    for name, tensor in _own(head).items():
        tensors[name.replace("layers.0.", "midlayer.")] = tensor.detach().cpu().contiguous()
    write(folder / CONFIG, json.dumps(config, indent=2).encode())
    write(folder / WEIGHTS, save(tensors))


def _own(head: Eagle3) -> dict[str, Tensor]:
    """The head's own weights."""
    return {name: tensor for name, tensor in head.named_parameters() if not name.startswith("embed_tokens.")}


@final
@frozen(eq=False)
class _Training:
    """A head and what it learns from."""

    lesson: Callable[[Text], Lesson]
    head: Eagle3
    recipe: Recipe
    known: Sequence[Text]
    held_out: Sequence[Text]
    folder: Path

    def run(
        self, state: Mapping[str, object] | None, tell: Callable[[Heard], object], learnt: Callable[[int], object]
    ) -> Heard:
        """All steps that were not taken yet."""
        recipe, weights = self.recipe, _own(self.head)
        optimizer = torch.optim.AdamW(weights.values(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
        begun, heard = 0, Heard(0, 0.0, ())
        if state is not None:
            begun, heard = self._restored(state, optimizer)
        total, count = 0.0, 0
        for step in range(begun, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * _pace(step, recipe.steps)
            optimizer.zero_grad()
            for text in self._texts(step):
                loss = unrolled(self.head, self.lesson(text), recipe.ahead).loss / recipe.texts
                loss.backward()  # type: ignore[no-untyped-call]
                total, count = total + float(loss.detach()), count + 1
            clip_grad_norm_(weights.values(), 0.5)
            optimizer.step()
            learnt(step + 1)
            if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
                heard = Heard(step + 1, total * recipe.texts / count, self._tried())
                total, count = 0.0, 0
                self._keep(heard, optimizer)
                tell(heard)
        return heard

    def scale(self) -> None:
        """Let the head's norm give what is as large as what the target's own head reads."""
        with torch.no_grad():
            last = self.lesson(self.known[0]).held[:, -self.head.norm.weight.numel() :]
            self.head.norm.weight.fill_(float(last.float().square().mean().sqrt()))

    def _texts(self, step: int) -> list[Text]:
        """The texts of a step: all come before any comes again, in an order that the seed and the round say."""
        texts = []
        for i in range(step * self.recipe.texts, (step + 1) * self.recipe.texts):
            order = list(range(len(self.known)))
            Random(f"{self.recipe.seed}/{i // len(order)}").shuffle(order)
            texts.append(self.known[order[i % len(order)]])
        return texts

    def _tried(self) -> tuple[float, ...]:
        """How often 1, 2, … drafts in a row are right on the texts that are not learnt from."""
        counts, places = [0] * self.recipe.ahead, 0
        with torch.no_grad():
            for text in self.held_out:
                marks = unrolled(self.head, self.lesson(text), self.recipe.ahead)
                for i, right in enumerate(marks.right):
                    counts[i] += right
                places += marks.places
        return tuple([count / max(1, places) for count in counts])

    def _keep(self, heard: Heard, optimizer: torch.optim.Optimizer) -> None:
        save_head(self.folder, self.head, self.head.caching.shape)
        held = {
            "recipe": _numbers(self.recipe),
            "weights": {name: tensor.detach() for name, tensor in _own(self.head).items()},
            "optimizer": optimizer.state_dict(),
            "step": heard.step,
            "loss": heard.loss,
            "right": list(heard.right),
        }
        building = self.folder / f".{STATE}"
        torch.save(held, building)
        building.replace(self.folder / STATE)

    def _restored(self, state: Mapping[str, object], optimizer: torch.optim.Optimizer) -> tuple[int, Heard]:
        if state.get("recipe") != _numbers(self.recipe):
            happened, remedy = "the training is of another recipe", "name another folder"
            raise DecodeError("out", happened, shown(str(self.folder)), remedy)
        try:
            self.head.load_state_dict(cast(dict[str, Tensor], state["weights"]), strict=False)
            optimizer.load_state_dict(cast(dict[str, object], state["optimizer"]))
            heard = Heard(
                cast(int, state["step"]), cast(float, state["loss"]), tuple(cast(list[float], state["right"]))
            )
        except Exception as error:  # a file of any content
            raise damaged(self.folder, error) from error
        return heard.step, heard


def _numbers(recipe: Recipe) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(recipe).items()}


def _pace(step: int, steps: int) -> float:
    """The rate of a step, as a part of the largest."""
    rise = max(1, steps // 20)
    return (step + 1) / rise if step < rise else 0.5 * (1 + cos(pi * (step - rise) / max(1, steps - rise)))


def _rows(prompts: object) -> list[Tokens]:
    if isinstance(prompts, str | bytes | Tensor) or not isinstance(prompts, Sequence):
        raise DecodeError("prompts", "prompts are no rows of ids", shown(prompts), "give several in a list")
    rows = [ids_of("prompts", row) for row in prompts]
    if len(rows) < 2 or not all(rows):
        happened, remedy = "there are not enough prompts", "give two at least, none of them empty"
        raise DecodeError("prompts", happened, f"{len(rows)} prompts", remedy)
    return rows


def _begun(folder: Path, *, resume: bool) -> Mapping[str, object] | None:
    """The state of a training that goes on; None where it begins."""
    if not resume:
        refuse_filled(folder)
    if not (folder / STATE).exists():
        return None
    try:
        held: object = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of any content
        raise damaged(folder, error) from error
    if not isinstance(held, dict):
        raise damaged(folder, ValueError("no state"))
    return held
