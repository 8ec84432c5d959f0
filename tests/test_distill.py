"""Training a head: what it is taught is what it does when it drafts, and an interrupted training is the same."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Final, final

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch.nn import Embedding, Linear, Module
from transformers import PreTrainedModel

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    Tokens,
    accelerate,
    chain,
    run,
    speculative_step,
    start,
)
from specflow.distill import Heard, Recipe, distill, fit_jump, kept_prompts, made_up
from specflow.distill.lesson import Lesson, Text, unrolled
from specflow.distill.train import LIKELY, new_head, save_head
from specflow.heads import HeadDrafter, HeadPredictor, Jump, load_head
from specflow.models import Loaded
from tests.heads import FreshFeatures
from tests.toys import VOCABULARY, oracle, tiny_llama

RECIPE: Final = Recipe(drafts=40, ahead=3, steps=8, texts=2, every=4, held_out=3, new_tokens=10)


@cache
def target() -> PreTrainedModel:
    return tiny_llama(5, layers=3, dtype=torch.float32)


def prompts(count: int, seed: int = 0) -> list[Tokens]:
    random = Random(seed)
    return [tuple(random.choices(range(VOCABULARY), k=random.randint(2, 6))) for _ in range(count)]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_new_head_is_the_same_whatever_dtype_torch_makes_tensors_of(dtype: torch.dtype) -> None:
    expected, before = new_head(target(), [(1, 2, 3)], RECIPE).state_dict(), torch.get_rng_state()
    torch.set_default_dtype(dtype)
    try:
        made = new_head(target(), [(1, 2, 3)], RECIPE).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())
    assert torch.equal(torch.get_rng_state(), before)


@final
class Factorised(Embedding):
    """A table whose rows are made of shorter ones."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight)
        self.wide = Linear(4, embedding.embedding_dim)


def test_a_new_head_leaves_the_targets_embeddings_as_they_are() -> None:
    model = tiny_llama(5, layers=3, dtype=torch.float32)
    embedding = model.get_submodule("model.embed_tokens")
    assert isinstance(embedding, Embedding)
    model.get_submodule("model").embed_tokens = Factorised(embedding)
    before = deepcopy(model.state_dict())
    new_head(model, [(1, 2, 3)], RECIPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_lesson_is_what_the_head_does_when_it_drafts() -> None:
    """From each place: the drafts in a row that were right, counted by drafting."""
    head = new_head(target(), [(1, 2, 3, 40, 50)], RECIPE)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if not name.startswith("embed_tokens"):
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(1.0))
    ids = head.vocabulary.ids
    assert ids is not None
    predict = HeadPredictor(head, FreshFeatures(target(), head.reads))
    prompt = (3, 17, 40)
    text = Text(prompt + tuple(oracle(prompt, target(), 30)), 3)
    counts = [0, 0, 0]
    for n in range(2, len(text.tokens)):
        before, after = text.tokens[:n], text.tokens[n : n + 3]
        if n < text.prompt:
            continue
        drafts = [draft.token for draft in islice(HeadDrafter(predict, GreedyProcessor(), Dice())(before), 3)]
        for i in range(len(after)):
            counts[i] += drafts[: i + 1] == list(after[: i + 1])
    marks = unrolled(head, Lesson.of(CachedPredictor(target(), features=head.reads), text, ids, LIKELY), 3)
    assert marks.right == tuple(counts)
    assert marks.places == len(text.tokens) - text.prompt
    assert sum(counts) > 0


def test_the_loss_is_what_its_formula_says() -> None:
    head = new_head(target(), [(1, 2, 3)], RECIPE)
    ids = head.vocabulary.ids
    assert ids is not None
    predict = HeadPredictor(head, FreshFeatures(target(), head.reads))
    text = Text((3, 17, 40, 9, 22, 1), 2)
    model_laws = CachedPredictor(target())
    losses = []
    for step in range(3):
        terms = []
        for n in range(2, len(text.tokens) - step):
            said = predict(text.tokens[:n], chain(text.tokens[n : n + step]))[-1][ids].log_softmax(-1)
            law = model_laws(text.tokens[: n + step], ())[0].softmax(-1)[ids]
            terms.append(-(law * said).sum())
        losses.append(torch.stack(terms).mean())
    loss = unrolled(head, Lesson.of(CachedPredictor(target(), features=head.reads), text, ids, LIKELY), 3).loss
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_a_head_learns_and_is_loaded_and_drafts(tmp_path: Path) -> None:
    heard: list[Heard] = []
    before = {name: tensor.clone() for name, tensor in target().state_dict().items()}
    recipe = evolve(RECIPE, steps=60, every=20, rate=5e-3, new_tokens=20)
    last = distill(target(), prompts(12), tmp_path / "head", recipe, tell=heard.append)
    assert [each.step for each in heard] == [20, 40, 60]
    assert heard[-1] == last
    assert heard[-1].loss < 0.9 * heard[0].loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in target().state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in target().modules())
    head = load_head(tmp_path / "head", target())
    drafter = HeadDrafter(HeadPredictor(head, FreshFeatures(target(), head.reads)), GreedyProcessor(), Dice())
    cached, prompt = CachedPredictor(target()), prompts(12)[1]
    step = speculative_step(drafter, cached, GreedyProcessor(), Dice(), Fixed(3), prune=(cached,))
    state = run(step, start(prompt, 20).unwrap()).state
    assert list(state.output) == oracle(prompt, target(), 20)
    assert state.tally.accepted > 0


class Stopped(BaseException):
    """Ctrl-C."""


@pytest.mark.parametrize("where", [2, 4, 5])
def test_an_interrupted_training_ends_as_if_it_had_not_been(where: int, tmp_path: Path) -> None:
    whole = distill(target(), prompts(6), tmp_path / "whole", RECIPE)

    def stop(step: int) -> None:
        if step == where:
            raise Stopped

    with pytest.raises(Stopped):
        distill(target(), prompts(6), tmp_path / "cut", RECIPE, learnt=stop)
    asked: list[int] = []
    again = distill(target(), prompts(6), tmp_path / "cut", RECIPE, answered=asked.append, resume=True)
    assert again == whole
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert asked == []  # the answers were there


def interrupted(folder: Path, reading: Module | None = None) -> list[int]:
    """What a training told that ended at its third answer, on a machine that went off while it wrote another one."""
    asked: list[int] = []

    def stop(done: int) -> None:
        asked.append(done)
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        distill(target(), prompts(6), folder, RECIPE, answered=stop, reading=reading)
    with (folder / "answers.jsonl").open("a") as kept:
        kept.write('{"prompt": 5, "answ')
    return asked


def test_answers_that_are_there_are_not_asked_for_again(tmp_path: Path) -> None:
    asked = interrupted(tmp_path)
    distill(target(), prompts(6), tmp_path, RECIPE, answered=asked.append, resume=True)
    assert asked == [1, 2, 3, 4, 5, 6]
    whole = tmp_path / "whole"
    distill(target(), prompts(6), whole, RECIPE)
    assert weights(tmp_path) == weights(whole)


def test_an_accelerated_model_answers_and_is_read_in_the_models_place(tmp_path: Path) -> None:
    model = tiny_llama(5, layers=3, dtype=torch.float32)
    fast, passes = accelerate.fast(model), []
    model.register_forward_pre_hook(lambda module, args: passes.append(1))
    distill(model, prompts(6), tmp_path / "fast", RECIPE, reading=fast)
    assert not passes
    distill(target(), prompts(6), tmp_path / "own", RECIPE)
    ours, own = (load_file(tmp_path / name / "model.safetensors") for name in ("fast", "own"))
    for name, tensor in own.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    with pytest.raises(DecodeError, match="reading"):
        distill(model, prompts(6), tmp_path / "none", RECIPE, reading="fast")  # type: ignore[arg-type]


def test_a_text_is_read_once(tmp_path: Path) -> None:
    fast, passes = accelerate.fast(target()), []
    fast.register_forward_pre_hook(lambda module, args: passes.append(1))
    counts = []
    for steps in (2, 3, 20):
        passes.clear()
        distill(target(), prompts(6), tmp_path / str(steps), evolve(RECIPE, steps=steps), reading=fast)
        counts.append(len(passes))
    assert counts[1] == counts[2]  # the first learnt how the model is called, too


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="not enough prompts"):
        distill(target(), [(1, 2)], tmp_path, RECIPE)
    with pytest.raises(DecodeError, match="steps is below 1"):
        Recipe(steps=0)
    distill(target(), prompts(6), tmp_path, evolve(RECIPE, steps=1))
    with pytest.raises(DecodeError, match="holds a training, or a head"):
        distill(target(), prompts(6), tmp_path, evolve(RECIPE, steps=1))
    with pytest.raises(DecodeError, match="of another recipe"):
        distill(target(), prompts(6), tmp_path, evolve(RECIPE, steps=2), resume=True)
    with pytest.raises(DecodeError, match="to other prompts"):
        distill(target(), prompts(6, 1), tmp_path, evolve(RECIPE, steps=1), resume=True)
    (tmp_path / "training.pt").write_bytes(b"nothing")
    with pytest.raises(DecodeError, match="cannot be resumed"):
        distill(target(), prompts(6), tmp_path, evolve(RECIPE, steps=1), resume=True)


def test_a_training_that_goes_on_is_of_one_model(tmp_path: Path) -> None:
    """Its answers would be those of two models, and its head that of neither."""
    interrupted(tmp_path)
    before = (tmp_path / "answers.jsonl").read_bytes()
    other = tiny_llama(6, layers=3, dtype=torch.float32)
    with pytest.raises(DecodeError, match=r"comes of another model: .*--accelerate"):
        distill(other, prompts(6), tmp_path, RECIPE, resume=True)
    with pytest.raises(DecodeError, match="comes of another reading"):
        distill(target(), prompts(6), tmp_path, RECIPE, reading=accelerate.fast(target()), resume=True)
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    interrupted(tmp_path / "fast", accelerate.fast(target()))
    steady = accelerate.bit_for_bit(target())
    with pytest.raises(DecodeError, match="comes of another reading"):
        distill(target(), prompts(6), tmp_path / "fast", RECIPE, reading=steady, resume=True)


def test_one_seed_is_one_head(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        distill(target(), prompts(6), tmp_path / name, evolve(RECIPE, steps=2, seed=seed))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_jump_is_fitted_by_least_squares(tmp_path: Path) -> None:
    """No other map foretells the states that it was fitted to better, and it is better than none on other texts."""
    texts = [prompt + tuple(oracle(prompt, target(), 20)) for prompt in prompts(12)]
    fit_jump(target(), texts, tmp_path, (1, 3), 1e-9)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in target().modules())
    head = load_head(tmp_path, target())
    assert isinstance(head, Jump)
    predict = HeadPredictor(head, FreshFeatures(target(), head.reads))
    mix, carry, token = (head.get_parameter(f"{name}.weight") for name in ("mix", "carry", "token"))
    rows, wanted = [], []
    for text in texts:
        held = FreshFeatures(target(), (1, 3)).features(text, len(text))
        last = FreshFeatures(target(), (3,)).features(text, len(text))
        embedded = target().get_parameter("model.embed_tokens.weight")[list(text)]
        rows.append(torch.cat((held[:-1], embedded[1:], torch.ones(len(text) - 1, 1)), dim=-1))
        wanted.append(last[1:])
    x, y = torch.cat(rows).double(), torch.cat(wanted).double()
    best = torch.linalg.lstsq(x, y).solution
    mine = torch.cat(((carry @ mix).T, token.T, head.token.bias[None])).double()
    least = float((x @ best - y).square().sum())
    assert least <= float((x @ mine - y).square().sum()) < least + 1e-2 * float(y.square().sum())
    cached, accepted = CachedPredictor(target(), features=head.reads), 0
    for prompt in prompts(6):
        drafter = HeadDrafter(predict, GreedyProcessor(), Dice())
        step = speculative_step(drafter, cached, GreedyProcessor(), Dice(), Fixed(2), prune=(cached,))
        state = run(step, start(prompt, 20).unwrap()).state
        assert list(state.output) == oracle(prompt, target(), 20)
        accepted += state.tally.accepted
    assert accepted > 0
    with pytest.raises(DecodeError, match="holds a training, or a head"):
        fit_jump(target(), texts, tmp_path, (1,))
    with pytest.raises(DecodeError, match="a target of 3 does not have"):
        fit_jump(target(), texts, tmp_path / "other", (4,))
    with pytest.raises(DecodeError, match="no text has three tokens"):
        fit_jump(target(), [(1, 2)], tmp_path / "other", (1,))


def test_a_model_makes_up_prompts_by_a_seed(smollm2: Loaded) -> None:
    told: list[int] = []
    found = made_up(smollm2, 3, seed=1, most=6, told=told.append)
    assert told == [1, 2, 3]
    assert len({*found}) == 3
    assert made_up(smollm2, 2, seed=1, most=6) == found[:2]
    assert made_up(smollm2, 2, seed=2, most=6) != found[:2]
    asked = smollm2.chat("specflow")
    for prompt in found:
        begun = next(i for i, (a, b) in enumerate(zip(asked, prompt, strict=False)) if a != b)
        assert smollm2.tokenizer.decode(prompt[:begun]).endswith("user\n")
        assert prompt[-3:] == asked[-3:]  # the model's answer begins there
        assert len(smollm2.stop & {*prompt[begun:]}) == 1  # that of the user's message


def test_prompts_are_kept(smollm2: Loaded, tmp_path: Path) -> None:
    found = kept_prompts(smollm2, 2, 1, tmp_path)
    told: list[int] = []
    assert kept_prompts(smollm2, 2, 1, tmp_path, told.append) == found
    assert told == []  # they were read
    assert kept_prompts(smollm2, 1, 1, tmp_path, told.append) == found[:1]
    assert told == [1]
    with pytest.raises(DecodeError, match="comes of another reading"):
        kept_prompts(smollm2, 1, 1, tmp_path, told.append, tiny_llama())
    (tmp_path / "prompts.json").write_text("{")
    with pytest.raises(DecodeError, match="cannot be read"):
        kept_prompts(smollm2, 1, 1, tmp_path)


def test_a_model_without_a_place_for_users_makes_up_nothing(smollm2: Loaded) -> None:
    for template in (None, "{{ 'always the same' }}"):
        silent = deepcopy(smollm2.tokenizer)
        silent.chat_template = template
        with pytest.raises(DecodeError, match="template"):
            made_up(Loaded(smollm2.model, silent), 1)


def test_a_kept_head_reads_what_it_was_trained_on(tmp_path: Path) -> None:
    head = new_head(target(), [(1, 2, 3)], RECIPE)
    save_head(tmp_path, head, head.caching.shape)
    assert load_head(tmp_path, target()).reads == head.reads


def test_an_untrained_head_speaks_as_loudly_as_the_target(tmp_path: Path) -> None:
    distill(target(), prompts(4), tmp_path, evolve(RECIPE, steps=1, rate=1e-9))
    head, model = load_head(tmp_path, target()), target()
    text = (1, 2, 3, 4, 5, 6)
    said = HeadPredictor(head, FreshFeatures(model, head.reads))(text, ())
    known = said.isfinite()
    own = CachedPredictor(model)(text, ())[known]
    assert 0.3 < float(said[known].std() / own.std()) < 3
