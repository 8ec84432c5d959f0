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
from typing import Union, get_args, get_origin, get_type_hints

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

import specflow
import specflow.caching
from specflow.spec_paths import PATHS
from tests.toys import disturbed, oracle, tiny_llama

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


# Signatures.


def documented(title: str) -> ast.FunctionDef:
    block = BLOCKS[title].strip()
    (definition,) = ast.parse(f"{block if 'def ' in block else f'def {block}'}:\n    ...").body
    assert isinstance(definition, ast.FunctionDef)
    return definition


NAMES: Mapping[str, object] = {
    **vars(specflow),
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


@pytest.mark.parametrize("title", SIGNATURES)
def test_signature(title: str) -> None:
    page = documented(title)
    thing: Callable[..., object] = getattr(specflow, page.name)
    ours = inspect.signature(thing).parameters
    hints = get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)

    names = [argument.arg for argument in page.args.args]
    assert [name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD] == names
    more = [one for name, one in ours.items() if name not in names]
    assert inspect.isclass(thing) or not more
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
    kind = getattr(specflow, name)
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
    specflow.install_spec_paths()
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


def length(cache: DynamicCache | specflow.caching.TupleCache) -> int:
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
        assert all(getattr(specflow, name) is thing for name, thing in names.items() if name != "__builtins__")
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
