"""Prompts of a file, answered together: each answer is that of the prompt alone, and is there once."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from shutil import copytree
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import TypeAlias

import pytest
import torch
from attrs import evolve
from torch.nn import Module

from specflow import CachedPredictor, CostAware, CostMeter, DecodeError, cli
from specflow.batch import BatchPredictor, seed_of
from specflow.catalogue import DRAFTERS, POLICIES
from specflow.corpus import SELDOM, Answer, Id, Progress, Row, answers_in, read_rows
from specflow.distill import fit_jump
from specflow.usage import Details, Positions, Usage
from tests.test_cli import greek, words
from tests.toys import disturbed, tiny_llama

Line: TypeAlias = dict[str, object]


def usage_of(answer: Line) -> dict[str, int]:
    """How many tokens a line of answers says that there were, by OpenAI's names."""
    found = answer["usage"]
    assert isinstance(found, dict)
    return found


def drafts_of(answer: Line) -> tuple[int, int]:
    """How many drafts it says were judged, and accepted."""
    found = answer["usage"]
    assert isinstance(found, dict)
    told: dict[str, int] = found["completion_tokens_details"]
    accepted = told["accepted_prediction_tokens"]
    return accepted + told["rejected_prediction_tokens"], accepted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, one that drafts for it and a head that does, in float64, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama()
    tokenizer = words()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w9"
    for name, each in (("tiny", model), ("draft", disturbed(model, 1, 0.05))):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    numbers = Random(2)
    fit_jump(model, [numbers.choices(range(3, 60), k=20) for _ in range(6)], folder / "head", (1,))
    return folder


def prompts(count: int) -> list[Line]:
    random = Random(1)
    return [
        {"id": i if i % 2 else f"t{i}", "prompt": " ".join(f"w{random.randrange(3, 12)}" for _ in range(5 + i % 7))}
        for i in range(count)
    ]


def written(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(folder: Path, file: Path, out: Path) -> list[str]:
    model = ["--model", str(folder / "tiny"), "--dtype", "float64", "--max-new-tokens", "20"]
    return ["generate", "--file", str(file), "--out", str(out), *model]


Answered: TypeAlias = Callable[..., dict[object, Line]]


@pytest.fixture
def answered(folder: Path, tmp_path: Path) -> Answered:
    """The answers to lines, by their ids."""

    def answer(lines: Iterable[object], *more: str, code: int = 0) -> dict[object, Line]:
        file, out = written(tmp_path / "prompts.jsonl", lines), tmp_path / "answers.jsonl"
        out.unlink(missing_ok=True)
        assert cli.main([*options(folder, file, out), *more]) == code
        answers = read(out)
        assert len({str(answer["id"]) for answer in answers}) == len(answers)
        return {answer["id"]: answer for answer in answers}

    return answer


def texts(answers: dict[object, Line]) -> dict[object, object]:
    return {id: answer["text"] for id, answer in answers.items()}


# The texts.


@pytest.mark.parametrize("more", [[], ["--temperature", "1.5", "--seed", "7"]], ids=["greedy", "by seed"])
def test_each_text_is_that_of_its_prompt_alone(
    more: list[str], folder: Path, answered: Answered, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = prompts(6)
    unpaced = ["--policy", "fixed"]  # by cost, the clock decides how many steps there are
    answers = answered(lines, *unpaced, *more)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("[6/6 texts, ")
    for line in lines:
        own = [] if not more else ["--temperature", "1.5", "--seed", str(seed_of(7, str(line["id"])))]
        single = ["--model", str(folder / "tiny"), "--dtype", "float64", "--max-new-tokens", "20"]
        assert cli.main(["generate", str(line["prompt"]), *single, *unpaced, *own]) == 0
        captured = capsys.readouterr()
        answer = answers[line["id"]]
        assert captured.out.strip() == str(answer["text"]).strip()
        usage = usage_of(answer)
        assert captured.err.startswith(f"[{usage['completion_tokens']} tokens, ")
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        judged, accepted = drafts_of(answer)
        assert f"{answer['steps']} steps (" in captured.err
        assert f" tokens a step), acceptance {accepted}/{judged} = " in captured.err
        assert cli.main(["generate", str(line["prompt"]), *single, *unpaced, *own, "--json"]) == 0
        assert answer.pop("origin")
        assert answer == {"id": line["id"]} | json.loads(capsys.readouterr().out)
        assert answer["reason"] in ("stop token", "length limit")
        assert list(answer) == [
            *("id", "text", "reason", "steps", "usage", "positions"),
            *(["seed"] if more else []),
        ]
        assert not more or answer["seed"] == seed_of(7, str(line["id"]))


def test_a_seed_has_one_text_whatever_drafts_it_and_in_whatever_order(answered: Answered, folder: Path) -> None:
    lines = prompts(7)
    sampled = ["--temperature", "1.5", "--seed", "3"]
    expected = texts(answered(lines, *sampled, "--slots", "1"))
    assert len({*expected.values()}) == 7
    drafter = ["--draft-model", str(folder / "draft")]
    for more in (["--slots", "4"], ["--drafter", "none"], ["--drafter", "tree", "--policy", "cost"], drafter):
        assert texts(answered(lines, *sampled, *more)) == expected
    assert texts(answered(lines[::-1], *sampled, "--slots", "3")) == expected
    other = texts(answered(lines, "--temperature", "1.5", "--seed", "4"))
    assert not set(other.values()) & set(expected.values())


def test_without_a_seed_each_text_is_drawn_anew(answered: Answered) -> None:
    line = {"prompt": "w5 w6 w7"}
    lines = [line | {"id": i} for i in range(4)]
    first, second = answered(lines, "--temperature", "3"), answered(lines, "--temperature", "3")
    assert len({*texts(first).values(), *texts(second).values()}) == 8
    assert "seed" not in first[0]


@pytest.fixture(scope="module")
def undrafted(folder: Path) -> dict[object, object]:
    """The texts of five prompts, one after the other and without a drafter."""
    file, out = written(folder / "five.jsonl", prompts(5)), folder / "undrafted.jsonl"
    assert cli.main([*options(folder, file, out), "--drafter", "none", "--slots", "1"]) == 0
    return {answer["id"]: answer["text"] for answer in read(out)}


@pytest.mark.usefixtures("_loads_once")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_drafter_and_policy_serves_many_texts(
    drafter: str, policy: str, answered: Answered, folder: Path, undrafted: dict[object, object]
) -> None:
    lines = prompts(5)
    model = ["--draft-model", str(folder / "draft")] if DRAFTERS[drafter].assisted else []
    model += ["--head", str(folder / "head")] if DRAFTERS[drafter].headed else []
    more = ["--drafter", drafter, "--policy", policy, *model, "--gamma", "4", "--slots", "3"]
    answers = answered(lines, *more)
    assert texts(answers) == undrafted
    drafted = sum(drafts_of(answer)[0] for answer in answers.values())
    assert policy == "cost" or (drafted > 0) is (drafter != "none")


def test_texts_share_passes_of_target_and_draft_model_and_each_has_its_own_policy(
    answered: Answered, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[BatchPredictor] = []
    policies: list[CostAware] = []

    def noted(model: Module, slots: int, features: tuple[int, ...] | None = None) -> BatchPredictor:
        made.append(BatchPredictor(model, slots, features=features))
        return made[-1]

    def cost_aware(most: int, temperature: float, meter: CostMeter) -> CostAware:
        policies.append(CostAware(meter, most))
        return policies[-1]

    monkeypatch.setattr(cli, "BatchPredictor", noted)
    monkeypatch.setitem(POLICIES, "cost", cost_aware)
    answered(prompts(6), "--slots", "4", "--draft-model", str(folder / "draft"))
    target, draft = made
    assert (target.slots, draft.slots) == (4, 4)
    assert target.meter.seconds(1) is not None
    assert draft.meter is not target.meter
    assert len(policies) == 6
    assert all(each.meter is target.meter for each in policies)


@pytest.mark.filterwarnings("ignore:some texts over")
@pytest.mark.parametrize("how", ["fast", "bit-for-bit"])
def test_an_accelerated_model_answers_a_file(how: str, answered: Answered, tmp_path: Path) -> None:
    """After its bigrams were asked for: its weights are taken then."""
    lines = prompts(5)
    single = ["--dtype", "float32"]
    more = [*single, "--drafter", "tree", "--bigrams", str(tmp_path / "bigrams")]
    assert texts(answered(lines, "--accelerate", how, *more)) == texts(answered(lines, *single))


def test_stop_strings_end_texts(answered: Answered) -> None:
    whole = answered(prompts(3))
    word = str(whole[1]["text"]).split()[4]
    cut = answered(prompts(3), "--stop", word)[1]
    assert (cut["reason"], str(cut["text"]).split().count(word)) == ("stop condition", 1)
    assert str(whole[1]["text"]).startswith(str(cut["text"]))


# What is asked.


def test_the_three_forms_of_a_line(answered: Answered) -> None:
    text = "w5 w6 w7"
    forms: list[Line] = [
        {"id": "a", "prompt": text},
        {"id": 2, "messages": [{"role": "user", "content": text}], "more": None},
        {"question_id": 3, "category": "chat", "turns": [text, "w8"]},
        {"id": "ü\n", "messages": [{"role": "system", "content": "w5"}, {"role": "user", "content": "w6 w7"}]},
    ]
    answers = texts(answered(forms))
    assert len(answers) == 4
    assert len({*answers.values()}) == 1
    del forms[1], forms[2]
    assert {*texts(answered(forms, "--raw")).values()} != {*answers.values()}


def test_a_line_may_hold_whatever_json_may(tmp_path: Path) -> None:
    asked = "a\u2028b\x85c\u00a0"
    lines = [json.dumps({"id": 1, "prompt": asked}, ensure_ascii=False), "", "  ", '{"id": "2", "prompt": ""}']
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_rows(path, raw=True) == (Row(1, asked), Row("2", ""))


GOOD = '{"id": 1, "prompt": "w5"}\n'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file holds no prompts: received "),
        (b"\n \n", "the file holds no prompts"),
        (b'{"id": 2, "prompt": 3}', 'line 2 of prompts asks nothing: received \'{"id": 2, "prompt": 3}\'; write {'),
        (b'{"id": 2, "prompt": "a"', "line 2 of prompts asks nothing"),
        (b'{"id": true, "prompt": "a"}', "line 2 of prompts asks nothing"),
        (b'{"id": 1.5, "prompt": "a"}', "line 2 of prompts asks nothing"),
        (b'{"prompt": "a"}', "line 2 of prompts asks nothing"),
        (b'{"question_id": 2, "turns": []}', "line 2 of prompts asks nothing"),
        (b'{"id": 2, "prompt": "a", "messages": []}', "line 2 of prompts asks nothing"),
        (b"[" * 99999, "line 2 of prompts asks nothing"),
        (b'{"id": 2, "prompt": "caf\xe9"}', "line 2 of prompts asks nothing"),
        (b'\n{"id": 2, "prompt": "\\ud800"}', "line 3 of prompts: the prompt is not UTF-8: received '\\ud800'; give a"),
        (b'{"id": "\\ud800", "prompt": "a"}', "line 2 of prompts: the id is not UTF-8"),
        (b'{"id": 2, "messages": []}', "line 2 of prompts: these are not messages: received []; give [{"),
        (b'{"id": 2, "messages": [{"role": "user"}]}', "line 2 of prompts: these are not messages"),
        (b'{"id": 2, "messages": [{"role": "user", "content": "\\ud800"}]}', "line 2 of prompts: a message is not UTF"),
        (b'\n{"id": 1, "prompt": "a"}', "line 3 of prompts has the id of line 1: received 1; number the texts apart"),
        (b'{"id": "1", "prompt": "a"}', "line 2 of prompts has the id of line 1: received '1'"),
        (None, "the prompts cannot be read ([Errno 2] No such file or directory: 'prompts'): received 'prompts'"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_asks_nothing_is_refused_before_a_model_is_loaded(
    content: bytes | None,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("prompts").write_bytes(content if not content.strip() else GOOD.encode() + content)
    assert cli.main(["generate", "--file", "prompts", "--out", "answers", "--model", "no/such/model"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"specflow: {sentence}" in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("answers").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is nothing to answer: received no prompt; give one, pipe one into the command, or name a file"),
        (["a", "--file", "prompts", "--out", "b"], "a prompt and a file of prompts are both given: received 'a' and"),
        (["--file", "prompts"], "there is no file for the answers: received --file prompts; name one with --out"),
        (["a", "--out", "b"], "--out means nothing without a file of prompts: received --out; leave it out, or name"),
        (["a", "--slots", "8"], "--slots means nothing without a file of prompts"),
        (["a", "--resume"], "--resume means nothing without a file of prompts"),
        (["--file", "prompts", "--out", "b", "--json"], "--json means nothing beside --file, whose answers are JSON"),
        (["--file", "prompts", "--out", "b", "--slots", "0"], "slots is below 1: received 0; decode one text at a"),
        (["--file", "prompts", "--out", "b", "--max-new-tokens", "-1"], "the number of new tokens is negative"),
        (["--file", "chat", "--out", "b", "--raw"], "line 1 of chat holds messages, which only a chat template joins"),
        (["--file", "prompts", "--out", "."], "the answers cannot be written ([Errno 21]"),
        (["--file", "prompts", "--out", "no/such/b"], "the answers cannot be written ([Errno 2]"),
        (["--file", "prompts", "--out", "prompts"], "the file of the answers is not empty: received 'prompts'; add"),
        (["--file", "prompts", "--out", "prompts", "--resume"], "line 1 of prompts is no answer"),
    ],
)
def test_what_makes_no_sense_together_is_refused(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    Path("prompts").write_text(GOOD)
    Path("chat").write_text('{"id": 1, "messages": [{"role": "user", "content": "w5"}]}')
    assert cli.main(["generate", *arguments, "--model", "no/such/model"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"specflow: {sentence}")
    assert captured.err.count("\n") == 1
    assert Path("prompts").read_text() == GOOD


def test_messages_need_a_chat_template(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    file = written(tmp_path / "prompts", [{"id": 1, "messages": [{"role": "user", "content": "w5"}]}])
    assert cli.main([*options(folder, file, tmp_path / "out"), "--model", str(tmp_path / "model")]) == 2
    assert "the model has no chat template for messages" in capsys.readouterr().err


def test_a_draft_model_of_another_vocabulary_that_cannot_draft_is_refused_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(vocab_size=8).save_pretrained(tmp_path / "other")
    greek().save_pretrained(tmp_path / "other")
    file = written(tmp_path / "prompts", prompts(3))
    assert cli.main([*options(folder, file, tmp_path / "out"), "--draft-model", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("do not spell what it reads") == 1


def test_a_draft_model_of_another_vocabulary_drafts_for_many_texts(
    answered: Answered, folder: Path, undrafted: dict[object, object], tmp_path: Path
) -> None:
    unpaced = ["--policy", "fixed"]
    tiny_llama(vocab_size=9).save_pretrained(tmp_path / "other")
    words(9).save_pretrained(tmp_path / "other")
    answers = answered(prompts(5), "--draft-model", str(tmp_path / "other"), "--slots", "3", *unpaced)
    assert texts(answers) == undrafted
    assert sum(drafts_of(answer)[0] for answer in answers.values()) > 0


# What goes wrong.


def test_a_text_that_fails_stops_no_other_and_is_tried_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its prompt is longer than the context; then it is not."""
    lines = prompts(4)
    lines[1]["prompt"] = "w5 " * 200
    file, out = written(tmp_path / "prompts", lines), tmp_path / "out"
    assert cli.main(options(folder, file, out)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = "specflow: the text 1 fails: the prompt is longer than the target's context of 128: received 201 tokens; "
    assert captured.err.startswith(error)
    assert "\n[3/4 texts, " in captured.err
    assert captured.err.endswith("specflow: 1 of 4 texts failed; --resume tries them again\n")
    before = out.read_bytes()
    assert {line["id"] for line in read(out)} == {"t0", "t2", 3}
    lines[1]["prompt"] = "w5"
    assert cli.main([*options(folder, written(file, lines), out), "--resume"]) == 0
    assert out.read_bytes().startswith(before)
    assert read(out)[3]["id"] == 1
    assert capsys.readouterr().err.startswith("[4/4 texts, 18 tokens, ")


def test_what_a_model_raises_is_the_failure_of_its_texts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        raise NotImplementedError("no kernel\nfor this dtype")

    monkeypatch.setattr(BatchPredictor, "__call__", broken)
    file = written(tmp_path / "prompts", prompts(2))
    assert cli.main(options(folder, file, tmp_path / "out")) == 2
    assert (
        'text "t0" fails: the model cannot be run in float64: received NotImplementedError' in capsys.readouterr().err
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk to write to")
def test_a_full_disk_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "prompts", prompts(2))
    assert cli.main(options(folder, file, Path("/dev/full"))) == 1
    assert "specflow: the answer cannot be written ([Errno 28]" in capsys.readouterr().err


# Going on.

ANSWER = Answer(1, "x", "stop token", 4, Usage(5, 10, 15, Details(6, 2)), Positions((4, 4), (3, 3)))

SEEDS: dict[Id, int | None] = {1: None, 2: None, "3": None}
ROWS = [Row(id, f"w{id}") for id in SEEDS]


def answer_line(id: Id, seed: int | None = None, asked: str | None = None) -> str:
    origin = {"prompt": Row(id, f"w{id}" if asked is None else asked).name}
    more = {"origin": origin} if seed is None else {"seed": seed, "origin": origin}
    return json.dumps({"id": id, "text": "", "reason": "stop token", "steps": 1, "usage": {}, **more}) + "\n"


@pytest.mark.parametrize("cut", range(0, len(answer_line(2)), 7))
def test_a_line_that_is_not_whole_is_removed(cut: int, tmp_path: Path) -> None:
    """As is one that lacks nothing but its end."""
    path, whole = tmp_path / "out", answer_line(1)
    for last in (answer_line(2)[:cut], answer_line(2)[:-1]):
        path.write_text(whole + last)
        with answers_in(path, ROWS, SEEDS, resume=True) as answers:
            assert set(answers.done) == {1}
            answers.add(evolve(ANSWER, id="3"))
        assert [line["id"] for line in read(path)] == [1, "3"]
        assert path.read_text().startswith(whole)


def test_a_line_that_is_not_whole_stays_where_whoever_asks_refuses_the_others(tmp_path: Path) -> None:
    path, whole = tmp_path / "out", answer_line(1)
    path.write_text(whole + '{"id": ')
    with pytest.raises(DecodeError, match="another model"), answers_in(path, ROWS, SEEDS, resume=True):
        raise DecodeError("out", "what is there comes of another model", "one", "name another file")
    assert path.read_text() == whole + '{"id": '
    with answers_in(path, ROWS, SEEDS, resume=True):
        pass
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (answer_line(1) + answer_line(9), "line 2 of {} answers what is not asked"),
        (answer_line("1"), "line 1 of {} answers what is not asked"),
        (answer_line(1) + answer_line(1), "line 2 of {} has the id of line 1"),
        (answer_line(1, 5), "line 1 of {} has another seed"),
        (answer_line(1, asked="w9"), "line 1 of {} answers another prompt"),
        ('{"id": 1, "text": "", "reason": "stop token", "usage": {}}\n', "line 1 of {} does not say what it comes of"),
        ("notes\n", "line 1 of {} is no answer"),
        ("notes", "line 1 of {} is no answer"),
        (answer_line(1) + '{"id": 2, "prompt": "a"}', "line 2 of {} is no answer"),
        (answer_line(1) + "\n", "line 2 of {} is no answer"),
        (answer_line(1)[:20] + "\n" + answer_line(2), "line 1 of {} is no answer"),
    ],
)
def test_what_answers_something_else_is_refused_and_left_as_it_was(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text(content)
    with pytest.raises(DecodeError) as raised, answers_in(path, ROWS, SEEDS, resume=True):
        pass
    assert sentence.format(path) in str(raised.value)
    assert path.read_text() == content


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with (
        answers_in(path, ROWS, SEEDS, resume=False),
        pytest.raises(DecodeError, match="another process writes its answers there"),
        answers_in(path, ROWS, SEEDS, resume=True),
    ):
        pass
    with answers_in(path, ROWS, SEEDS, resume=True) as answers:
        assert not answers.done


@pytest.mark.parametrize(
    ("more", "another"),
    [
        (["--dtype", "float32"], "dtype"),
        (["--accelerate", "fast"], "accelerate"),
        (["--temperature", "0.5"], "processor"),
        (["--max-new-tokens", "3"], "max-new-tokens"),
        (["--stop", "w9"], "stop"),
        (["--regex", "w9"], "grammar"),
        (["--raw"], "template"),
    ],
)
def test_a_file_holds_answers_of_one_model_and_one_law(
    more: list[str], another: str, folder: Path, tmp_path: Path, answered: Answered, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(prompts(2))
    out = tmp_path / "answers.jsonl"
    with out.open("a") as answers:
        answers.write('{"id": "t2", "te')  # whoever wrote it was killed
    before, file = out.read_bytes(), tmp_path / "prompts.jsonl"
    for count in (2, 3):  # where nothing is left, too
        written(file, prompts(count))
        capsys.readouterr()
        assert cli.main([*options(folder, file, out), *more, "--resume", "--model", "no/such/model"]) == 2
        assert f"what is there comes of another {another}: received " in capsys.readouterr().err
        assert out.read_bytes() == before
    assert cli.main([*options(folder, file, out), "--drafter", "lookup", "--resume"]) == 0  # whatever drafts them
    assert len(read(out)) == 3


def test_answers_of_another_engine_are_told_by_its_name(
    folder: Path, tmp_path: Path, answered: Answered, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(prompts(1))
    out = tmp_path / "answers.jsonl"
    ours, theirs = '"engine": "torch", "dtype": "float64", "accelerate": "no"', '"engine": "llama.cpp"'
    assert ours in out.read_text()
    out.write_text(out.read_text().replace(ours, theirs))
    assert cli.main([*options(folder, tmp_path / "prompts.jsonl", out), "--resume"]) == 2
    assert "comes of another engine: received 'torch' and there 'llama.cpp'" in capsys.readouterr().err


def test_a_file_holds_answers_of_one_models_weights(
    folder: Path, tmp_path: Path, answered: Answered, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever they are: the name of a model may come to mean another."""
    answered(prompts(2))
    out = tmp_path / "answers.jsonl"
    file = written(tmp_path / "prompts.jsonl", prompts(3))
    copytree(folder, tmp_path / "same")
    copytree(folder, tmp_path / "other")
    tiny_llama(9).save_pretrained(tmp_path / "other" / "tiny")
    with out.open("a") as answers:
        answers.write('{"id": "t2", "te')  # whoever wrote it was killed
    before = out.read_bytes()
    assert cli.main([*options(tmp_path / "other", file, out), "--resume"]) == 2
    assert "what is there comes of another model: received 'LlamaForCausalLM " in capsys.readouterr().err
    assert out.read_bytes() == before
    assert cli.main([*options(tmp_path / "same", file, out), "--resume"]) == 0


def test_nothing_is_loaded_where_nothing_is_left(
    folder: Path, tmp_path: Path, answered: Answered, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(prompts(2))
    before = (tmp_path / "answers.jsonl").read_bytes()
    capsys.readouterr()
    file = tmp_path / "prompts.jsonl"
    arguments = [*options(folder, file, tmp_path / "answers.jsonl"), "--resume", "--model", "no/such/model"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err.startswith("[2/2 texts, 0 tokens, ")
    assert (tmp_path / "answers.jsonl").read_bytes() == before


# Processes that are ended.

MANY = 60
LONG = ["--max-new-tokens", "90", "--drafter", "none", "--slots", "3", "--temperature", "2", "--seed", "5"]


forking = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def command(arguments: Sequence[str], stdout: int, stderr: int) -> None:
    """The process of the command: it heeds Ctrl-C, though a shell that runs tests in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    raise SystemExit(cli.main(arguments))


@contextmanager
def begun(stdout: int, stderr: int, *arguments: str) -> Iterator[BaseProcess]:
    """A fork of this process that runs the command, and so need not import torch and transformers again."""
    process = get_context("fork").Process(target=command, args=(arguments, stdout, stderr))
    process.start()
    yield process
    process.join(timeout=300)
    process.kill()


def ended(folder: Path, file: Path, out: Path, lines: int, by: signal.Signals, *more: str) -> tuple[int | None, str]:
    """What a process says that is sent a signal once the file has so many lines."""
    with TemporaryFile("w+") as said, TemporaryFile("w+") as error:
        with begun(said.fileno(), error.fileno(), *options(folder, file, out), *LONG, *more) as process:
            until = monotonic() + 300
            while process.is_alive() and monotonic() < until:
                if out.exists() and out.read_bytes().count(b"\n") >= lines:
                    assert process.pid is not None
                    os.kill(process.pid, by)
                    break
                sleep(0.005)
        said.seek(0)
        error.seek(0)
        assert said.read() == ""
        return process.exitcode, error.read()


@forking
def test_whoever_is_killed_goes_on_and_each_text_is_there_once(folder: Path, tmp_path: Path) -> None:
    file, out = written(tmp_path / "prompts", prompts(MANY)), tmp_path / "out"
    kept = b""
    for lines in (0, 1, 17):
        code, _ = ended(folder, file, out, lines, signal.SIGKILL, "--resume")
        assert code == -signal.SIGKILL
        kept = out.read_bytes()
        assert kept.endswith(b"\n") or not kept
        assert lines <= kept.count(b"\n") < MANY
    os.truncate(out, len(kept) - 9)
    whole = tmp_path / "whole"
    assert cli.main([*options(folder, file, out), *LONG, "--resume"]) == 0
    assert cli.main([*options(folder, file, whole), *LONG, "--slots", "8"]) == 0
    assert sorted(map(str, read(out))) == sorted(map(str, read(whole)))
    assert len(read(out)) == MANY
    assert out.read_bytes().startswith(kept[: kept.rfind(b"\n", 0, -1) + 1])


@forking
def test_ctrl_c_says_how_many_are_done(folder: Path, tmp_path: Path) -> None:
    file, out = written(tmp_path / "prompts", prompts(MANY)), tmp_path / "out"
    code, error = ended(folder, file, out, 4, signal.SIGINT)
    done = len(read(out))
    assert (code, 4 <= done < MANY) == (130, True)
    assert error.endswith(f"specflow: {done} of {MANY} texts are done; --resume goes on with the others\n")
    assert f"[{done}/{MANY} texts, " in error
    assert "Traceback" not in error


# Progress.


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_told_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    stream, clock = StringIO(), Clock()
    progress = Progress(stream, 1000, 11, clock)
    for _ in range(100):
        clock.now += SELDOM / 40
        progress.decoded(5)
    progress.answered(ANSWER)
    progress.say("aside")
    progress.end()
    assert stream.getvalue().splitlines() == [
        "11/1000 texts, 40.0 tokens/s",
        "11/1000 texts, 40.0 tokens/s",
        "aside",
        "[12/1000 texts, 10 tokens, 40.0 tokens/s, 4 steps (2.50 tokens a step), acceptance 6/8 = 75%]",
    ]


@forking
def test_on_a_terminal_one_line_is_rewritten(folder: Path, tmp_path: Path) -> None:
    controlling, terminal = pty.openpty()
    file = written(tmp_path / "prompts", [*prompts(20), {"id": "long", "prompt": "w5 " * 200}])
    with TemporaryFile() as answers:
        with begun(answers.fileno(), terminal, *options(folder, file, tmp_path / "out"), *LONG) as process:
            pass
        answers.seek(0)
        assert answers.read() == b""
    os.close(terminal)
    said = b""
    while True:
        try:
            more = os.read(controlling, 4096)
        except OSError:
            break
        if not more:
            break
        said += more
    os.close(controlling)
    assert process.exitcode == 2
    lines = said.decode().split("\r\n")
    assert len(lines) == 4
    assert lines[0].count("\r\x1b[K") > 2
    assert "/21 texts, " in lines[0]
    assert '\r\x1b[Kspecflow: the text "long" fails: ' in said.decode()
    assert "\r\x1b[K[20/21 texts, " in said.decode()


def test_one_prompt_is_read_through_a_memo_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Module] = []

    def noted(model: Module, features: tuple[int, ...] | None = None) -> CachedPredictor:
        made.append(model)
        return CachedPredictor(model, features=features)

    monkeypatch.setattr(cli, "CachedPredictor", noted)
    model = ["--model", str(folder / "tiny"), "--draft-model", str(folder / "draft"), "--dtype", "float64"]
    assert cli.main(["generate", "w5 w6", *model, "--max-new-tokens", "5"]) == 0
    assert len(made) == 2
    assert capsys.readouterr().out.strip()
