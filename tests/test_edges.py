"""What a predictor returns is what the model's own fresh pass over that prefix returns, or an error says why not."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any, Final, TypeAlias, cast, final
from unittest.mock import Mock

import accelerate  # type: ignore[import-untyped]
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from typing_extensions import override

from specflow import (
    CachedPredictor,
    Categorical,
    DecodeError,
    DecodeState,
    Dice,
    EachPrefix,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    PointMass,
    Proposal,
    SharedNoise,
    SuffixDrafter,
    Tokens,
    autoregressive_generate,
    autoregressive_step,
    beam_search_generate,
    limits_of,
    run,
    seed_coupled_step,
    speculative_generate,
    speculative_step,
    start,
)
from specflow.accelerate import bit_for_bit, fast
from specflow.accelerate.linear import can_halve, is_right, steady_parts, steady_rows
from specflow.batch import BatchPredictor, together
from specflow.drafters import Bigrams
from specflow.interop import new_tokens
from specflow.paths import last_rows
from specflow.policies import EGAG, SVIP, StopAfter
from specflow.predictors import UncachedPredictor
from specflow.predictors.autocast import KINDS
from specflow.predictors.reader import Reader
from specflow.predictors.trial import horizons_of
from specflow.predictors.watch import Findings, Watch
from specflow.protocols import Limits
from specflow.replay.rows import rows_kept, whole
from specflow.state import Finished, Pace, chain
from specflow.testing import fresh_passes
from tests.toys import oracle, passes_of, tiny_gpt2, tiny_llama

OF_PEFT = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TEXT = tuple(torch.randint(3, 64, (60,), generator=torch.Generator().manual_seed(5)).tolist())


def made(kind: str, **more: object) -> PreTrainedModel:
    """A tiny decoder of this kind, with spread-out logits."""
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        **more,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    return model.double().eval()


def fresh(model: Module, tokens: Tokens, last: int) -> Tensor:
    """Each row by a pass of its own prefix, by a copy that has read nothing before."""
    ends = range(len(tokens) - last + 1, len(tokens) + 1)
    with torch.no_grad():
        return torch.cat([deepcopy(model)(torch.tensor([tokens[:end]])).logits[0, -1:] for end in ends])


TREE: Final = (Proposal(4), Proposal(5, parent=-1), Proposal(6, parent=0))
PAIR: Final = (Proposal(4), Proposal(5, parent=-1))


def walk(model: Module, pristine: Module, longest: int = 48) -> None:
    """Reads on, drafts that are rejected, trees, and back: all rows are the fresh ones, with a memo and without."""
    texts = [(*TEXT[:end], 7, 9) for end in (3, 14, 13, longest - 6, longest - 5, 20, longest - 2)]
    expected = []
    for text in texts:
        behind = torch.cat([fresh(pristine, (*text, 4, 6), 2), fresh(pristine, (*text, 5), 1)])
        expected.append((fresh(pristine, text, 3), behind))
    for predict in (CachedPredictor(model), UncachedPredictor(model)):
        for text, (last, behind) in zip(texts, expected, strict=True):
            torch.testing.assert_close(last_rows(predict, text, 3), last, rtol=0, atol=1e-9)
            rows = torch.cat([last[-1:], behind])
            torch.testing.assert_close(predict(text, TREE)[[0, 1, 3, 2]], rows, rtol=0, atol=1e-9)


DYNAMIC: Final = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


Changing: TypeAlias = Any
"""A model whose parts are reached by names that its type does not tell."""


class FromOne(Module):
    """Counts positions from 1, as PaliGemma does, unless it is told them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_gpt2()

    @override
    def forward(
        self,
        input_ids: Tensor,
        cache: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
    ) -> Any:
        covered = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(covered + 1, covered + 1 + input_ids.shape[1])[None]
        return self.inner(input_ids, cache=cache, position_ids=position_ids, use_cache=use_cache)


XLM: Final = {"emb_dim": 32, "n_layers": 2, "n_heads": 4}
ODD: list[tuple[str, Callable[[], Module], str]] = [
    ("roberta", lambda: made("roberta", is_decoder=True, pad_token_id=0), "the whole text afresh"),
    ("positions from 1", FromOne, "any pieces, at positions of its own"),
    ("bert looks ahead", lambda: made("bert"), "each row afresh"),
    ("xlm hides by padding", lambda: made("xlm", **XLM, causal=True, pad_token_id=7), "each row afresh"),
    ("dynamic rope", lambda: made("llama", max_position_embeddings=30, rope_parameters=DYNAMIC), "any pieces"),
    ("dynamic rope, soon", lambda: made("llama", max_position_embeddings=16, rope_parameters=DYNAMIC), "any pieces"),
    ("a window in the config only", lambda: made("llama", sliding_window=8), "the whole text afresh"),
    ("a longer one", lambda: made("llama", sliding_window=37), "any pieces"),
    ("a window that is one", lambda: made("mistral", sliding_window=30, num_key_value_heads=2), "any pieces"),
    ("chunks", lambda: made("llama", attention_chunk_size=35), "any pieces"),
]


@pytest.mark.parametrize(("build", "feeding"), [case[1:] for case in ODD], ids=[case[0] for case in ODD])
def test_a_model_is_tried_and_not_believed_by_its_type(build: Callable[[], Module], feeding: str) -> None:
    model = build()
    pristine = deepcopy(model)
    assert CachedPredictor(model).feeding.name == feeding
    walk(model, pristine)


@pytest.mark.parametrize("kind", ["roberta", "camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta"])
def test_positions_that_do_not_count_from_0(kind: str) -> None:
    model = made(kind, is_decoder=True, pad_token_id=0)
    plain = oracle(TEXT[:10], model, 12)
    assert autoregressive_generate(list(TEXT[:10]), model, 12, eos_tokens_id=[], use_cache=True) == plain
    assert (
        speculative_generate(list(TEXT[:10]), model, model, max_gen_len=12, eos_tokens_id=[], use_cache=True)[0]
        == plain
    )
    assert beam_search_generate(list(TEXT[:10]), model, 12, 1, 1, eos_tokens_id=[]) == plain
    assert limits_of(model).context == 127  # the table's first row is the padding's


def test_frequencies_that_depend_on_the_length_leave_no_mark() -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        model = made("llama", max_position_embeddings=16, rope_parameters=DYNAMIC)
        expected = oracle(TEXT[:5], deepcopy(model), 24)
        target = CachedPredictor(model)
        step = speculative_step(SuffixDrafter(), target, GreedyProcessor(), Dice(), Fixed(4), prune=(target,))
        assert list(run(step, start(TEXT[:5], 24).unwrap()).state.output) == expected


def test_padding_is_among_what_fresh_passes_are_tried_on() -> None:
    model, text = made("xlm", **XLM, causal=True, pad_token_id=7), (*TEXT[:9], 7, 9, 7, 11, 12)
    rows = last_rows(fresh_passes(model, 64, longest=14, tolerance=1e-9), text, 6)
    torch.testing.assert_close(rows, fresh(model, text, 6), rtol=0, atol=1e-9)


def test_horizons_are_read_from_the_config() -> None:
    assert horizons_of(made("llama")) == ()
    assert horizons_of(made("mistral", sliding_window=30, num_key_value_heads=2)) == (30,)
    assert horizons_of(made("llama", max_position_embeddings=30, rope_parameters=DYNAMIC)) == (29, 30)
    assert horizons_of(nn.Linear(2, 2)) == ()


class Own(Module):
    """A model of a user's: no config, no cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Embedding(64, 8).double(), nn.Linear(8, 64).double()
        self.calls = 0

    @override
    def forward(self, input_ids: Tensor) -> object:
        return SimpleNamespace(logits=self.head(self.hidden(input_ids)))

    def hidden(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        return hidden


class Mean(Own):
    """Looks ahead."""

    @override
    def hidden(self, input_ids: Tensor) -> Tensor:
        hidden = super().hidden(input_ids)
        return hidden + hidden.mean(dim=1, keepdim=True)


class Counting(Own):
    """Keeps a state of its own."""

    @override
    def hidden(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        return super().hidden(input_ids) * (1 + 0.1 * self.calls)


def test_a_model_that_looks_ahead_is_read_row_by_row() -> None:
    walk(Mean(), Mean())


def by_one_scale(rows: Tensor) -> Tensor:
    """To 8 bits, by the largest number of a pass."""
    step = rows.abs().amax() / 127
    return (rows / step).round() * step


def row_by_row(rows: Tensor) -> Tensor:
    step = rows.abs().amax(dim=-1, keepdim=True) / 127
    return (rows / step).round() * step


def but_outliers(rows: Tensor) -> Tensor:
    """Columns in which any row has a number beyond 6 are left as they are, as bitsandbytes does it."""
    return torch.where((rows.abs() > 6).flatten(0, -2).any(dim=0), rows, row_by_row(rows))


@final
class Rounding(nn.Linear):
    """A linear layer that quantises what it is given."""

    quantise: Callable[[Tensor], Tensor]

    @override
    def forward(self, input: Tensor) -> Tensor:
        assert not self.training
        return super().forward(self.quantise(input))


def rounding(quantise: Callable[[Tensor], Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """A model the last of whose linear layers is one, in training mode."""
    model = tiny_llama(dtype=dtype)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    layer.__class__ = Rounding
    layer.quantise = quantise  # type: ignore[assignment]
    return model.train()


@pytest.mark.parametrize("predictor", [CachedPredictor, UncachedPredictor, BatchPredictor])
@pytest.mark.parametrize("quantise", [by_one_scale, but_outliers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_whose_rows_depend_on_each_other_is_refused(
    predictor: Callable[[Module], CachedPredictor | UncachedPredictor | BatchPredictor],
    quantise: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    """In bf16 whole passes differ no more than by rounding, so the trial would not see it."""
    model, drawn = rounding(quantise, dtype), torch.get_rng_state()
    with pytest.raises(DecodeError, match=r"a row of model.layers.1.mlp.down_proj depends on the others in its pass"):
        predictor(model)((1, 2), ())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())


def test_a_layer_that_quantises_row_by_row_is_read() -> None:
    predictor = CachedPredictor(rounding(row_by_row, torch.bfloat16))
    assert predictor((1, 2), chain((3,))).isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_torch_quantises_dynamically_is_refused() -> None:
    """It has one scale for all rows."""
    from torch.ao.quantization import quantize_dynamic  # noqa: PLC0415

    model = quantize_dynamic(tiny_llama(dtype=torch.float32), {nn.Linear})  # type: ignore[no-untyped-call]
    with pytest.raises(DecodeError, match=r"a row of model.layers.0.self_attn.q_proj .*: received Linear; quantize"):
        CachedPredictor(model)((1, 2), ())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("predictor", [CachedPredictor, UncachedPredictor, BatchPredictor])
def test_what_is_quantised_after_it_was_read_is_refused(
    predictor: Callable[[Module], CachedPredictor | UncachedPredictor | BatchPredictor],
) -> None:
    """By who read it before, and by who comes later."""
    from torch.ao.quantization import quantize_dynamic  # noqa: PLC0415

    model = tiny_llama(dtype=torch.float32)
    before = predictor(model)
    assert before((1, 2, 3), ()).isfinite().all()
    quantize_dynamic(model, {nn.Linear}, inplace=True)  # type: ignore[no-untyped-call]
    for reader in (before, before, predictor(model)):
        with pytest.raises(DecodeError, match=r"a row of model.layers.0.self_attn.q_proj depends on the others"):
            reader((1, 2, 3, 4), ())


class Odd(Tensor):
    """A kind of tensor of its own."""


def test_weights_that_become_of_another_kind_are_tried_again_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[Module]()
    monkeypatch.setattr("specflow.predictors.trial.refuse_company", lambda reader: asked.append(reader.model))
    model = tiny_llama()
    predictor, layer = CachedPredictor(model), model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, nn.Linear)
    predictor((1, 2), ())
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    predictor((1, 2), ())
    assert len(asked) == 1
    assert predictor._reader.watch.has_plain_weights
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Odd))
    predictor((1, 2), ())
    assert len(asked) == 2
    assert not predictor._reader.watch.has_plain_weights


@pytest.mark.parametrize("predictor", [CachedPredictor, UncachedPredictor])
def test_what_is_no_function_of_the_tokens_is_refused_before_any_text(
    predictor: Callable[[Module], CachedPredictor | UncachedPredictor],
) -> None:
    with pytest.raises(DecodeError, match="depend on what it read before: received Counting; give a function"):
        predictor(Counting())((1, 2), ())
    seq2seq = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(DecodeError, match="the model is an encoder-decoder: received T5ForConditionalGeneration"):
        predictor(seq2seq)
    with pytest.raises(DecodeError, match=r"cannot read ids alone .*: received Linear"):
        predictor(nn.Linear(2, 2))((1, 2), ())
    with torch.device("meta"):
        nowhere = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(DecodeError, match="the model has no weights: received parameters on the meta device"):
        predictor(nowhere)
    with pytest.raises(DecodeError, match="the model is no torch module: received None"):
        predictor(None)  # type: ignore[arg-type]
    with pytest.raises(DecodeError, match="the model is no torch module: received <class"):
        predictor(GPT2LMHeadModel)  # type: ignore[arg-type]


@pytest.mark.parametrize("predictor", [CachedPredictor, UncachedPredictor])
@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ((), ()), (None, ()), ("12", ()), ((1, -1), ()), ((1, 64), ()), ((1, 2**40), ()), ((1, "a"), ()),
        ((1, 1.5), ()), ((1, None), ()), ((1, torch.tensor(2)), ()),
        ((1, 2), None), ((1, 2), 1), ((1, 2), True), ((1, 2), 1.0), ((1, 2), (3,)), ((1, 2), "34"),
        ((1, 2), (Proposal(-1),)), ((1, 2), (Proposal(64),)), ((1, 2), (Proposal(2**40),)),
        ((1, 2), (Proposal("a"),)), ((1, 2), (Proposal(1.5),)), ((1, 2), (Proposal(torch.tensor(2)),)),  # type: ignore[arg-type]
        ((1, 2), (Proposal(1), Proposal(64, parent=-1))), ((1, 2), (Proposal(1), Proposal(None, parent=-1))),  # type: ignore[arg-type]
        ((1, 2), (Proposal(1, parent=0),)), ((1, 2), (Proposal(1, parent=-3),)), ((1, 2), (Proposal(1, parent=None),)),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_texts_and_drafts_that_are_none_are_refused(
    predictor: Callable[[Module], CachedPredictor | UncachedPredictor], tokens: object, drafts: object
) -> None:
    predict = predictor(tiny_llama())
    with pytest.raises(DecodeError):
        predict(tokens, drafts)  # type: ignore[arg-type]


def test_a_config_that_answers_anything_is_no_encoder_decoder() -> None:
    model = Own()
    model.config = Mock()
    assert autoregressive_generate([3, 4], model, 4, eos_tokens_id=[]) == oracle([3, 4], Own(), 4)


def test_the_vocabulary_is_what_the_model_reads_and_writes() -> None:
    model = made("llama")
    model.lm_head = nn.Linear(32, 90, bias=False).double()  # wider than the embedding
    assert limits_of(model).vocab_size == 64
    assert CachedPredictor(model)(TEXT[:9], chain((3,))).shape == (2, 90)
    with pytest.raises(DecodeError, match="outside the vocabulary of 64: received 70"):
        CachedPredictor(model)((1, 70), ())
    with pytest.raises(DecodeError, match="outside the vocabulary of 64: received 70"):
        CachedPredictor(model)((1,), chain((70,)))
    model.config.vocab_size = 1000
    assert limits_of(model).vocab_size == 64


@pytest.mark.parametrize("predictor", [CachedPredictor, UncachedPredictor, BatchPredictor])
def test_a_vocabulary_that_was_resized_is_the_one_that_there_is(
    predictor: Callable[[Module], CachedPredictor | UncachedPredictor | BatchPredictor],
) -> None:
    model: Changing = tiny_llama()
    predict = predictor(model)
    predict(TEXT[:9], ())
    model.resize_token_embeddings(80, mean_resizing=False)
    assert predict.limits.vocab_size == 80
    text = (*TEXT[:9], 70)
    torch.testing.assert_close(predict(text, chain((75,))), fresh(model, (*text, 75), 2), rtol=0, atol=1e-9)
    model.resize_token_embeddings(60, mean_resizing=False)
    with pytest.raises(DecodeError, match="outside the vocabulary of 60: received 70"):
        predict(text, ())
    assert predict.limits.vocab_size == 60


def test_a_trial_of_trees_that_failed_does_not_stick() -> None:
    model: Any = tiny_llama()
    spoiled = deepcopy(model)
    hook = spoiled.model.layers[0].register_forward_pre_hook(_refuse_trees, with_kwargs=True)
    predict = CachedPredictor(spoiled)
    predict(TEXT[:9], TREE)
    fed = passes_of(spoiled)
    hook.remove()
    assert torch.allclose(predict(TEXT[:10], TREE), CachedPredictor(model)(TEXT[:10], TREE))
    fed.clear()
    predict(TEXT[:11], TREE)
    assert fed == [1 + len(TREE)]


def _refuse_trees(module: Module, inputs: tuple[object, ...], arguments: dict[str, object]) -> None:
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor) and len({*positions.flatten().tolist()}) < positions.numel():
        raise RuntimeError("no trees, please")


def lora(dropout: float = 0.0) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=dropout
    )


def adapted() -> Changing:
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(tiny_llama(), lora())
    model.add_adapter("b", lora())
    return model.double().eval()


def step_of_an_optimizer(model: Changing) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([TEXT[:8]])).logits.square().mean().backward()
    optimizer.step()


def other_weights(model: Changing) -> None:
    model.load_state_dict(tiny_llama(9).state_dict())


def assigned_weights(model: Changing) -> None:
    model.load_state_dict(tiny_llama(9).state_dict(), assign=True)


def written(model: Changing) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1)


def swapped(model: Changing) -> None:
    model.model.layers[0].self_attn.k_proj.weight.data = -model.model.layers[0].self_attn.k_proj.weight.data


def replaced(model: Changing) -> None:
    model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(-model.model.layers[0].self_attn.k_proj.weight)


def another_layer(model: Changing) -> None:
    other: Any = tiny_llama(9)
    model.model.layers[0] = other.model.layers[0]


def another_dtype(model: Changing) -> None:
    model.float()


def steered(model: Changing) -> None:
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + 1.0)


def scaled(model: Changing) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 3.0


def partly_of_inference_mode() -> Changing:
    model: Changing = tiny_llama()
    with torch.inference_mode():
        model.model.norm.weight = nn.Parameter(torch.ones(32, dtype=torch.float64), requires_grad=False)
    return model


def swapped_in_inference_mode(model: Changing) -> None:
    with torch.inference_mode():
        other = nn.Parameter(-model.model.layers[0].self_attn.k_proj.weight, requires_grad=False)
    torch.utils.swap_tensors(model.model.layers[0].self_attn.k_proj.weight, other)  # type: ignore[no-untyped-call]


class Growing(nn.SiLU):
    """An activation that makes use of whatever is put into it."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        for child in self.children():
            output = child(output)
        for shift in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            output = output + shift
        return output


def growing() -> Changing:
    model: Changing = tiny_llama()
    model.model.layers[0].mlp.act_fn = Growing()
    return model


def a_module_more(model: Changing) -> None:
    model.model.layers[0].mlp.act_fn.add_module("more", nn.Tanh())


def a_parameter_more(model: Changing) -> None:
    model.model.layers[0].mlp.act_fn.register_parameter("more", nn.Parameter(torch.ones(48)))


def a_buffer_more(model: Changing) -> None:
    model.model.layers[0].mlp.act_fn.register_buffer("more", torch.ones(48))


class Likewise(nn.Linear):
    """A linear layer that is not known to be one."""


@contextmanager
def elsewhere() -> Iterator[None]:
    """torch makes tensors by default where nothing can be computed."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


WIDE: Final = Categorical(torch.randn(1000, generator=torch.Generator().manual_seed(0)).softmax(-1))


def everything(model: PreTrainedModel, helper: PreTrainedModel) -> list[object]:
    """What steps, batches, beams and accelerated models say."""
    for found in (is_right, steady_rows, steady_parts, can_halve):
        found.cache_clear()
    text, drafts = [3, 4, 5, 3, 4, 5, 3], (Proposal(5), Proposal(6, parent=-1), Proposal(7, parent=0))
    target, law, dice = CachedPredictor(model), MultinomialProcessor(1.0), Dice(torch.Generator().manual_seed(0))
    steps = (
        autoregressive_step(target, GreedyProcessor(), dice),
        speculative_step(SuffixDrafter(), target, law, dice),
        speculative_step(LLMDrafter(CachedPredictor(helper), law, dice), target, law, dice),
        speculative_step(LLMDrafter(CachedPredictor(helper), law, dice, widths=(2,)), target, law, dice, EGAG()),
        seed_coupled_step(SuffixDrafter(), target, law, SharedNoise(3)),
        seed_coupled_step(
            LLMDrafter(CachedPredictor(helper), law, SharedNoise(3)), target, law, SharedNoise(3), StopAfter(SVIP())
        ),
    )
    batched = BatchPredictor(helper)
    asked = [partial(batched, (1, 2, 3), drafts), partial(batched, (7, 8), ()), partial(batched, (9,), drafts[:1])]
    rows = dict(together(asked, 3))
    accelerated = [CachedPredictor(make(helper)) for make in (fast, bit_for_bit)]
    return [
        *[run(step, start(text, 12).unwrap()).state.output for step in steps],
        beam_search_generate(text, helper, max_gen_len=4),
        *[cast("Tensor", rows[number]).argmax(-1).tolist() for number in sorted(rows)],
        *[last_rows(predict, tuple(text), 3).argmax(-1).tolist() for predict in accelerated],
        [SharedNoise(1).draw(WIDE, position) for position in range(300)],
        Bigrams.of(CachedPredictor(helper), (3,), helper.config.vocab_size, k=2).after((5,)),
    ]


def test_where_torch_makes_tensors_by_default_does_not_matter() -> None:
    first, second = ((tiny_llama(dtype=torch.float32), tiny_llama(3, dtype=torch.float32)) for _ in range(2))
    for model, _ in (first, second):
        model.get_submodule("model.layers.0.mlp.up_proj").__class__ = Likewise
    expected = everything(*first)
    with elsewhere():
        assert everything(*second) == expected


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    """torch makes tensors of this dtype by default, as while a thread loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_of_what_dtype_torch_makes_tensors_by_default_does_not_matter(dtype: torch.dtype) -> None:
    first, second = ((tiny_llama(dtype=torch.float32), tiny_llama(3, dtype=torch.float32)) for _ in range(2))
    for model, _ in (first, second):
        model.get_submodule("model.layers.0.mlp.up_proj").__class__ = Likewise
    expected = everything(*first)
    with by_default(dtype):
        assert everything(*second) == expected


def test_noise_makes_no_token_of_probability_0() -> None:
    """In fp16 noise is 0 now and then, at these positions too, and 0 / 0 is the largest of all."""
    probs = torch.zeros(300_000)
    probs[:2] = 0.5
    with by_default(torch.float16):
        assert all(SharedNoise(1).draw(Categorical(probs), position) < 2 for position in (188, 195, 225))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_recorded_row_is_as_fine_as_it_was_kept(dtype: torch.dtype) -> None:
    rows = rows_kept(WIDE.probs.log()[None], 10)
    expected = whole(rows[0], 1000)
    with by_default(dtype):
        assert torch.equal(whole(rows[0], 1000), expected)


CHANGES: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (tiny_llama, step_of_an_optimizer),
    (tiny_llama, other_weights),
    (tiny_llama, assigned_weights),
    (tiny_llama, written),
    (tiny_llama, swapped),
    (tiny_llama, replaced),
    (tiny_llama, another_layer),
    (tiny_llama, another_dtype),
    (tiny_llama, steered),
    (growing, a_module_more),
    (growing, a_parameter_more),
    (growing, a_buffer_more),
    (partly_of_inference_mode, written),
    (tiny_llama, swapped_in_inference_mode),
    (adapted, lambda model: model.set_adapter("b")),
    (adapted, lambda model: model.disable_adapter_layers()),
    (adapted, lambda model: model.delete_adapter("default")),
    (adapted, scaled),
]


@OF_PEFT
@pytest.mark.parametrize(("build", "change"), CHANGES)
def test_what_changes_under_a_predictor_is_noticed(build: Callable[[], Any], change: Callable[[Any], object]) -> None:
    model = build()
    kept = CachedPredictor(model)
    before = last_rows(kept, TEXT[:12], 2)
    kept(TEXT[:12], PAIR)
    change(model)
    after, tree = last_rows(kept, TEXT[:14], 2), kept(TEXT[:15], PAIR)
    expected = UncachedPredictor(model)
    torch.testing.assert_close(after, last_rows(expected, TEXT[:14], 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(tree, expected(TEXT[:15], PAIR), rtol=0, atol=1e-4)
    other = last_rows(UncachedPredictor(model), TEXT[:12], 2)
    assert before.dtype != other.dtype or not torch.allclose(before, other, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_noticed_on_every_kind_of_device(kind: str) -> None:
    watch, was = Watch(tiny_llama()), torch.is_autocast_enabled(kind)
    before = watch.look()
    torch.set_autocast_enabled(kind, not was)
    try:
        assert not watch.look().same(before)
    finally:
        torch.set_autocast_enabled(kind, was)
    assert watch.look().same(before)


@OF_PEFT
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_that_come_and_go_by_one_name_are_others(dropout: float) -> None:
    """Added to where others are, and in training mode."""
    model = adapted()
    predictors = CachedPredictor(model), UncachedPredictor(model)
    for seed in (1, 2):
        for predict in predictors:
            predict(TEXT[:12], ())
        torch.manual_seed(seed)
        model.add_adapter("user", lora(dropout))
        model.double().set_adapter("user")
        expected = fresh(deepcopy(model).eval(), TEXT[:12], 1)
        for predict in predictors:
            torch.testing.assert_close(predict(TEXT[:12], ()), expected, rtol=0, atol=1e-9)
        model.set_adapter("default")
        model.delete_adapter("user")


def test_what_cannot_be_noticed_is_forgotten_on_demand() -> None:
    model: Any = tiny_llama()
    kept = CachedPredictor(model)
    kept(TEXT[:12], ())
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1)
    kept.forget()
    expected = last_rows(UncachedPredictor(model), TEXT[:14], 2)
    torch.testing.assert_close(last_rows(kept, TEXT[:14], 2), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("predictor", [CachedPredictor, UncachedPredictor])
def test_a_config_that_was_changed_is_read_again_on_demand(
    predictor: Callable[[Module], CachedPredictor | UncachedPredictor],
) -> None:
    """A window that begins after what was read first: beyond it the model is tried anew, and `forget` sees to it."""
    torch.manual_seed(0)
    model: Any = made("mistral", sliding_window=None, num_key_value_heads=2).double()
    kept = predictor(model)
    kept(TEXT[:12], ())
    model.config.sliding_window = 40
    if isinstance(kept, CachedPredictor):
        kept.forget()
    kept(TEXT[:12], ())
    assert kept._trials.horizons == (40,)


@OF_PEFT
def test_dropout_of_any_submodule_is_off() -> None:
    model: Any = peft.get_peft_model(tiny_llama(), lora()).eval()
    model.add_adapter("second", lora(0.5))
    model.set_adapter("second")
    model = model.double()
    assert not model.training
    modes = [module.training for module in model.modules()]
    assert any(modes)
    texts = [autoregressive_generate(list(TEXT[:8]), model, 10, eos_tokens_id=[], use_cache=True) for _ in range(3)]
    assert [module.training for module in model.modules()] == modes
    assert texts == [oracle(TEXT[:8], model.eval(), 10)] * 3


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(work: Callable[[int], object], count: int) -> list[object]:
    """What the work of each thread came to: its result, or its exception."""
    found: list[object] = [None] * count

    def caught(i: int) -> None:
        try:
            found[i] = work(i)
        except Exception as error:
            found[i] = error

    with switching_often():
        threads = [threading.Thread(target=caught, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def test_the_mode_that_one_thread_puts_back_is_not_anothers() -> None:
    model = tiny_gpt2().train()
    wanted = [oracle(TEXT[i : i + 4], tiny_gpt2(), 16) for i in range(3)]
    texts = in_threads(
        lambda i: autoregressive_generate(list(TEXT[i : i + 4]), model, 16, eos_tokens_id=[], use_cache=True), 3
    )
    assert texts == wanted
    assert all(module.training for module in model.modules())


def test_a_pass_that_waited_for_another_evaluates_too() -> None:
    model, modes = tiny_llama().train(), list[bool]()
    model.register_forward_pre_hook(lambda module, arguments: modes.append(module.training))
    with ThreadPoolExecutor() as pool:
        with Reader.of(model).at_rest():
            waiting = pool.submit(Reader.of(model).read_afresh, (5, 9), 1)
            sleep(0.2)  # it has come to the lock
        waiting.result()
    assert modes == [False]
    assert all(module.training for module in model.modules())


def test_limits_do_not_wait_for_a_pass() -> None:
    model = tiny_llama()
    predict = CachedPredictor(model)
    with ThreadPoolExecutor() as pool, Reader.of(model).guard:
        assert pool.submit(lambda: predict.limits).result(timeout=30) == limits_of(model)


@pytest.mark.parametrize("predictor", [CachedPredictor, UncachedPredictor])
def test_what_is_known_of_a_model_is_not_looked_for_in_all_its_modules(
    predictor: Callable[[Module], CachedPredictor | UncachedPredictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    predict = predictor(model)
    predict(TEXT[:9], ())
    monkeypatch.setattr(Module, "named_modules", Mock(side_effect=AssertionError))
    predict(TEXT[:10], ())
    assert predict.limits == Limits(64, 128)


def test_what_is_found_out_while_the_model_changes_is_found_out_anew() -> None:
    model: Any = nn.Linear(2, 2)
    findings = Findings[bool](lambda found: False)

    def find() -> bool:
        with torch.no_grad():
            model.weight.mul_(2)
        return findings.of(model, ("another",), Watch(model).look(), lambda: False) or True

    assert findings.of(model, ("one",), Watch(model).look(), find)
    assert not findings.of(model, ("one",), Watch(model).look(), lambda: False)


@pytest.mark.parametrize("memos", [1, 2, 4])
def test_threads_share_a_predictor(memos: int) -> None:
    model = tiny_llama()
    target = CachedPredictor(model, memos=memos)
    step = speculative_step(SuffixDrafter(), target, GreedyProcessor(), Dice(), Fixed(4), prune=(target,))
    prompts = [TEXT[:9] * 2, TEXT[4:20], TEXT[:9] + TEXT[30:40]]

    def texts(i: int) -> list[Tokens]:
        return [run(step, start(prompts[i], 16).unwrap()).state.output for _ in range(4)]

    assert in_threads(texts, 3) == [[tuple(oracle(prompt, model, 16))] * 4 for prompt in prompts]


def test_asynchronous_decodes_share_a_predictor() -> None:
    model = tiny_llama()
    target = CachedPredictor(model)
    step = autoregressive_step(target, GreedyProcessor(), Dice())
    prompts = [TEXT[:9], TEXT[4:20], TEXT[30:40]]

    async def text(prompt: Tokens) -> list[int]:
        return [token async for new in new_tokens(step, start(prompt, 12).unwrap()) for token in new]

    async def texts() -> list[list[int]]:
        return await asyncio.gather(*map(text, prompts))

    assert asyncio.run(texts()) == [oracle(prompt, model, 12) for prompt in prompts]


def test_conversations_in_turns_are_not_read_again() -> None:
    model = tiny_llama(context=512)
    fed, predict = passes_of(model), CachedPredictor(model)
    shared = TEXT * 3
    texts = [shared[:150] + TEXT[i::3] * 4 for i in range(3)]
    for text in texts:
        predict(text[:190], ())
    fed.clear()
    for end in range(191, 200):
        for text in texts:
            predict(text[:end], ())
    assert fed == [1] * 27


def test_no_more_memos_are_kept_than_were_asked_for() -> None:
    predict = CachedPredictor(tiny_llama(context=512), memos=2)
    for i in range(5):
        predict(TEXT[i:] * 2, ())
        assert len(predict._memos._kept) <= 2
    predict.forget()
    assert predict._memos._kept == []


@pytest.mark.parametrize("memos", [0, -1, 1.5, None, "2", True])
def test_the_number_of_memos_is_one_or_more(memos: object) -> None:
    with pytest.raises(DecodeError, match="memos is"):
        CachedPredictor(tiny_llama(), memos=memos)  # type: ignore[arg-type]


def test_offloaded_models(tmp_path: Path) -> None:
    model = made("llama")
    expected = oracle(TEXT[:8], model, 6)
    on_disk = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    model.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float64,
        device_map={**on_disk, "model.rotary_emb": "cpu"},
        offload_folder=tmp_path / "off",
    )
    off = accelerate.cpu_offload(deepcopy(model), execution_device=torch.device("cpu"))
    for each in (mapped, off):
        assert next(each.parameters()).is_meta
        assert autoregressive_generate(list(TEXT[:8]), each, 6, eos_tokens_id=[]) == expected
        assert (
            speculative_generate(list(TEXT[:8]), each, each, gamma=3, max_gen_len=6, eos_tokens_id=[], use_cache=True)[
                0
            ]
            == expected
        )
        assert beam_search_generate(list(TEXT[:8]), each, 6, 1, 1, eos_tokens_id=[]) == expected


class Counted(LlamaForCausalLM):
    """A model whose objects are counted."""


def living() -> int:
    gc.collect()
    return sum(type(each) is Counted for each in gc.get_objects())


@pytest.mark.filterwarnings("ignore:some texts")
@pytest.mark.parametrize("predictor", [CachedPredictor, BatchPredictor])
def test_a_forward_of_the_models_own_is_neither_copied_nor_keeps_it(
    predictor: Callable[..., CachedPredictor | BatchPredictor],
) -> None:
    model: Changing = tiny_llama()
    model.__class__ = Counted
    predict = predictor(accelerate.cpu_offload(model, execution_device=torch.device("cpu")), features=(1,))
    first, second = TEXT[:30], (*TEXT[:2], *TEXT[40:55])
    predict(first, ())
    rows = predict(second, ())  # goes on with a copy of what was read of the first
    assert living() == 1
    assert predict.features(second, 2).shape == (2, 32)
    torch.testing.assert_close(rows, UncachedPredictor(tiny_llama())(second, ()), rtol=0, atol=1e-9)
    del predict, model
    assert living() == 0


def inner(model: Module) -> Module:
    """The model within one that has a head: accelerate replaces the `forward` of the whole."""
    found = model.model
    assert isinstance(found, Module)
    return found


def test_a_model_that_is_not_on_the_host_drafts_as_one_that_is() -> None:
    """By whatever policy and processor; and it reads no further than the text has room for."""
    model = made("llama")
    off = accelerate.cpu_offload(deepcopy(model), execution_device=torch.device("cpu"))
    taken: list[int] = []
    passes: list[Module] = []

    def eight(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Pace]:
        proposals = tuple(islice(stream, 8))
        taken.append(len(proposals))
        return proposals, state.pace

    for drafter in (model, off):
        decode: Any = partial(speculative_generate, list(TEXT[:8]), drafter, model, eos_tokens_id=[], use_cache=True)
        law = EachPrefix(lambda prefix, logits: PointMass(int(logits.argmax())))
        assert decode(logits_processor=law, max_gen_len=6)[0] == oracle(TEXT[:8], model, 6)
        assert decode(logits_processor=law, max_gen_len=6, use_egag=True)[0] == oracle(TEXT[:8], model, 6)
        taken.clear()
        decode(max_gen_len=19, policy=eight)  # the first of them is not drafted
        assert taken == [8, 8]
        handle = inner(drafter).register_forward_pre_hook(lambda module, given: passes.append(module))
        decode(max_gen_len=4)  # the hook made another model of it, which is tried
        passes.clear()
        decode(max_gen_len=4, gamma=100)
        handle.remove()
        assert len(passes) <= 8


@OF_PEFT
def test_soft_prompts_are_read() -> None:
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ):
        model: Any = peft.get_peft_model(tiny_llama(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.5)
        model = model.double().eval()
        expected = oracle(TEXT[:8], model, 8)
        assert expected != oracle(TEXT[:8], tiny_llama(), 8)
        assert autoregressive_generate(list(TEXT[:8]), model, 8, eos_tokens_id=[], use_cache=True) == expected
        assert beam_search_generate(list(TEXT[:8]), model, 8, 1, 1, eos_tokens_id=[]) == expected


SoftPrompt: TypeAlias = peft.PromptTuningConfig | peft.PrefixTuningConfig
SOFT: Final = [peft.PromptTuningConfig, peft.PrefixTuningConfig]


def soft(model: PreTrainedModel, config: SoftPrompt) -> Changing:
    """The model behind a soft prompt of random vectors."""
    prompted: Any = peft.get_peft_model(model, config)
    for parameter in prompted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5)
    return prompted.double().eval()


@OF_PEFT
@pytest.mark.parametrize("config", SOFT)
@pytest.mark.parametrize("original", [6, 11, 21])
def test_behind_a_soft_prompt_a_horizon_comes_sooner(config: type[SoftPrompt], original: int) -> None:
    base = made("llama", max_position_embeddings=original, rope_parameters=DYNAMIC)
    model = soft(deepcopy(base), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert horizons_of(model) == (original - 4, original - 3)
    walk(model, deepcopy(model))
    with model.disable_adapter():
        assert horizons_of(model) == (original - 1, original)
        walk(model, base)


@OF_PEFT
@pytest.mark.parametrize("config", SOFT)
def test_a_soft_prompt_takes_room_in_the_context(config: type[SoftPrompt]) -> None:
    model = soft(tiny_gpt2(context=16), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert limits_of(model).context == 13
    torch.testing.assert_close(last_rows(CachedPredictor(model), TEXT[:13], 2), fresh(model, TEXT[:13], 2))
    with pytest.raises(DecodeError, match="no embedding for one of 14 tokens or their positions"):
        CachedPredictor(model)(TEXT[:14], ())
    predict = CachedPredictor(model)
    assert predict.limits.context == 13
    with model.disable_adapter():
        assert predict.limits.context == 16
        torch.testing.assert_close(predict(TEXT[:16], ()), fresh(tiny_gpt2(context=16), TEXT[:16], 1))
    assert predict.limits.context == 13


@OF_PEFT
@pytest.mark.parametrize("virtual", [5, 6, 7])
def test_frequencies_that_a_soft_prompt_lets_no_text_put_back_are_refused(virtual: int) -> None:
    base = made("llama", max_position_embeddings=6, rope_parameters=DYNAMIC)
    model = soft(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual))
    with pytest.raises(DecodeError, match="logits depend on what it read before"):
        CachedPredictor(model)(TEXT[:9], ())


@OF_PEFT
def test_what_was_read_without_a_soft_prompt_is_not_read_again() -> None:
    """Each time that it is disabled the model has another bound method for its forward, which is the same one."""
    model = soft(tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    predict, fed = CachedPredictor(model), list[int]()
    layer = model.base_model.get_submodule("model.layers.0")
    layer.register_forward_pre_hook(lambda module, given: fed.append(given[0].shape[1]))
    for end in (12, 13, 14):
        predict(TEXT[:end], ())
        fed.clear()
        with model.disable_adapter():
            predict(TEXT[:end], ())
    assert fed == [1]


def test_a_text_longer_than_the_table_of_positions_is_an_error_of_one_sentence() -> None:
    model = tiny_gpt2(context=16)
    with pytest.raises(DecodeError, match="the model has no embedding for one of 20 tokens or their positions"):
        CachedPredictor(model)(TEXT[:20], ())
    step = autoregressive_step(CachedPredictor(model), GreedyProcessor(), Dice())
    end = run(step, start(TEXT[:5], 40, limits=limits_of(model)).unwrap())
    assert isinstance(end, Finished)
    assert len(end.state.tokens) == 16
