"""Random tiny models and scripts: every row is the model's own fresh pass of its prefix, or an error says why not.

python -m benchmarks.random_models                            # 2,000 models, one line for each violation, exit code 1
python -m benchmarks.random_models --first 417 --models 1     # one of them again
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from random import Random
from time import perf_counter
from typing import Final, TypeAlias, final

import peft
import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Embedding, Linear, Module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging
from typing_extensions import override

from specflow import CachedPredictor, DecodeError, limits_of
from specflow.state import Predictor, Proposal, Tokens
from specflow.testing import Conformance, conformance, fresh_passes, through_trees
from tests.architectures import ARCHITECTURES, DOUBLE, Architecture
from tests.toys import VOCABULARY

FAILED: Final = "no fresh pass"
"""Not a finding: the model that came out cannot be built, or read, at all, and another is drawn."""

Change: TypeAlias = Callable[[Random, dict[str, object]], str]
"""Changes the arguments of a config in one way, and says how."""


@final
@frozen(eq=False)
class Sample:
    """A model, what it is, and the texts that it reads: ids below `vocab_size`, up to `longest`."""

    name: str
    model: Module
    vocab_size: int
    longest: int
    dtype: torch.dtype
    often: Tokens


@final
@frozen
class Outcome:
    """What became of one: `kind` is "conforming", "refused" or "violation"; `reason` is what was said or found."""

    seed: int
    name: str
    kind: str
    reason: str = ""

    @override
    def __str__(self) -> str:
        return f"{self.kind} --first {self.seed} --models 1: {self.name}: {self.reason}"


# Configs


def _windows(random: Random, config: dict[str, object]) -> str:
    """A window that the model may have, or that stands in the config only."""
    config["sliding_window"] = random.randint(2, 20)
    if random.random() < 0.5:
        config["use_sliding_window"] = True
        config["max_window_layers"] = random.randint(0, 1)
    if random.random() < 0.4:
        layers = config.get("num_hidden_layers")
        count = layers if isinstance(layers, int) else 2
        config["layer_types"] = random.choices(["sliding_attention", "full_attention"], k=count)
    return f"window {config['sliding_window']} {config.get('layer_types', '')}"


def _rope(random: Random, config: dict[str, object]) -> str:
    """Rotations scaled in one of transformers' ways, from an original context that the texts go past."""
    kind = random.choice(["default", "linear", "dynamic", "dynamic", "yarn", "longrope", "longrope", "llama3"])
    partial = random.random() < 0.3
    original, factor = random.randint(6, 24), random.choice([1.5, 2.0, 4.0, 8.0])
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": random.choice([100.0, 10000.0])}
    if kind != "default":
        rope["factor"] = factor
    if kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = original
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        hidden, heads = config.get("hidden_size", 32), config.get("num_attention_heads", 4)
        assert isinstance(hidden, int)
        assert isinstance(heads, int)
        size = config.get("head_dim", hidden // heads)
        assert isinstance(size, int)
        turned = size // 4 if partial else size // 2
        rope["short_factor"] = [1.0 + random.random() for _ in range(turned)]
        rope["long_factor"] = [2.0 + 4 * random.random() for _ in range(turned)]
    if kind in ("dynamic", "linear"):
        config["max_position_embeddings"] = original
    if partial:
        rope["partial_rotary_factor"] = 0.5
    config["rope_parameters"] = rope
    return f"{kind} rope {original} x{factor:g}"


def _sizes(random: Random, config: dict[str, object]) -> str:
    layers = random.randint(1, 3)
    if "layer_types" not in config and "num_hidden_layers" in config:
        config["num_hidden_layers"] = layers
    heads = random.choice([2, 4, 8])
    if "num_attention_heads" in config and "kv_lora_rank" not in config:
        config["num_attention_heads"] = heads
        config["num_key_value_heads"] = random.choice([size for size in (1, 2, 4, 8) if heads % size == 0])
    return f"{layers} layers, {heads} heads"


def _vocabulary(random: Random, config: dict[str, object]) -> str:
    config["vocab_size"] = random.choice([17, 40, 99])
    return f"{config['vocab_size']} ids"


def _context(random: Random, config: dict[str, object]) -> str:
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    name = next((name for name in names if name in config), names[0])
    config[name] = random.choice([12, 24, 40])
    return f"context {config[name]}"


def _tied(random: Random, config: dict[str, object]) -> str:
    config["tie_word_embeddings"] = tied = random.random() < 0.5
    return "tied" if tied else "untied"


def _special(random: Random, config: dict[str, object]) -> str:
    for name in ("pad", "bos", "eos"):
        config[f"{name}_token_id"] = random.choice([None, 0, 1, 2, 3])
    return f"pad {config['pad_token_id']}"


def _both_ways(random: Random, config: dict[str, object]) -> str:
    config["is_causal"] = False
    return "not causal"


def _biases(random: Random, config: dict[str, object]) -> str:
    for name in ("attention_bias", "mlp_bias", "use_qkv_bias", "bias"):
        config[name] = random.random() < 0.5
    config["attention_dropout"] = random.choice([0.0, 0.5])
    return "biases and dropout"


CHANGES: Final[tuple[tuple[float, Change], ...]] = (
    (0.4, _sizes),
    (0.25, _vocabulary),
    (0.3, _windows),
    (0.4, _rope),
    (0.25, _context),
    (0.2, _tied),
    (0.3, _special),
    (0.06, _both_ways),
    (0.15, _biases),
)
"""How often each way to change a config is taken."""

# Models beside the decoders

_ENCODER: Final[dict[str, object]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "embedding_size": 16,
    "rotary_value": False,
    "attention_type": "original_full",
    "languages": ["en_XX"],
    "default_language": "en_XX",
}
ENCODERS: Final = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Encoders that have heads of language models."""

_SEQ2SEQ: Final[dict[str, object]] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_heads": 4,
    "hidden_size": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "ngram": 2,
}
DECODER_HALVES: Final = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("prophetnet", "trocr", "whisper"),
)
"""Encoder-decoder models whose decoder is also a model of its own."""

WHOLES: Final = ("bart", "mbart", "t5", "mt5", "longt5", "pegasus", "blenderbot-small", "m2m_100", "fsmt")
"""Encoder-decoder models as a whole."""

_XLNET: Final[dict[str, object]] = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
_XLM: Final[dict[str, object]] = {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "dropout": 0.0}

OTHERS: Final = (
    Architecture("xlnet", _XLNET | {"dropout": 0.0}),
    Architecture("xlnet", _XLNET | {"dropout": 0.0, "mem_len": 8}),
    Architecture("xlm", _XLM),
    Architecture("xlm", _XLM | {"causal": True}),
    Architecture("flaubert", _XLM),
    Architecture(
        "cpmant",
        _ENCODER | {"dim_head": 8, "dim_ff": 48, "prompt_length": 4, "prompt_types": 2, "segment_types": 2},
    ),
)

_TEXT: Final[dict[str, object]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_VISION: Final[dict[str, object]] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
}
_MROPE: Final = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MARKS: Final = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
SEEING: Final[dict[str, dict[str, object]]] = {
    "paligemma": {
        "text_config": _TEXT | {"model_type": "gemma"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "image_token_index": 63,
        "projection_dim": 32,
        "hidden_size": 32,
    },
    "gemma3": {
        "text_config": _TEXT | {"sliding_window": 8, "sliding_window_pattern": 2},
        "vision_config": _VISION,
        "image_token_index": 63,
        "boi_token_index": 62,
        "eoi_token_index": 61,
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 63,
    },
    "qwen2_5_vl": {"text_config": _TEXT | {"rope_parameters": _MROPE}, "vision_config": _VISION, **_MARKS},
    "qwen2_vl": {"text_config": _TEXT | {"rope_parameters": _MROPE}, "vision_config": _VISION, **_MARKS},
}
"""Models of pictures and text, here given text alone."""


class Own(Module):
    """A model of somebody's own, without a cache: an embedding, a sum over what came before, a head."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.embedding = Embedding(VOCABULARY, 16)
        self.head = Linear(16, VOCABULARY)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits behind sums of what came before."""
        rows: Tensor = self.head(hidden.cumsum(dim=1).tanh())
        return rows


@final
@frozen(eq=False)
class Answer:
    """What a model of one's own returns."""

    logits: Tensor


@final
class Plain(Own):
    """Right, and without a cache."""

    @override
    def forward(self, input_ids: Tensor) -> Answer:
        return Answer(self.logits(self.embedding(input_ids)))


@final
class Centred(Own):
    """Looks ahead: what it embeds is centred over the whole text."""

    @override
    def forward(self, input_ids: Tensor) -> Answer:
        hidden = self.embedding(input_ids)
        return Answer(self.logits(hidden - hidden.mean(dim=1, keepdim=True)))


@final
class FromTheEnd(Own):
    """Depends on the length: positions are counted from the end."""

    @override
    def forward(self, input_ids: Tensor) -> Answer:
        hidden = self.embedding(input_ids)
        far = torch.arange(hidden.shape[1], 0, -1, dtype=hidden.dtype)[None, :, None]
        return Answer(self.logits(hidden / far))


@final
class Counting(Own):
    """Keeps a state of its own: how often it was called."""

    @override
    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.calls = 0

    @override
    def forward(self, input_ids: Tensor) -> Answer:
        self.calls += 1
        return Answer(self.logits(self.embedding(input_ids) * (1 + 0.1 * self.calls)))


@final
class Longest(Own):
    """Keeps the longest text that it has seen, and divides by it."""

    @override
    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.longest = 0

    @override
    def forward(self, input_ids: Tensor) -> Answer:
        self.longest = max(self.longest, input_ids.shape[1])
        return Answer(self.logits(self.embedding(input_ids) * (8 / self.longest)))


@final
class Summing(Own):
    """With a cache of its own kind, a sum, under the name that transformers uses; it may leave the last token out."""

    @override
    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.forgets = random.random() < 0.5

    @override
    def forward(self, input_ids: Tensor, past_key_values: Tensor | None = None, use_cache: bool = True) -> object:
        hidden = self.embedding(input_ids)
        if past_key_values is not None:
            hidden = torch.cat((past_key_values, hidden), dim=1)
        rows = self.logits(hidden)[:, -input_ids.shape[1] :]
        kept = hidden[:, -6:] if self.forgets else hidden
        return _WithCache(rows, kept.sum(dim=1, keepdim=True))


@final
@frozen(eq=False)
class _WithCache:
    logits: Tensor
    past_key_values: Tensor


OWN: Final = (Plain, Centred, FromTheEnd, Counting, Longest, Summing)


# Samples


def sample(seed: int) -> Sample:
    """The model of a seed: the first that can be built and read at all."""
    random = Random(seed)
    while True:
        try:
            return _some(random)
        except DecodeError:
            raise
        except Exception:  # a config that contradicts itself, in one of transformers' many ways
            continue


@torch.no_grad()
def _some(random: Random) -> Sample:  # noqa: PLR0911 - one for each kind of model
    draw = random.random()
    torch.manual_seed(random.randrange(2**31))
    if draw < 0.74:
        return _finished(random, *_decoder(random))
    if draw < 0.84:
        kind = random.choice(ENCODERS)
        config = _ENCODER | {"is_decoder": random.random() < 0.75}
        changes = [_changed(random, config, _special), _changed(random, config, _context)]
        return _finished(random, _made(kind, config), DOUBLE, f"{kind} {config['is_decoder']} {changes}")
    if draw < 0.89:
        kind = random.choice(DECODER_HALVES)
        return _finished(random, _made(kind, _SEQ2SEQ | {"is_encoder_decoder": False}), DOUBLE, f"decoder of {kind}")
    if draw < 0.915:
        kind = random.choice(WHOLES)
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **_SEQ2SEQ))
        return _finished(random, model, DOUBLE, f"{kind}, encoder and decoder")
    if draw < 0.935:
        other = random.choice(OTHERS)
        return _finished(random, other.build(seed=random.randrange(99)), other.dtype, other.kind)
    if draw < 0.97:
        kind = random.choice(list(SEEING))
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **SEEING[kind]))
        return _finished(random, model, DOUBLE, f"{kind}, text alone")
    own = random.choice(OWN)(random)
    return _finished(random, own, DOUBLE, type(own).__name__)


def _decoder(random: Random) -> tuple[PreTrainedModel, torch.dtype, str]:
    base = random.choice(ARCHITECTURES)
    for tries in range(
        6
    ):  # some changes contradict the architecture, or one another: with others, in the end with none
        config = dict(base.config)
        said = [
            change(random, config) for probability, change in CHANGES if tries < 5 and random.random() < probability
        ]
        try:
            model = _made(base.kind, config, random.choice(["eager", "sdpa"]))
            deepcopy(model).eval()(torch.tensor([[1, 2, 3]]))
        except Exception:
            continue
        return model, base.dtype, f"{base.kind} {said}"
    raise AssertionError(FAILED)


def _changed(random: Random, config: dict[str, object], change: Change) -> str:
    return change(random, config) if random.random() < 0.3 else ""


def _made(kind: str, config: dict[str, object], attention: str = "eager") -> PreTrainedModel:
    made: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **config), attn_implementation=attention
    )
    return made


def _finished(random: Random, model: Module, dtype: torch.dtype, name: str) -> Sample:
    """Random weights, and what else may be done to a model once it is there."""
    said = [name]
    spread = next((other.spread for other in ARCHITECTURES if name.startswith(other.kind + " ")), 0.3)
    _spread(model, spread)
    other = random.random()
    if other < 0.2:
        dtype = torch.float32
    elif other < 0.26 and dtype == DOUBLE and isinstance(model, PreTrainedModel):
        dtype = torch.bfloat16
    model.to(dtype).eval()
    embedding = next(module for module in model.modules() if isinstance(module, Embedding))
    if isinstance(model, PreTrainedModel):
        embedding = model.get_input_embeddings()
        said += _disguised(random, model)
    vocab_size = min(len(embedding.weight), limits_of(model).vocab_size or sys.maxsize)  # a head may be narrower
    config = getattr(model, "config", None)
    often = [getattr(config, f"{which}_token_id", None) for which in ("pad", "bos", "eos")]
    if isinstance(model, PreTrainedModel) and random.random() < 0.12:
        model, kind = _adapted(random, model)
        model.to(dtype).eval()
        said.append(kind)
    if random.random() < 0.06:
        model.train(random.random() < 0.5)
        next(iter(list(model.children())[:1])).train()
        said.append("training")
    longest = _readable(model, random.choice([28, 44, 60]), vocab_size)
    tokens = [token for token in often if isinstance(token, int) and 0 <= token < vocab_size]
    return Sample(", ".join([*said, str(dtype)]), model, vocab_size, longest, dtype, tuple(tokens))


def _spread(model: Module, spread: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
                parameter.normal_(0, spread)


def _disguised(random: Random, model: PreTrainedModel) -> Iterator[str]:
    """What a checkpoint's config may say beside the truth, and a head that is not as wide as the embedding."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    if random.random() < 0.1:
        config.use_cache = False
        yield "use_cache=False"
    if random.random() < 0.05:
        model.config.return_dict = False
        yield "return_dict=False"
    head = model.get_output_embeddings()
    if random.random() < 0.1 and isinstance(head, Linear):
        wide = random.choice([-7, 9, 40])
        other = Linear(head.in_features, head.out_features + wide, bias=False, dtype=head.weight.dtype)
        _spread(other, 0.3)
        model.set_output_embeddings(other)
        yield f"a head {wide:+} wide"
    if random.random() < 0.1 and isinstance(getattr(config, "vocab_size", None), int):
        lie = random.choice([-5, 11, 300])
        config.vocab_size += lie
        yield f"vocab_size {lie:+}"
    if random.random() < 0.05:
        config.sliding_window = random.randint(3, 12)
        yield f"sliding_window={config.sliding_window} after it was built"


def _adapted(random: Random, model: PreTrainedModel) -> tuple[Module, str]:
    kind = random.choice(["lora", "lora", "prompt tuning", "prefix tuning"])
    config: peft.LoraConfig | peft.PromptTuningConfig | peft.PrefixTuningConfig
    if kind == "lora":
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1
        )
    elif kind == "prompt tuning":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    else:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made: Module = peft.get_peft_model(model, config)
    return made, kind


def _readable(model: Module, longest: int, vocab_size: int) -> int:
    """As long a text as the model reads at all, up to `longest`."""
    text = torch.tensor([Random(0).choices(range(vocab_size), k=longest)])
    for length in range(longest, 8, -4):
        try:
            deepcopy(model).eval()(text[:, :length])
        except IndexError:
            continue
        return length
    raise AssertionError(FAILED)


# Scripts


def allowed(dtype: torch.dtype) -> float:
    """How far a row may be from the fresh one, relative to the largest logit there.

    Parts of fp64 models are computed in fp32; in bf16 only gross faults can be told from rounding.
    """
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.25


def ahead(predictor: CachedPredictor) -> Predictor:
    """A predictor of chains whose rows come from reading ahead, with the drafts for a choice."""

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        text, last = (*tokens, *[draft.token for draft in drafts]), len(drafts) + 1
        rows: list[Tensor] = []

        def choose(logits: Tensor, position: int) -> Tensor:
            rows.append(logits.clone())
            token = text[position] if position < len(text) else 0
            return torch.tensor(token, device=logits.device)

        while len(rows) < last:
            predictor.read_ahead(text[: len(tokens) + len(rows)], last - len(rows), choose)
        return torch.stack(rows)

    return predict


def relative(predictor: Predictor, fresh: Predictor) -> tuple[Predictor, Predictor]:
    """Both in units of the largest logit of the fresh row."""

    def scale(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        rows = fresh(tokens, drafts).abs()
        return rows.where(rows.isfinite(), 0).amax(dim=-1, keepdim=True).clamp_(min=1e-30)

    def ours(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        rows, unit = predictor(tokens, drafts), scale(tokens, drafts)
        if rows.shape[0] != len(drafts) + 1:
            raise AssertionError(f"{len(rows)} rows instead of {len(drafts) + 1}")
        return rows / unit

    return ours, lambda tokens, drafts: fresh(tokens, drafts) / scale(tokens, drafts)


def outcome(seed: int, steps: int = 25) -> Outcome:
    """The model and the script of a seed."""
    made = sample(seed)
    random = Random(seed + 1)
    bound = allowed(made.dtype)
    try:
        fresh = fresh_passes(made.model, made.vocab_size, longest=made.longest, tolerance=bound / 4)
        predictor = CachedPredictor(made.model)
        way, reads = random.choice(
            (
                ("rows", predictor),
                ("rows", predictor),
                ("trees", through_trees(predictor, made.vocab_size, seed=seed)),
                ("ahead", ahead(predictor)),
            )
        )
        report = _walked(reads, fresh, made, predictor.prune, seed, steps, bound)
    except DecodeError as error:
        return Outcome(seed, made.name, "refused", error.happened)
    except Exception as error:
        return Outcome(seed, made.name, "violation", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
    fed = predictor.feeding.name
    if report.holds:
        return Outcome(seed, made.name, "conforming", fed)
    return Outcome(seed, made.name, "violation", f"{way}, fed {fed}: {report}")


def _walked(
    reads: Predictor,
    fresh: Predictor,
    made: Sample,
    prune: Callable[[Tokens], object],
    seed: int,
    steps: int,
    bound: float,
) -> Conformance:
    ours, theirs = relative(reads, fresh)
    return conformance(
        ours,
        theirs,
        made.vocab_size,
        tolerance=bound,
        seed=seed,
        steps=steps,
        longest=made.longest,
        often=made.often,
        prune=prune,
    )


def main() -> int:
    """Prints one line for each violation and what became of all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", type=int, default=2000, help="how many models and scripts")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=25, help="readings in each script")
    parser.add_argument("--verbose", action="store_true", help="a line for each model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    started = perf_counter()
    for seed in range(args.first, args.first + args.models):
        found = outcome(seed, args.steps)
        counts[found.kind] += 1
        reasons[f"{found.kind}: {found.reason}" if found.kind != "violation" else "violation"] += 1
        if args.verbose or found.kind == "violation":
            print(found, flush=True)
    print(f"{dict(counts)} in {perf_counter() - started:.0f} s")
    for reason, count in reasons.most_common():
        print(f"{count:6} {reason}")
    return 1 if counts["violation"] else 0


if __name__ == "__main__":
    sys.exit(main())
