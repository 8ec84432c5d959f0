"""The spec, executed: every example runs as it is printed, and every signature is ours.

`spec_reference.md` carries the text. An example gets what the page leaves out (`target`, `logits`, …) and nothing else;
of the complete ones only the models' names are replaced, by tiny models that are saved and loaded the usual way.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import Module
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

import specflow
from specflow import caches, distribution, drafters, processors
from specflow.caches.layers import TupleCache
from specflow.processors import LogitsProcessor
from specflow.spec_paths import PATHS, install_spec_paths
from tests.toys import disturbed, oracle, passes_of, tiny_llama

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tests" / "spec_reference.md").read_text()
BLOCKS: dict[str, str] = dict(re.findall(r"^## (.*?)\n\n```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))
EXAMPLES = [title for title in BLOCKS if title.endswith("example")]
SIGNATURES = [title for title in BLOCKS if title.endswith(("signature", "constructor"))]
TARGET, DRAFTER = "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"

Names = dict[str, object]


def test_the_whole_page_is_there() -> None:
    assert (len(EXAMPLES), len(SIGNATURES), len(BLOCKS)) == (16, 14, 32)
    assert TEXT.count("```python") == len(BLOCKS)


HOMES = (specflow, processors, drafters, distribution, caches)


def named(name: str) -> Callable[..., object]:
    """The class or function of that name, where it stands in specflow and not under the spec's paths."""
    found: Callable[..., object] = next(getattr(home, name) for home in HOMES if hasattr(home, name))
    return found


# Signatures.


def documented(title: str) -> ast.FunctionDef:
    block = BLOCKS[title].strip()
    (definition,) = ast.parse(f"{block if 'def ' in block else f'def {block}'}:\n    ...").body
    assert isinstance(definition, ast.FunctionDef)
    return definition


NAMES: Mapping[str, object] = {
    **vars(processors),
    **vars(drafters),
    "List": list,
    "Tuple": tuple,
    "Union": Union,
    "torch": torch,
    "Module": Module,
    "Tensor": Tensor,
    "DynamicCache": DynamicCache,
}


def evaluated(node: ast.expr) -> object:
    return eval(ast.unparse(node), dict(NAMES))


def normal(kind: object) -> object:
    """A type so that `List[int]` equals `list[int]` and the order of a union does not matter.

    The page writes a tuple of any length as `Tuple[Tensor]`; a tuple of exactly one never occurs in it.
    """
    arguments = tuple(normal(argument) for argument in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return frozenset(arguments)
    if get_origin(kind) is tuple and len(arguments) == 1:
        return (tuple, (*arguments, ...))
    return (get_origin(kind), arguments) if arguments else kind


MORE: Mapping[str, set[str]] = {
    "speculative_generate": {"policy"},
    "ngram_assisted_speculative_generate": {"policy"},
}
"""The keywords that functions have beside those of the page."""


@pytest.mark.parametrize("title", SIGNATURES)
def test_signature(title: str) -> None:
    page = documented(title)
    thing: Callable[..., object] = named(page.name)
    ours = inspect.signature(thing).parameters
    hints = get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)

    names = [argument.arg for argument in page.args.args]
    assert [name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD] == names
    more = [one for name, one in ours.items() if name not in names]
    assert inspect.isclass(thing) or {*ours} - {*names} == MORE.get(page.name, set())
    assert all(one.kind is one.KEYWORD_ONLY and one.default is not one.empty for one in more)

    for argument in page.args.args:
        if argument.annotation is not None:
            assert normal(hints[argument.arg]) == normal(evaluated(argument.annotation)), argument.arg
    first = len(names) - len(page.args.defaults)
    assert [name for name in names if ours[name].default is inspect.Parameter.empty] == names[:first]
    for name, node in zip(names[first:], page.args.defaults, strict=True):
        default, expected = ours[name].default, evaluated(node)
        assert type(default) is type(expected), name
        assert default == expected or vars(default) == vars(expected), name
    if page.returns is not None:
        assert normal(hints["return"]) == normal(evaluated(page.returns))


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        (
            "INgramStorage",
            {
                "next_token": ["input_ids"],
                "has_gram": ["ngram"],
                "update": ["input_ids", "next_tokens"],
                "initialize": ["input_ids"],
                "reset": [],
            },
        ),
        ("LogitsProcessor", {"__call__": ["logits"], "_process": ["logits"], "sample": ["probs"]}),
    ],
)
def test_methods_of_the_abstract_classes(name: str, methods: dict[str, list[str]]) -> None:
    kind = named(name)
    assert inspect.isabstract(kind)
    for method, parameters in methods.items():
        assert list(inspect.signature(getattr(kind, method)).parameters) == ["self", *parameters]


def test_generate_functions_need_no_gradients() -> None:
    class Watching(Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama(0)
            self.config = self.inner.config

        @override
        def forward(self, input_ids: Tensor) -> object:
            assert not torch.is_grad_enabled()
            return self.inner(input_ids)

    model = Watching()
    specflow.autoregressive_generate([1, 2], model, 3)
    specflow.speculative_generate([1, 2], model, model, max_gen_len=3)
    specflow.ngram_assisted_speculative_generate([1, 2], specflow.NGramStorage(3, 64), model, max_gen_len=3)
    specflow.beam_search_generate([1, 2], model, 3)
    assert torch.is_grad_enabled()


def test_a_model_that_is_refused_teaches_a_storage_nothing() -> None:
    sizes = {"vocab_size": 64, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    storage = specflow.NGramStorage(3, 64)
    with pytest.raises(specflow.DecodeError, match="encoder-decoder"):
        specflow.ngram_assisted_speculative_generate([3, 4], storage, T5ForConditionalGeneration(T5Config(**sizes)))
    assert storage.counts() == {}


# Examples.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What stands in for the two models of the page, each with a tokenizer of bytes: id 0 pads, id 1 ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    bytewise = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>", pad_token="<pad>")
    target = tiny_llama(0, vocab_size=len(tokens), dtype=torch.float32)
    found = {}
    for name, model in ((TARGET, target), (DRAFTER, disturbed(target, 1, 0.02))):
        found[name] = tmp_path_factory.mktemp("model")
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture
def _spec_paths() -> Iterator[None]:
    """The spec's own import paths, for one test."""
    install_spec_paths()
    yield
    for path in PATHS:
        del sys.modules[path]


def run_block(title: str, names: Names, folders: Mapping[str, Path]) -> Names:
    code = BLOCKS[title]
    for name, folder in folders.items():
        code = code.replace(name, str(folder))
    exec(compile(code, f"<{title}>", "exec"), names)
    return names


def tuple_cache(model: Module) -> object:
    return tuple((layer.keys, layer.values) for layer in dynamic_cache(model).layers if isinstance(layer, DynamicLayer))


def dynamic_cache(model: Module) -> DynamicCache:
    cache = DynamicCache()
    model(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), cache=cache)
    return cache


GIVEN: dict[str, tuple[Callable[[Module], Names], ...]] = {
    "2.2 NGramStorage, example": (
        lambda target: {"input_ids": [5, 6, 7, 5, 6], "context": [5, 6], "next_token": 7},
        lambda target: {
            "input_ids": torch.tensor([[5, 6, 7, 5, 6]]),
            "context": torch.tensor([[5, 6]]),
            "next_token": torch.tensor([[7]]),
        },
    ),
    "4.2 prune_cache, example": (
        lambda target: {"cache": dynamic_cache(target)},
        lambda target: {"cache": tuple_cache(target)},
    ),
}
"""What the page leaves out, where there is more than one thing that it can mean."""


def given(title: str) -> tuple[Callable[[Module], Names], ...]:
    return GIVEN.get(title, (lambda target: {},))


def kept(after: SimpleNamespace) -> int:
    """How many tokens the processor leaves possible."""
    return int((after.processor(after.logits) > 0).sum())


def length(cache: DynamicCache | TupleCache) -> int:
    return cache.get_seq_length() if isinstance(cache, DynamicCache) else cache[0][0].shape[-2]


EXPECTED: dict[str, Callable[[SimpleNamespace, str], bool]] = {
    "1.1 autoregressive_generate": lambda after, out: after.output == oracle([1, 2, 3, 4], after.target, 50, {1}),
    "1.2 speculative_generate": lambda after, out: (
        f"Output: {after.output}\nAcceptance rate: {after.acceptance_rate:.2%}\n" == out
        and 0.0 <= after.acceptance_rate <= 1.0
    ),
    "1.3 ngram_assisted_speculative_generate": lambda after, out: (
        after.output == oracle([1, 2, 3, 4], after.target, 40, {1}) and 0.0 <= after.acceptance_rate <= 1.0
    ),
    "1.4 beam_search_generate": lambda after, out: len(after.output) == 40 or after.output[-1] == 1,
    "2.2 NGramStorage": lambda after, out: (int(after.token), bool(after.known)) == (7, True),
    "2.3 OneLevelNGramStorage": lambda after, out: after.ngram.n == 3,
    "3.2 GreedyProcessor": lambda after, out: (
        torch.equal(after.probs, after.logits.softmax(-1)) and bool(after.token == after.logits.argmax())
    ),
    "3.3 MultinomialProcessor": lambda after, out: 0 <= int(after.token) < 258,
    "3.4 TopKProcessor": lambda after, out: kept(after) == 5,
    "3.5 NucleusProcessor": lambda after, out: 0 < kept(after) < 258,
    "3.6 TopKNucleusProcessor": lambda after, out: 0 < kept(after) <= 10,
    "4.1 max_fn": lambda after, out: torch.allclose(after.adjusted, torch.tensor([0.0, 1.0, 0.0])),
    "4.2 prune_cache": lambda after, out: (
        (length(after.new_cache), length(after.cache)) == (5, 8) and type(after.new_cache) is type(after.cache)
    ),
    "5.1 basic": lambda after, out: (
        after.output_sd == after.output_ar == oracle(after.input_ids, after.target, 40, {1})
        and bool(re.fullmatch(r"AR: .*\nSD: .*\nAcceptance rate: \d+\.\d\d%\n", out, re.DOTALL))
    ),
    "5.2 NASD": lambda after, out: (
        after.output == oracle(after.input_ids, after.target, 40, {1}) and out.startswith("NASD: ")
    ),
    "5.3 advanced": lambda after, out: bool(
        re.fullmatch(r"position \d+  gamma \d+  accepted .*Output: .*\nAcceptance rate: \d+\.\d\d%\n", out, re.DOTALL)
    ),
}


@pytest.mark.usefixtures("_spec_paths")
@pytest.mark.parametrize(("title", "case"), [(title, i) for title in EXAMPLES for i in range(len(given(title)))])
def test_example(title: str, case: int, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    target, drafter = (AutoModelForCausalLM.from_pretrained(folders[name]) for name in (TARGET, DRAFTER))
    logits = torch.randn(258)
    before: Names = {
        "torch": torch,
        "target": target,
        "drafter": drafter,
        "logits": logits,
        "probs": logits.softmax(-1),
    }
    after = run_block(title, before | given(title)[case](target), folders)
    assert EXPECTED[title.removesuffix(", example")](SimpleNamespace(**after), capsys.readouterr().out)


@pytest.mark.usefixtures("_spec_paths")
@pytest.mark.parametrize("title", [title for title in BLOCKS if title.startswith("appendix")])
def test_appendix(title: str) -> None:
    names: Names = {}
    exec(BLOCKS[title], names)
    if title == "appendix imports":
        assert all(named(name) is thing for name, thing in names.items() if name != "__builtins__")
        assert len(names) == 16


# The page that says where everything is.


def test_every_entry_is_mapped_to_code_and_to_a_test() -> None:
    page = (ROOT / "docs" / "spec.md").read_text()
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", page, re.MULTILINE)]
    entries = {re.sub(r"(, (signature|constructor|example))+$", "", title) for title in BLOCKS if title[0] in "1234"}
    for entry in entries | {"2.1 INgramStorage"}:
        number, name = entry.split()
        assert any(row[0] == f"{number} `{name}`" for row in rows), entry
    links = re.findall(r"\]\((\.\./[^)]*|\w+\.md)\)", page)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    for _, code, tests in rows[2:]:
        assert "(../specflow/" in code
        assert "(../tests/test_" in tests


# Values of the wrong kind.


class Unprepared(LogitsProcessor):
    """A subclass that forgot `super().__init__`."""

    def __init__(self) -> None:
        pass

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return logits

    @override
    def sample(self, probs: Tensor) -> Tensor:
        return probs.argmax(-1, keepdim=True)


JUNK: list[object] = [
    None, "x", "", 1.5, float("nan"), True, -1, 0, 10**30, [], {}, set(), object(), int, torch.tensor(3),
    torch.tensor([3]), torch.tensor([[1, 2], [3, 4]]), torch.tensor([1.5]), torch.ones(3, dtype=torch.long).to("meta"),
    numpy.int64(3), numpy.float32(3), numpy.array([[3, 4]]), (3, 4), range(3), [1.0], [None], [99], ["a"], [[1]],
    LogitsProcessorList(), specflow.GreedyProcessor, Unprepared(), tiny_llama().to("meta"), iter([1]), lambda *a: 1,
]  # fmt: skip

GENERATE: Mapping[str, Callable[[], Names]] = {
    "autoregressive_generate": lambda: {"model": tiny_llama()},
    "speculative_generate": lambda: {"target": tiny_llama(), "drafter": tiny_llama(1)},
    "ngram_assisted_speculative_generate": lambda: {
        "target": tiny_llama(),
        "ngramstorage": specflow.NGramStorage(3, 64),
    },
    "beam_search_generate": lambda: {"model": tiny_llama()},
}
PARAMETERS = [
    (name, parameter) for name in GENERATE for parameter in inspect.signature(getattr(specflow, name)).parameters
]


FLAGS = {"use_cache", "debug", "use_egag", "skip_sample_adjustment", "first_target", "stop_if_unknown"}
TAKES_NONE = {"tokenizer", "gamma_max", "pad_token_id", "policy"}
NUMBERS = {"min_length", "alpha"}
"""Parameters that may be fractions, and below 0."""


def arguments(name: str) -> dict[str, Any]:
    return {"inputs": [3, 4, 5], "max_gen_len": 4} | GENERATE[name]()


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_a_value_of_any_kind_works_or_is_refused_before_a_model_runs(name: str, parameter: str) -> None:
    generate, given = getattr(specflow, name), arguments(name)
    fed = [passes_of(model) for model in given.values() if isinstance(model, Module)]
    for value in JUNK:
        for passes in fed:
            passes.clear()
        try:
            generate(**(given | {parameter: value}))
        except specflow.DecodeError as error:
            assert "\n" not in str(error)  # noqa: PT017 - it may work, too
            assert not any(fed) or (
                parameter == "policy" and callable(value)
            )  # what it returns is seen when it is asked


@pytest.mark.parametrize(("name", "parameter"), [pair for pair in PARAMETERS if pair[1] != "pad_token_id"])
def test_what_is_plainly_wrong_is_refused(name: str, parameter: str) -> None:
    generate, given = getattr(specflow, name), arguments(name)
    wrong = (
        ["x", object(), int, [None]] + [1.5, -1] * (parameter not in NUMBERS) + [None] * (parameter not in TAKES_NONE)
    )
    wrong += [True] * (parameter not in FLAGS) + [
        LogitsProcessorList([lambda *a: a[1]]),
        specflow.GreedyProcessor,
        tiny_llama().to("meta"),
    ]
    for value in wrong:
        with pytest.raises(specflow.DecodeError) as refused:
            generate(**(given | {parameter: value}))
        assert refused.value.parameter in (parameter, "temperature")


@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize(
    ("parameter", "value", "plain"),
    [
        ("inputs", torch.tensor([3, 4]), [3, 4]),
        ("inputs", torch.tensor([[3, 4]]), [3, 4]),
        ("inputs", numpy.array([3, 4], dtype=numpy.int32), [3, 4]),
        ("inputs", (numpy.int64(3), 4), [3, 4]),
        ("inputs", range(3, 5), [3, 4]),
        ("max_gen_len", numpy.int64(3), 3),
        ("max_gen_len", 10**30, 128),
        ("eos_tokens_id", numpy.int64(7), 7),
        ("eos_tokens_id", torch.tensor(7), 7),
        ("eos_tokens_id", {7, 9}, [7, 9]),
        ("eos_tokens_id", (7, 9), [7, 9]),
        ("eos_tokens_id", torch.tensor([7, 9]), [7, 9]),
        ("eos_tokens_id", numpy.array([7, 9]), [7, 9]),
        ("gamma", numpy.int64(2), 2),
        ("gamma", 10**9, 128),
        ("filler_top_k", numpy.int64(2), 2),
        ("pad_token_id", None, 0),
        ("gamma", numpy.uint8(2), 2),
        ("filler_top_k", numpy.uint8(3), 3),
        ("max_gen_len", numpy.uint8(3), 3),
        ("num_beams", numpy.uint8(2), 2),
        ("top_k", numpy.int8(2), 2),
        ("alpha", numpy.float32(0.5), 0.5),
        ("use_cache", numpy.True_, True),
        ("first_target", numpy.False_, False),
        ("stop_if_unknown", numpy.bool_(1), True),
    ],
)
def test_what_plainly_means_a_value_is_that_value(name: str, parameter: str, value: object, plain: object) -> None:
    generate = getattr(specflow, name)
    if parameter in inspect.signature(generate).parameters:
        assert generate(**(arguments(name) | {parameter: value})) == generate(**(arguments(name) | {parameter: plain}))


@pytest.mark.parametrize("name", GENERATE)
def test_every_parameter_is_documented(name: str) -> None:
    thing: Callable[..., object] = getattr(specflow, name)
    lists = re.findall(r"^([a-z_, ]+): ", inspect.getdoc(thing) or "", re.MULTILINE)
    assert {one for names in lists for one in names.split(", ")} == {*inspect.signature(thing).parameters}
