"""The model that a head drafts for, and how a head is filled with what a checkpoint holds for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast, final

from attrs import frozen
from torch import Tensor
from torch.nn import Embedding, Module

from specflow.errors import DecodeError, unwrap
from specflow.guards.checks import shown
from specflow.predictors import limits_of
from specflow.predictors.reader import config_of, layers_of
from specflow.protocols import Limits
from specflow.vocabulary import shared_vocabulary

GIVE: Final = "give the target as transformers loads it"


@final
@frozen(eq=False)
class Target:
    """The model that a head drafts for: what heads borrow of it, and what they are held against."""

    model: Module

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows."""
        size = limits_of(self.model).vocab_size
        if size is None:
            raise DecodeError("model", "the model does not tell its vocabulary", type(self.model).__name__, GIVE)
        return size

    @property
    def layers(self) -> int:
        """How many layers it has: its hidden states are numbered from 0, the embeddings, up to this."""
        return _told("num_hidden_layers", layers_of(self.model))

    @property
    def hidden(self) -> int:
        """How many numbers a layer holds at a token."""
        return _told("hidden_size", getattr(config_of(self.model), "hidden_size", None))

    @property
    def embeddings(self) -> Embedding:
        """Its table of tokens."""
        return cast(Embedding, self._own("get_input_embeddings", "embeddings"))

    @property
    def says(self) -> Module:
        """Its own head, from what it holds last to logits."""
        return self._own("get_output_embeddings", "output layer")

    def _own(self, method: str, what: str) -> Module:
        made: object = getattr(self.model, method, lambda: None)()
        if not isinstance(made, Module):
            raise DecodeError("model", f"the model does not show its {what}", type(self.model).__name__, GIVE)
        return made

    @property
    def like(self) -> Tensor:
        """A tensor where the model is and of its dtype."""
        return self.embeddings.weight

    def reads(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Hidden states that it has. `DecodeError` naming one that it does not."""
        for layer in layers:
            if not 0 <= layer <= self.layers:
                happened = f"the head reads a layer that a target of {self.layers} does not have"
                raise DecodeError("head", happened, layer, "give the target that the head was made for")
        return layers

    def check_size(self, hidden: int) -> None:
        """`DecodeError` for a head that reads layers of another size."""
        if hidden != self.hidden:
            received, remedy = f"{hidden} numbers for {self.hidden}", "give the target that the head was made for"
            raise DecodeError("head", "head and target have layers of different sizes", received, remedy)

    def check_vocabulary(self, size: int) -> None:
        """`DecodeError` for a head that is of another vocabulary."""
        unwrap(shared_vocabulary(Limits(self.vocab_size), Limits(size)))


def _told(name: str, number: object) -> int:
    """A number of the model's config."""
    if not isinstance(number, int):
        raise DecodeError("model", f"the model's config does not tell its {name}", shown(number), GIVE)
    return number


def filled(head: Module, tensors: Mapping[str, Tensor], borrowed: tuple[str, ...], like: Tensor) -> None:
    """Puts the tensors into a head, in the dtype of `like` and where that is; what is `borrowed` has its own already.

    `DecodeError` naming a tensor that is missing, of another shape, or not one of the head's.
    """
    state = {name: held for name, held in head.state_dict().items() if not name.startswith(borrowed)}
    for name, held in state.items():
        if name not in tensors:
            raise DecodeError("head", f"the tensor {name} is missing", f"{len(tensors)} others", "give a whole head")
        if tensors[name].shape != held.shape:
            received = f"{list(tensors[name].shape)} for {list(held.shape)}"
            raise DecodeError("head", f"the tensor {name} has another shape", received, "see config.json")
    strange = next((name for name in tensors if name not in state), None)
    if strange is not None:
        received, remedy = str(list(tensors[strange].shape)), "give a head of one of the known layouts"
        raise DecodeError("head", f"the tensor {strange} is none of this head's", received, remedy)
    parameters = {name for name, _ in head.named_parameters()}
    own = {
        name: tensor.to(like, copy=True) if name in parameters else tensor.to(like.device, copy=True)
        for name, tensor in tensors.items()
    }
    head.load_state_dict(own, strict=False, assign=True)
    head.eval()
    for name in own:
        if name in parameters:
            head.get_parameter(name).requires_grad_(False)
