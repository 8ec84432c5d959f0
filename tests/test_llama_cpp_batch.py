"""Several texts over llama.cpp in one pass: each is the text that it is alone, and no token is read twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from specflow import (
    DecodeError,
    Dice,
    Finished,
    Fixed,
    GreedyProcessor,
    LookupTree,
    MultinomialProcessor,
    Predictor,
    Proposal,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    chain,
    cli,
    run,
    seed_coupled_step,
    speculative_step,
    start,
)
from specflow.batch import BatchPredictor, Failed, generate_many, together
from specflow.interop.llama_cpp import LlamaCpp, shared_out
from specflow.policies import CostMeter
from specflow.state import TEXT
from specflow.testing import conformance, through_trees
from tests.gguf_files import TOKENS, llama, write_gguf, write_recurrent, write_windowed
from tests.test_llama_cpp import forgetting, lent, needs_it, path
from tests.toys import tiny_llama

if TYPE_CHECKING:
    from llama_cpp.llama_cpp import llama_batch

__all__ = ["path"]  # a fixture

V = len(TOKENS)
NEAR = 1e-4
TREE = (Proposal(5), Proposal(6), Proposal(7, parent=0), Proposal(8, parent=TEXT), Proposal(9, parent=3))
DRAFTS: tuple[tuple[Proposal, ...], ...] = ((), chain((5, 6, 7)), TREE, chain((5,)))


def batched(path: Path, slots: int = 4, leaves: int = 16, context: int | None = None) -> LlamaCpp:
    """One that reads up to `slots` texts in a pass, with memory in fp32 and batches of few tokens."""
    return LlamaCpp(lent(path), context, leaves, slots)


@contextmanager
def passes() -> Iterator[list[int]]:
    """How many tokens each pass reads."""
    from llama_cpp import llama_cpp  # noqa: PLC0415

    decode, read = llama_cpp.llama_decode, list[int]()

    def counting(context: object, batch: llama_batch) -> int:
        read.append(batch.n_tokens)
        return decode(context, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", counting)
        yield read


def asked(target: Predictor, texts: Sequence[Tokens], drafts: Sequence[Proposal] = ()) -> list[Tensor | Failed]:
    """What is replied to each, where all ask at once."""
    ends = dict(together([partial(target, text, drafts) for text in texts], len(texts)))
    return [ends[i] for i in range(len(texts))]


def differ(rows: Tensor | Failed, truth: Tensor) -> float:
    assert isinstance(rows, Tensor), rows
    return float((rows - truth).abs().max())


def walk(target: Predictor, fresh: Predictor, board: list[Tokens], seed: int, steps: int = 12) -> float:
    """The largest difference from fresh passes in a text that grows, goes back, and goes over to another's."""
    random, text, worst = Random(seed), board[seed % len(board)], 0.0
    for _ in range(steps):
        drafts = random.choice(DRAFTS)
        rows = target(text, drafts)
        worst = max(worst, differ(rows, fresh(text, drafts)))
        board[seed % len(board)] = text
        match random.randrange(6):
            case 0:
                text = text[: random.randrange(1, len(text) + 1)]
            case 1:
                text = random.choice(board)
            case 2:
                text = (*text, *random.choices(range(5, 9), k=random.randrange(1, 5)))
            case _:  # some drafts are accepted, and one more token
                parent = TEXT
                while (below := [i for i, draft in enumerate(drafts) if _parent(drafts, i) == parent]) and (
                    random.random() < 0.8
                ):
                    parent = random.choice(below)
                    text = (*text, drafts[parent].token)
                text = (*text, random.randrange(3, 12))
        text = text[-60:] if random.random() < 0.9 else text[:60]
    return worst


def _parent(drafts: Sequence[Proposal], i: int) -> int:
    return i - 1 if drafts[i].parent == -2 else drafts[i].parent


def beginnings(count: int, seed: int = 1) -> list[Tokens]:
    random = Random(seed)
    common = tuple(random.choices(range(3, 12), k=40))
    return [
        (*common[: random.choice((0, 3, 40))], *random.choices(range(3, 12), k=random.randrange(1, 9)))
        for _ in range(count)
    ]


@needs_it
@pytest.mark.parametrize("slots", [1, 3, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_any_walks_of_several_texts_are_those_of_fresh_passes(seed: int, slots: int, path: Path) -> None:
    """Each with an owner, more of them than slots, whose prefixes are those of ended and of living texts."""
    target, fresh, board = batched(path, slots), forgetting(path), beginnings(5, seed)
    walks = [partial(walk, target, fresh, board, i + 10 * seed) for i in range(9)]
    found = [end for _, end in together(walks, 5)]
    assert max(end if isinstance(end, float) else 9.0 for end in found) < NEAR, found


@needs_it
@pytest.mark.parametrize("seed", [0, 1])
def test_its_memory_changes_no_answer_whoever_else_is_read(seed: int, path: Path) -> None:
    target, random, others = batched(path, 3), Random(seed), beginnings(3, seed)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        i = random.randrange(3)
        others[i] = (*others[i], random.randrange(3, 12))[-50:]
        asks = [partial(target, others[i], random.choice(DRAFTS)), partial(target, tokens, drafts)]
        end = dict(together(asks, 2))[1]
        if isinstance(end, Failed):
            raise end.error
        return end

    for predictor in (predict, through_trees(predict, V, seed=seed)):
        report = conformance(predictor, forgetting(path), V, tolerance=NEAR, seed=seed, longest=120, often=(V - 3,))
        assert report.holds, report


def dice(seed: int) -> Dice:
    return Dice(torch.Generator().manual_seed(seed))


STEPS: dict[str, Callable[[Predictor, int], Step]] = {
    "autoregressive": lambda target, n: autoregressive_step(target, GreedyProcessor(), dice(n)),
    "suffix": lambda target, n: speculative_step(SuffixDrafter(), target, GreedyProcessor(), dice(n), Fixed(n % 4 + 1)),
    "tree": lambda target, n: speculative_step(LookupTree(), target, GreedyProcessor(), dice(n), Fixed(6)),
    "sampled by a seed": lambda target, n: seed_coupled_step(
        LookupTree(), target, MultinomialProcessor(1.5), SharedNoise(n), Fixed(5)
    ),
}
PROMPTS = [*beginnings(6), (5, 6, 7, 5, 6), (5, 6, 7, 5, 6)]


def said(step: Callable[[Predictor, int], Step], target: LlamaCpp, number: int) -> Tokens:
    end = run(step(target, number), start(PROMPTS[number], 14 + number, [END], target.limits).unwrap())
    assert isinstance(end, Finished)
    return end.state.output


END = V - 3


@needs_it
@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("name", STEPS)
def test_every_decoder_says_in_a_batch_what_it_says_alone(name: str, slots: int, path: Path) -> None:
    """One fails in the middle; texts begin and end at different steps."""

    def failing() -> Tokens:
        target((3, 4), ())
        target((3, 4, 5), chain((6,)))
        raise ZeroDivisionError

    target, alone = batched(path, slots), LlamaCpp(lent(path))
    decodes = [partial(said, STEPS[name], target, i) for i in range(len(PROMPTS))]
    some: list[Callable[[], Tokens]] = [*decodes[:2], failing, *decodes[2:]]
    ends = dict(together(some, slots))
    failed = ends.pop(2)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ZeroDivisionError)
    assert [ends[i] for i in sorted(ends)] == [said(STEPS[name], alone, i) for i in range(len(PROMPTS))]


@needs_it
def test_one_pass_answers_all_and_accepted_drafts_are_not_read_again(path: Path) -> None:
    target, texts = batched(path, 3), [(3, 4, 5), (6, 7), (8, 9, 10, 11)]
    with passes() as read:

        def decode(text: Tokens) -> None:
            target(text, TREE)
            target((*text, 5, 7, 3), chain((1, 2)))  # down to the third draft, and one more token
            target((*text, 5, 7, 3, 1, 4), ())  # half of the chain

        list(together([partial(decode, text) for text in texts], 3))
        assert read == [3 + 2 + 4 + 3 * 5, 3 * (1 + 2), 3 * 1]


@needs_it
def test_of_one_prompt_each_token_is_read_once(path: Path) -> None:
    """By one of those who begin with it; the others share its cells, which takes no room."""
    target, fresh, prompt = batched(path, 4, context=64), forgetting(path), tuple(Random(3).choices(range(3, 12), k=60))
    with passes() as read:

        def decode(token: int) -> Tensor:
            target(prompt, ())
            return target((*prompt, token), ())

        found = dict(together([partial(decode, i) for i in range(4)], 4))
        assert sum(read) == 60 + 3 * 1 + 4 * 1
    for i in range(4):
        assert differ(found[i], fresh((*prompt, i), ())) < NEAR
    with passes() as read:
        found = dict(together([partial(target, (*prompt[:50], 4, i), ()) for i in range(4)], 4))
        assert sum(read) == 4 * 2  # from a prefix of texts that ended
    for i in range(4):
        assert differ(found[i], fresh((*prompt[:50], 4, i), ())) < NEAR


@needs_it
def test_a_long_prompt_holds_nobody_up(path: Path) -> None:
    target, fresh = batched(path, 3), forgetting(path)
    long, done = tuple(Random(1).choices(range(3, 12), k=240)), list[str]()

    def goes_on(text: Tokens) -> float:
        worst = 0.0
        for i in range(5):
            worst = max(worst, differ(target(text, chain((5, 6))), fresh(text, chain((5, 6)))))
            text = (*text, i)
        done.append("short")
        return worst

    def waits() -> float:
        found = differ(target(long, TREE), fresh(long, TREE))
        done.append("long")
        return found

    target((9,), ())
    some: list[Callable[[], float]] = [waits, partial(goes_on, (5, 6)), partial(goes_on, (7, 8, 9))]
    ends = dict(together(some, 3))
    assert max(end if isinstance(end, float) else 9.0 for end in ends.values()) < NEAR, ends
    assert done == ["short", "short", "long"]


def test_a_pass_is_shared_out_so_that_the_first_gets_on() -> None:
    random = Random(0)
    for _ in range(2000):
        most = random.randrange(32, 70)
        needs = [(random.choice((0, 0, 1, 7, 90)), random.randrange(1, 30)) for _ in range(random.randrange(1, 12))]
        counts = shared_out(needs, most)
        assert sum(counts) <= most
        assert counts[0] > 0
        for count, (before, last) in zip(counts, needs, strict=True):
            assert count == before + last or 0 <= count <= before
        if sum(map(sum, needs)) <= most:
            assert counts == [*map(sum, needs)]


@needs_it
def test_what_is_wrong_with_one_text_is_its_own(path: Path) -> None:
    target, fresh = batched(path, 8, context=40), forgetting(path)
    texts = [(3, 4), (V, 1), (5,), (), (2.5,), (1,) * 41, (7, 8)]
    found = asked(target, texts)  # type: ignore[arg-type] # what is tested
    for text, rows in zip(texts, found, strict=True):
        if text in ((3, 4), (5,), (7, 8)):
            assert differ(rows, fresh(text, ())) < NEAR
        else:
            assert isinstance(rows, Failed)
            assert isinstance(rows.error, DecodeError)


@needs_it
def test_a_pass_that_fails_is_only_his_whose_fault_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    target, fresh, decode = batched(path, 4), forgetting(path), llama_cpp.llama_decode
    texts: list[Tokens] = [(3, 4, 5), (6, 200), (8, 9), (3, 4, 6)]
    asked(target, [text[:1] for text in texts])

    def failing(context: object, batch: llama_batch) -> int:
        code = decode(context, batch)
        return 1 if 200 in [batch.token[i] for i in range(batch.n_tokens)] else code

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", failing)
        found = asked(target, texts, chain((7,)))
    failed = found.pop(1)
    assert isinstance(failed, Failed)
    assert "llama.cpp fails at a pass" in str(failed.error)
    for text, rows in zip([texts[0], *texts[2:]], found, strict=True):
        assert differ(rows, fresh(text, chain((7,)))) < NEAR
    for text, rows in zip(texts, asked(target, texts), strict=True):
        assert differ(rows, fresh(text, ())) < NEAR


@needs_it
def test_one_text_whose_logits_are_not_finite_leaves_the_others_theirs(path: Path, tmp_path: Path) -> None:
    """What it leaves in memory is in nobody's way, though a mask does not hide a NaN."""
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    broken = write_gguf(tmp_path / "broken.gguf", model)
    target, fresh = batched(broken, 4), forgetting(path)
    for _ in range(2):
        texts: list[Tokens] = [(3, 4, 5, 6), (7, 9), (8,), (3, 4)]
        found = asked(target, texts, chain((4, 5)))
        failed = found.pop(1)
        assert isinstance(failed, Failed)
        assert "not finite" in str(failed.error)
        for text, rows in zip([texts[0], *texts[2:]], found, strict=True):
            assert differ(rows, fresh(text, chain((4, 5)))) < NEAR


@needs_it
def test_ctrl_c_in_a_pass_leaves_nothing_wrong(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    target, decode = batched(path, 4), llama_cpp.llama_decode
    decodes = [partial(said, STEPS["tree"], target, i) for i in range(6)]
    expected, calls = dict(together(decodes, 4)), list[int]()

    def interrupted(context: object, batch: llama_batch) -> int:
        calls.append(1)
        decode(context, batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(together(decodes, 4))
    assert dict(together(decodes, 4)) == expected


@needs_it
def test_a_llama_that_is_closed_is_told_to_each(path: Path) -> None:
    given = lent(path)
    target = LlamaCpp(given, slots=3)
    asked(target, [(3, 4), (5,)])
    given.close()
    for end in asked(target, [(3, 4), (5,)]):
        assert isinstance(end, Failed)
        assert "the Llama is closed" in str(end.error)


@needs_it
@pytest.mark.parametrize("slots", [1, 3])
def test_texts_of_a_recurrent_model_are_read_together_and_anew_where_drafts_were_refused(
    slots: int, tmp_path: Path
) -> None:
    recurrent = write_recurrent(tmp_path / "mamba.gguf")
    target, fresh = batched(recurrent, slots), forgetting(recurrent)
    board = beginnings(4, 2)
    found = [end for _, end in together([partial(walk, target, fresh, board, i) for i in range(6)], 3)]
    assert max(end if isinstance(end, float) else 9.0 for end in found) < NEAR, found
    if slots == 3:
        target.forget()
        texts: list[Tokens] = [(3, 4, 5), (6, 7), (8,)]
        with passes() as read:
            list(
                together([partial(lambda text: (target(text, ()), target((*text, 9), ())), text) for text in texts], 3)
            )
        assert read == [6, 3]


@needs_it
def test_windows_that_were_written_over_are_read_anew(tmp_path: Path) -> None:
    """llama.cpp gives away cells that a window has passed, and a text that goes back may need them."""
    windowed = write_windowed(tmp_path / "gemma2.gguf", 8)
    target, fresh = batched(windowed, 3), forgetting(windowed)
    random = Random(0)
    for _ in range(12):
        texts = [tuple(random.choices(range(3, 12), k=random.randrange(1, 100))) for _ in range(3)]

        def decode(text: Tokens) -> float:
            worst = differ(target(text, ()), fresh(text, ()))
            for back in (len(text), 20, 3):
                drafts = chain((5, 6, 7, 8, 9, 10))
                text = (*text[:back], 4)
                worst = max(worst, differ(target(text, drafts), fresh(text, drafts)))
                text = (*text, 5, 6, 3)
                worst = max(worst, differ(target(text, ()), fresh(text, ())))
            return worst

        found = [end for _, end in together([partial(decode, text) for text in texts], 3)]
        assert max(end if isinstance(end, float) else 9.0 for end in found) < 1e-3, found


@needs_it
def test_each_text_has_the_whole_context(path: Path) -> None:
    target, fresh = batched(path, 3, context=90), forgetting(path)
    texts = [tuple(Random(i).choices(range(3, 12), k=85)) for i in range(3)]
    for drafts in (TREE, chain((5, 6, 7, 8, 9))):
        for text, rows in zip(texts, asked(target, texts, drafts), strict=True):
            assert differ(rows, fresh(text, drafts)) < NEAR
    assert target.limits.context == 90
    wide = [Proposal(i, parent=TEXT) for i in range(6)]  # for which there is no room beside one another
    for text, rows in zip(texts, asked(target, texts, wide), strict=True):
        assert differ(rows, fresh(text, wide)) < NEAR


@needs_it
def test_wide_trees_and_long_chains_are_read_by_themselves(path: Path) -> None:
    target, fresh = batched(path, 3, leaves=2), forgetting(path)
    for drafts in ([Proposal(i, parent=TEXT) for i in range(5)], chain(range(40)), TREE[:2]):
        texts: list[Tokens] = [(3, 4, 5), (6, 7), (V, 2), (8,)]
        found = asked(target, texts, drafts)
        assert isinstance(found.pop(2), Failed)
        for text, rows in zip([texts[0], texts[1], texts[3]], found, strict=True):
            assert differ(rows, fresh(text, drafts)) < NEAR


@needs_it
def test_nothing_is_left_of_texts_that_are_forgotten(path: Path) -> None:
    from llama_cpp import llama_cpp  # noqa: PLC0415

    target, random = batched(path, 3), Random(4)
    for _ in range(40):
        texts = [tuple(random.choices(range(3, 12), k=random.randrange(1, 30))) for _ in range(3)]
        asked(target, texts, random.choice(DRAFTS))
    kept = {number for memo in target._memos for number in memo.past.sequences}
    assert len([*target._memos]) == 3
    for number in range(target._memory.most):
        held = llama_cpp.llama_memory_seq_pos_max(target._context.memory, number)
        assert (held >= 0) is (number in kept)
    target.forget()
    assert llama_cpp.llama_memory_seq_pos_max(target._context.memory, 0) == -1


@needs_it
def test_its_meter_hears_of_passes_that_are_half_full_and_read_no_prompt(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = list[int]()
    monkeypatch.setattr(CostMeter, "note", lambda meter, k, seconds: heard.append(k))
    target, texts = batched(path, 4), [(3, 4), (5, 6), (7, 8), tuple(range(100))]
    asked(target, texts)
    assert heard == []
    asked(target, [(*text, 1) for text in texts], chain((1, 2)))
    assert heard == [3]
    asked(target, [(*text, 1, 1) for text in texts[:2]])
    assert heard == [3, 1]
    asked(target, [(*texts[0], 1, 1, 1)])
    assert heard == [3, 1]


# Prompts in, finished texts out.


@needs_it
@pytest.mark.parametrize("slots", [1, 4])
def test_many_texts_are_those_of_each_prompt(slots: int, path: Path) -> None:
    target, alone = batched(path, slots), LlamaCpp(lent(path))
    ends = generate_many(PROMPTS, target, max_gen_len=20, eos_tokens_id=END, slots=slots)
    step = autoregressive_step(alone, GreedyProcessor(), Dice())
    expected = [run(step, start(prompt, 20, [END]).unwrap()).state.output for prompt in PROMPTS]
    assert [end.state.output for end in ends] == expected
    sampled = [
        generate_many(PROMPTS, target, None, 4, MultinomialProcessor(1.5), 12, END, 3, some)[2].state.output
        for some in (1, 4)
    ]
    assert sampled[0] == sampled[1]


def test_many_texts_over_a_predictor_are_those_over_its_model() -> None:
    model = tiny_llama(0)
    prompts = [[3, 4, 5], [6], [3, 4, 5, 7]]
    texts = [
        [end.state.output for end in generate_many(prompts, target, max_gen_len=12, eos_tokens_id=[])]
        for target in (model, BatchPredictor(model))
    ]
    assert texts[0] == texts[1]


# What is refused.


@needs_it
@pytest.mark.parametrize("slots", [0, 129, 2.5, True, None])
def test_a_number_of_slots_that_is_none_is_refused(slots: object, path: Path) -> None:
    with pytest.raises(DecodeError, match="slots"):
        LlamaCpp(path, slots=slots)  # type: ignore[arg-type] # what is tested


@needs_it
def test_as_many_slots_as_there_may_be(path: Path) -> None:
    target = LlamaCpp(lent(path), 8, slots=128)
    texts, fresh = [(i, i + 1) for i in range(128)], forgetting(path)
    for text, rows in zip(texts, asked(target, texts), strict=True):
        assert differ(rows, fresh(text, ())) < NEAR


@needs_it
@pytest.mark.parametrize("given", [None, [1], [((1, 2), ())]])
def test_what_nobody_asks_is_refused(given: object, path: Path) -> None:
    with pytest.raises(DecodeError, match="asked"):
        batched(path).read(given)  # type: ignore[arg-type] # what is tested


@needs_it
def test_the_command_answers_a_file_as_it_answers_each_prompt(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specflow.converted.user_cache_path", lambda name: tmp_path / name)
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    asked = ["hi", "hello hello", "w" * 30, "x" * 400]
    prompts.write_text("\n".join(json.dumps({"id": i, "prompt": text}) for i, text in enumerate(asked)))
    engine = ["--model", str(path), "--engine", "llama.cpp", "--max-new-tokens", "20"]
    assert cli.main(["generate", "--file", str(prompts), "--out", str(answers), "--slots", "3", *engine]) == 2
    found = {line["id"]: line["text"] for line in map(json.loads, answers.read_text().splitlines())}
    assert sorted(found) == [0, 1, 2]  # the last one outgrows the model
    capsys.readouterr()
    for i, text in found.items():
        assert cli.main(["generate", asked[i], *engine]) == 0
        assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")


@needs_it
def test_the_benchmark_measures_its_batches(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specflow.converted.user_cache_path", lambda name: tmp_path / name)
    prompts, kept = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    lines = [{"question_id": i, "category": "a", "turns": [text]} for i, text in enumerate(("he he he", "w", "hello"))]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["bench", "--model", str(path), "--engine", "llama.cpp", "--prompts", str(prompts), "--json", str(kept)]
    arguments += ["--max-new-tokens", "12", "--slots", "2", "--repeats", "1"]
    assert cli.main([*arguments, "--decoders", "llama.cpp", "autoregressive", "suffix@cost", "tree@4"]) == 0
    turns = {turn["decoder"]: turn["texts"] for turn in json.loads(kept.read_text())["turns"]}
    assert [*turns] == ["llama.cpp, one by one", "autoregressive", "suffix@cost", "tree@4"]
    assert len({json.dumps(texts) for texts in turns.values()}) == 1
    assert "absent: llama.cpp: the decoder reads one text at a time" in " ".join(capsys.readouterr().out.split())
