"""The n-gram storages against a model that recounts everything, and their files against whatever can go wrong."""

from __future__ import annotations

import os
import pickle
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any, TypeAlias, cast, final

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from torch import Tensor
from typing_extensions import override

from specflow import DecodeError, NGramStorage, files
from specflow.drafters import Bigrams, Corpus, INgramStorage, OneLevelNGramStorage, Recycled
from specflow.drafters.ngrams import counts
from specflow.drafters.ngrams import file as storage_file
from specflow.drafters.ngrams.file import Header, packed, read

Storage: TypeAlias = NGramStorage | OneLevelNGramStorage
Make: TypeAlias = Callable[[int, int], Storage]

KINDS: list[Make] = [NGramStorage, OneLevelNGramStorage]
VOCABULARY = 4


@final
class Recount:
    """Every (context, token) that was ever seen, in order; each question is answered by counting again."""

    def __init__(self, lengths: range) -> None:
        self.lengths = lengths
        self.seen: list[tuple[tuple[int, ...], int]] = []

    def update(self, context: Sequence[int], tokens: Sequence[int]) -> None:
        for length in self.lengths:
            if length <= len(context):
                self.seen += [(tuple(context[len(context) - length :]), token) for token in tokens]

    def initialize(self, text: Sequence[int]) -> None:
        for end in range(1, len(text)):
            self.update(text[:end], [text[end]])

    def next_token(self, context: Sequence[int]) -> int | None:
        for length in reversed(self.lengths):
            followers = [token for seen, token in self.seen if len(seen) == length and seen == tuple(context[-length:])]
            if followers:
                most = max(Counter(followers).values())
                return max(
                    (token for token, count in Counter(followers).items() if count == most),
                    key=lambda token: len(followers) - followers[::-1].index(token),
                )
        return None

    def has_gram(self, gram: Sequence[int]) -> bool:
        gram = gram[-(self.lengths.stop) :]
        return bool(gram) and (tuple(gram[:-1]), gram[-1]) in self.seen

    def counts(self) -> dict[tuple[int, ...], dict[int, int]]:
        counted: dict[tuple[int, ...], dict[int, int]] = {}
        for context, token in self.seen:
            followers = counted.setdefault(context, {})
            followers[token] = followers.get(token, 0) + 1
        return counted


def lengths_of(make: Make, n: int) -> range:
    return range(1, n) if make is NGramStorage else range(n - 1, n)


ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=9)
some_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)
deeds = st.lists(st.tuples(ids, st.none() | some_ids), max_size=12)


def answer(found: tuple[int, bool] | tuple[Tensor, Tensor]) -> tuple[int, bool]:
    return int(found[0]), bool(found[1])


@pytest.mark.parametrize("make", KINDS)
@given(n=st.integers(2, 5), deeds=deeds, questions=st.lists(ids, max_size=6))
@settings(max_examples=600, deadline=None)
@example(n=2, deeds=[([0, 1], None)], questions=[[0], [3, 0], []])
def test_storage_counts_what_a_recount_counts(
    make: Make, n: int, deeds: list[tuple[list[int], list[int] | None]], questions: list[list[int]]
) -> None:
    model, flat, batched = Recount(lengths_of(make, n)), make(n, VOCABULARY), make(n, VOCABULARY)
    for text, tokens in deeds:
        if tokens is None:
            model.initialize(text)
            flat.initialize(text)
            batched.initialize(torch.tensor([text], dtype=torch.long))
        else:
            model.update(text, tokens)
            flat.update(text, tokens)
            batched.update(torch.tensor([text], dtype=torch.long), torch.tensor([tokens]))
    assert flat.counts() == batched.counts() == model.counts()
    assert len(flat) == len(model.counts())
    for question in questions + [text for text, _ in deeds]:
        expected = model.next_token(question)
        for found in (flat.next_token(question), batched.next_token(torch.tensor([question], dtype=torch.long))):
            token, known = answer(found)
            assert known == (expected is not None)
            assert token == expected if known else 0 <= token < VOCABULARY
        assert flat.has_gram(question) == model.has_gram(question)
        assert batched.has_gram(torch.tensor(question, dtype=torch.long)) == model.has_gram(question)
        assert batched.has_gram(torch.tensor([question], dtype=torch.long)) == model.has_gram(question)


@pytest.mark.parametrize("make", KINDS)
@given(n=st.integers(2, 4), text=st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_drafters_door_says_what_next_token_says(make: Make, n: int, text: list[int]) -> None:
    storage = make(n, VOCABULARY)
    storage.initialize(text)
    for (token, known), _ in zip(storage.continuation(tuple(text[:-1])), range(1), strict=False):
        assert (token, known) == storage.next_token(text[:-1]) or not known
    drafted = list(text[:-1])
    for (token, known), _ in zip(storage.continuation(tuple(text[:-1])), range(5), strict=False):
        if not known:
            break
        assert storage.next_token(drafted) == (token, True)
        drafted.append(token)


@pytest.mark.parametrize("make", KINDS)
@given(n=st.integers(2, 4), text=ids, start=st.integers(0, 4), followers=st.lists(some_ids, max_size=4))
@settings(max_examples=200, deadline=None)
def test_the_update_stages_door_learns_what_update_learns(
    make: Make, n: int, text: list[int], start: int, followers: list[list[int]]
) -> None:
    at_once, one_by_one = make(n, VOCABULARY), make(n, VOCABULARY)
    start = min(start, len(text))
    followers = followers[: len(text) - start]
    at_once.learn(tuple(text), start, followers)
    for end, following in enumerate(followers, start):
        one_by_one.update(text[:end], following)
    assert at_once.counts() == one_by_one.counts()


def test_a_batch_is_its_rows_and_what_next_token_returns_can_be_learned() -> None:
    storage, rows = NGramStorage(3, 10), torch.tensor([[1, 2, 3, 1, 2], [4, 5, 4, 5, 4]])
    storage.initialize(rows)
    tokens, known = storage.next_token(rows)
    assert (tokens.tolist(), known.tolist()) == ([[3], [5]], [[True], [True]])
    assert (tokens.dtype, known.dtype) == (torch.long, torch.bool)
    before = storage.counts()
    storage.update(rows, tokens)
    assert storage.counts()[1, 2] == {3: before[1, 2][3] + 1}
    storage.update(rows, torch.tensor([6, 7]))
    storage.update(rows[0], torch.tensor([8, 9]))
    assert storage.counts()[1, 2] == {3: 2, 6: 1, 8: 1, 9: 1}
    assert storage.counts()[5, 4] == {5: 2, 7: 1}
    one, sure = storage.next_token(rows[0])
    assert (one.shape, sure.shape) == (torch.Size([1]), torch.Size([1]))
    storage.update(rows[0], one)
    storage.update([1, 2], storage.next_token([1, 2])[0])
    assert storage.counts()[1, 2][3] == 4
    assert storage.next_token(torch.zeros(0, 4, dtype=torch.long))[0].shape == (0, 1)


def test_bigrams_work_and_a_longer_context_goes_first() -> None:
    storage = NGramStorage(2, 10)
    storage.initialize([1, 2, 1, 2, 1, 3])
    assert storage.next_token([7, 1]) == (2, True)
    deep = NGramStorage(3, 10)
    deep.initialize([1, 2, 1, 2, 9, 2, 5])
    assert deep.next_token([9, 2]) == (5, True)
    assert deep.next_token([8, 2]) == (5, True)
    assert deep.next_token([1, 2]) == (9, True)


def test_a_tie_goes_to_the_token_that_reached_the_count_last() -> None:
    storage = NGramStorage(2, 10)
    for token, expected in [(4, 4), (5, 5), (4, 4), (5, 5), (6, 5), (6, 6)]:
        storage.update([1], token)
        assert storage.next_token([1]) == (expected, True)


def test_an_unknown_context_gives_a_random_token_that_the_seed_governs() -> None:
    storage = NGramStorage(3, 1000)
    torch.manual_seed(5)
    first = [storage.next_token([1, 2]) for _ in range(50)]
    torch.manual_seed(5)
    assert [storage.next_token([1, 2]) for _ in range(50)] == first
    assert not any(known for _, known in first)
    assert len({token for token, _ in first}) > 40
    assert {storage.next_token([])[1], storage.next_token(torch.zeros(1, 0, dtype=torch.long))[1].item()} == {False}


def test_what_the_vocabulary_lacks_is_unknown_in_a_decode_and_not_learned() -> None:
    storage = NGramStorage(3, 7)
    storage.learn((1, 9, 3, 1, 2), 1, [[9], [3], [1, 8, 7], [2]])
    assert storage.counts() == {(3,): {1: 1}, (1,): {2: 1}, (3, 1): {2: 1}}
    assert not next(storage.continuation((3, 9)))[1]
    assert next(storage.continuation((9, 3))) == (1, True)


def test_reset_forgets_everything() -> None:
    storage = NGramStorage(3, 10)
    storage.initialize([1, 2, 3])
    storage.reset()
    assert (len(storage), storage.counts(), storage.next_token([1, 2])[1]) == (0, {}, False)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("deed", "parameter"),
    [
        (lambda s: s.initialize([1, 10]), "input_ids"),
        (lambda s: s.initialize(torch.tensor([[1, 2], [3, -1]])), "input_ids"),
        (lambda s: s.initialize([1, True]), "input_ids"),
        (lambda s: s.initialize(torch.tensor([[1.0, 2.0]])), "input_ids"),
        (lambda s: s.initialize(torch.zeros(1, 1, 1, dtype=torch.long)), "input_ids"),
        (lambda s: s.update([1, 2], [3, 10]), "next_tokens"),
        (lambda s: s.update([1, 12], 3), "input_ids"),
        (lambda s: s.update(torch.tensor([[1, 2], [1, 2]]), torch.tensor([[3], [10]])), "next_tokens"),
        (lambda s: s.update(torch.tensor([[1, 2], [1, 2]]), torch.tensor([[3, 4, 5]])), "next_tokens"),
        (lambda s: s.update(torch.tensor([[1, 2]]), torch.tensor([[3], [4]])), "next_tokens"),
        (lambda s: s.next_token([1, 10]), "input_ids"),
        (lambda s: s.next_token([1, "2"]), "input_ids"),
        (lambda s: s.has_gram([1, 2, -3]), "ngram"),
        (lambda s: s.has_gram(torch.tensor([[1, 2], [3, 4]])), "ngram"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_learned(
    make: Make, deed: Callable[[Storage], object], parameter: str
) -> None:
    storage = make(3, 10)
    storage.initialize([1, 2, 3])
    before = storage.counts()
    with pytest.raises(DecodeError) as refused:
        deed(storage)
    assert refused.value.parameter == parameter
    assert storage.counts() == before


@pytest.mark.parametrize("make", KINDS)
def test_storages_that_make_no_sense_are_refused(make: Make) -> None:
    for n, vocab_size, parameter in [(1, 10, "n"), (0, 10, "n"), (2, 0, "vocab_size")]:
        with pytest.raises(DecodeError) as refused:
            make(n, vocab_size)
        assert refused.value.parameter == parameter
    with pytest.raises(DecodeError, match="max_contexts"):
        NGramStorage(2, 10, max_contexts=0)


@given(
    sightings=st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 3), min_size=1, max_size=2)), max_size=60),
    bound=st.integers(1, 5),
)
@settings(max_examples=500, deadline=None)
def test_a_bounded_storage_forgets_a_context_of_the_lowest_rank(
    sightings: list[tuple[int, list[int]]], bound: int
) -> None:
    storage = OneLevelNGramStorage(2, 10, max_contexts=bound)
    ranks: dict[int, int] = {}
    kept: dict[tuple[int, ...], dict[int, int]] = {}
    floor = 0
    for context, tokens in sightings:
        storage.update([context], tokens)
        gone = [old for old in ranks if (old,) not in storage.counts()]
        assert len(gone) == (context not in ranks and len(ranks) == bound)
        for old in gone:
            assert ranks[old] == min(ranks.values())
            floor = ranks.pop(old)
            del kept[old,]
        ranks[context] = max(ranks[context], floor + 1) + 1 if context in ranks else floor + 1
        for token in tokens:
            followers = kept.setdefault((context,), {})
            followers[token] = followers.get(token, 0) + 1
        assert storage.counts() == kept


def test_a_context_seen_c_times_outlives_about_c_bounds_of_newcomers() -> None:
    for times in (1, 3, 6):
        storage = OneLevelNGramStorage(2, 100_000, max_contexts=50)
        for _ in range(times):
            storage.update([0], 7)
        lived = next(i for i in range(1, 100_000) if storage.update([i], 7) is None and not storage.has_gram([0, 7]))
        assert times * 45 <= lived <= times * 55


def test_a_bound_holds_for_all_orders_together() -> None:
    storage = NGramStorage(4, 50, max_contexts=20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        storage.initialize(torch.randint(50, (2, 20), generator=generator))
        assert len(storage) == 20 == len(storage.counts())


def learned(make: Make, bound: int | None = None) -> Storage:
    storage = make(3, 100) if bound is None else NGramStorage(3, 100, max_contexts=bound)
    storage.initialize([1, 2, 3, 1, 2, 4, 1, 2, 3, 99, 0])
    storage.update([1, 2], [3, 5, 5])
    return storage


def as_drafted(storage: Storage) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """What is known, with the order of continuations that ties depend on."""
    return {context: [*counted.items()][:1] for context, counted in storage.counts().items()}


@pytest.mark.parametrize("make", KINDS)
def test_what_was_saved_is_loaded(make: Make, tmp_path: Path) -> None:
    storage, other = learned(make), make(3, 100)
    other.initialize([7, 8, 9])
    storage.save(tmp_path / "a")
    other.load(tmp_path / "a")
    assert (other.counts(), as_drafted(other)) == (storage.counts(), as_drafted(storage))
    other.save(str(tmp_path / "b"))
    header = Header(type(storage).__name__, 3, 100, lengths_of(make, 3).start)
    assert [*read(tmp_path / "a", header)] == [*read(tmp_path / "b", header)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    other.update([1, 2], 5)
    assert other.next_token([1, 2]) == (5, True)


def test_an_empty_storage_can_be_kept_too(tmp_path: Path) -> None:
    NGramStorage(3, 100).save(tmp_path / "a")
    storage = learned(NGramStorage)
    storage.load(tmp_path / "a")
    assert storage.counts() == {}


def test_a_smaller_storage_loads_the_most_useful_part(tmp_path: Path) -> None:
    whole, small = learned(NGramStorage), NGramStorage(3, 100, max_contexts=3)
    whole.save(tmp_path / "a")
    small.load(tmp_path / "a")
    assert len(small) == 3
    assert small.counts() == {context: whole.counts()[context] for context in [(1,), (2,), (1, 2)]}


@given(
    sightings=st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 3), min_size=1, max_size=2)), max_size=40),
    later=st.lists(st.integers(0, 9), max_size=10),
)
@settings(max_examples=100, deadline=None)
def test_a_loaded_storage_forgets_like_one_of_equal_ranks(
    tmp_path_factory: pytest.TempPathFactory, sightings: list[tuple[int, list[int]]], later: list[int]
) -> None:
    storage = OneLevelNGramStorage(2, 10, max_contexts=4)
    for context, tokens in sightings:
        storage.update([context], tokens)
    path = tmp_path_factory.mktemp("storage") / "a"
    storage.save(path)
    twins = [OneLevelNGramStorage(2, 10, max_contexts=4) for _ in range(2)]
    for twin in twins:
        twin.load(path)
        assert twin.counts() == storage.counts()
        for context in later:
            twin.update([context], 1)
    assert twins[0].counts() == twins[1].counts()
    assert len(twins[0]) <= 4


def refused_and_unharmed(storage: Storage, path: Path) -> str:
    before, rows = storage.counts(), as_drafted(storage)
    with pytest.raises(DecodeError) as refused:
        storage.load(path)
    assert (storage.counts(), as_drafted(storage)) == (before, rows)
    assert refused.value.parameter == "path"
    return str(refused.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    storage, path = learned(NGramStorage), tmp_path / "a"
    storage.save(path)
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        refused_and_unharmed(storage, path)
    path.write_bytes(content + b"\0")
    refused_and_unharmed(storage, path)


def test_a_file_with_a_bit_flipped_anywhere_is_refused(tmp_path: Path) -> None:
    storage, path = learned(NGramStorage), tmp_path / "a"
    storage.save(path)
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(bytes(flipped))
        refused_and_unharmed(storage, path)


@final
class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    @override
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_foreign_files_are_refused_and_run_nothing(tmp_path: Path) -> None:
    storage, path = learned(NGramStorage), tmp_path / "a"
    for content in (
        b"",
        b"{}",
        b"hello" * 100,
        pickle.dumps(Bomb(tmp_path / "mark")),
        save_tensors({"w": torch.ones(3)}),
    ):
        path.write_bytes(content)
        refused_and_unharmed(storage, path)
    torch.save({"w": Bomb(tmp_path / "mark")}, path)
    refused_and_unharmed(storage, path)
    assert not (tmp_path / "mark").exists()
    assert "does not exist" in refused_and_unharmed(storage, tmp_path / "nowhere")


def test_a_newer_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, path = learned(NGramStorage), tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(storage_file, "VERSION", 2)
        storage.save(path)
    assert "version 2" in refused_and_unharmed(storage, path)


def test_a_file_of_another_storage_is_refused(tmp_path: Path) -> None:
    storage, path = learned(NGramStorage), tmp_path / "a"
    for other, named in [
        (OneLevelNGramStorage(3, 100), "kind"),
        (NGramStorage(4, 100), "n"),
        (NGramStorage(3, 101), "vocab_size"),
    ]:
        other.save(path)
        assert f"another {named}," in refused_and_unharmed(storage, path)


@pytest.mark.parametrize(
    "rows",
    [
        [((1, 100), 1, {2: 1})],
        [((1, -1), 1, {2: 1})],
        [((1, 2), 1, {100: 1})],
        [((1, 2), 1, {2: 0})],
        [((1, 2), 1, {})],
        [((1, 2, 3), 1, {2: 1})],
        [((), 1, {2: 1})],
        [((1, 2), -1, {2: 1})],
        [((1, 2), 2, {2: 1}), ((1, 3), 1, {2: 1})],
        [((1, 2), 1, {2: 1}), ((1, 2), 1, {2: 5})],
    ],
)
def test_a_file_that_cannot_be_is_refused_though_its_checksum_fits(
    rows: list[tuple[tuple[int, ...], int, dict[int, int]]], tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(packed(Header("NGramStorage", 3, 100, 1), rows))
    assert "contradicts itself" in refused_and_unharmed(learned(NGramStorage), path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, path = learned(NGramStorage), tmp_path / "a"
    storage.save(path)
    content = path.read_bytes()
    storage.update([5], 6)

    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DecodeError, match="no space"):
        storage.save(path)
    assert path.read_bytes() == content
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


TABLE = Bigrams(numpy.array([[1], [0]]), numpy.array([[0.5], [0.25]], dtype=numpy.float32))

CORPUS = Corpus.of([[1, 2, 1, 3]], 5)

SAVES: list[Callable[[Path], object]] = [
    lambda path: learned(NGramStorage).save(path),
    TABLE.save,
    Recycled(5).save,
    CORPUS.save,
]
LOADS: list[Callable[[Path], object]] = [
    lambda path: NGramStorage(3, 100).load(path),
    Bigrams.load,
    lambda path: Recycled(5).load(path),
    lambda path: Corpus.load(path, 5),
]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o440])
def test_a_saved_file_keeps_its_mode(save: Callable[[Path], object], mode: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("save", SAVES)
def test_a_new_file_has_the_mode_that_new_files_have(save: Callable[[Path], object], tmp_path: Path) -> None:
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            save(tmp_path / str(mask))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / str(mask)).stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("save", SAVES)
def test_a_link_stays_and_what_it_points_to_is_replaced(save: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"old")
    for target in ("real/file", "real/new"):
        link = tmp_path / f"to {target.replace('/', ' ')}"
        link.symlink_to(target)
        save(link)
        assert link.is_symlink()
        assert (tmp_path / target).read_bytes() not in (b"", b"old")
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["file", "new"]


@pytest.mark.parametrize("deed", SAVES + LOADS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "in a file", "nowhere", "nul"])
def test_what_is_no_file_is_refused_and_stays(deed: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")
        case "loop":
            path.symlink_to(path)
        case "in a file":
            path.write_bytes(b"old")
            path = path / "b"
        case "nowhere":
            path = tmp_path / "no" / "such" / "folder"
        case "nul":
            path = Path("a\0b")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DecodeError) as refused:
        deed(path)
    assert refused.value.parameter == "path"
    assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("path", [None, 3, b"a", 1.5, True, ["a"], ""])
def test_a_path_is_a_text_or_a_path(path: object) -> None:
    for deed in SAVES + LOADS:
        with pytest.raises(DecodeError) as refused:
            deed(path)  # type: ignore[arg-type]
        assert refused.value.parameter == "path"


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("size", [2**20, 2**40, 2**63])
def test_a_header_that_claims_too_much_is_refused(load: Callable[[Path], object], size: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(size.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(DecodeError, match="truncated, corrupted"):
        load(tmp_path / "a")


def test_a_file_that_shrinks_while_it_is_read_does_not_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file would: its pages go away."""
    storage, path = learned(NGramStorage), tmp_path / "a"
    storage.save(path)
    load = vars(files)["load"]

    def shrinking(content: bytes) -> dict[str, Tensor]:
        os.truncate(path, 10)
        arrays: dict[str, Tensor] = load(content)
        return arrays

    monkeypatch.setattr(files, "load", shrinking)
    other = NGramStorage(3, 100)
    other.load(path)
    assert other.counts() == storage.counts()


def test_a_long_name_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    learned(NGramStorage).save(path)
    assert path.is_file()


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("vocab_size", [2**31, 2**31 + 1, 2**40, 2**62])
def test_ids_of_any_size_are_kept_as_they_are(make: Make, vocab_size: int, tmp_path: Path) -> None:
    storage, again = make(3, vocab_size), make(3, vocab_size)
    storage.initialize([0, 1, vocab_size - 1, 0, 1, vocab_size - 1])
    storage.save(tmp_path / "a")
    again.load(tmp_path / "a")
    assert again.counts() == storage.counts()
    assert again.next_token([0, 1]) == (vocab_size - 1, True)


LESSONS: list[object] = [[[1, 2]], [torch.tensor(1)]]
"""They hold no ids, and could be followers: several ids each."""

JUNK: list[object] = [
    None, "12", b"12", 1.5, object(), int, {1: 2}, {1, 2}, [1.0], [None], ["1"], *LESSONS, [True],
    torch.tensor([1.0, 2.0]), torch.tensor([True]), torch.ones(2, dtype=torch.long, device="meta"),
    torch.eye(2, dtype=torch.long).to_sparse(), torch.zeros(1, 1, 1, dtype=torch.long), numpy.array(["a"]),
    numpy.array([1.5]), iter([1]),
]  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
def test_what_holds_no_ids_is_refused_everywhere_and_nothing_is_learned(make: Make) -> None:
    storage = make(3, 10)
    storage.initialize([1, 2, 3])
    before = storage.counts()
    deeds: list[Callable[[Any], object]] = [
        storage.next_token,
        storage.has_gram,
        storage.initialize,
        lambda junk: storage.update(junk, 3),
        lambda junk: storage.update([1, 2], junk),
        lambda junk: storage.learn((1, 2), 1, [junk]),
    ]
    for junk in JUNK:
        for deed in deeds:
            with pytest.raises(DecodeError):
                deed(junk)
    for junk in JUNK:
        with pytest.raises(DecodeError):
            storage.continuation(junk)  # type: ignore[arg-type]
        if not any(junk is lesson for lesson in LESSONS):
            with pytest.raises(DecodeError):
                storage.learn((1, 2), 1, junk)  # type: ignore[arg-type]
        with pytest.raises(DecodeError):
            storage.learn(junk, 0, [[3]])  # type: ignore[arg-type]
    for start in (None, -1, 1.5, "1", 3):
        with pytest.raises(DecodeError):
            storage.learn((1, 2), start, [[3]])  # type: ignore[arg-type]
    assert storage.counts() == before


@pytest.mark.parametrize("make", KINDS)
def test_whatever_plainly_holds_ids_is_ids(make: Make) -> None:
    texts: list[object] = [
        [1, 2, 3, 1, 2], (1, 2, 3, 1, 2), torch.tensor([1, 2, 3, 1, 2]), torch.tensor([[1, 2, 3, 1, 2]]),
        torch.tensor([1, 2, 3, 1, 2], dtype=torch.uint8), numpy.array([1, 2, 3, 1, 2]),
        numpy.array([[1, 2, 3, 1, 2]], dtype=numpy.int32), [numpy.int64(i) for i in (1, 2, 3, 1, 2)],
    ]  # fmt: skip
    for text in texts:
        storage = make(3, 10)
        storage.initialize(text)  # type: ignore[arg-type]
        storage.update(text, 7)  # type: ignore[arg-type]
        storage.update(text, numpy.int64(7))  # type: ignore[arg-type]
        storage.learn(text, 5, [[7]])  # type: ignore[arg-type]
        assert storage.counts()[1, 2] == {3: 1, 7: 3}
        assert next(storage.continuation(text)) == (7, True)  # type: ignore[arg-type]
        assert answer(storage.next_token(text)) == (7, True)  # type: ignore[call-overload]


@pytest.mark.parametrize("make", KINDS)
def test_a_storage_is_made_of_whole_numbers(make: Make) -> None:
    assert make(numpy.int64(3), numpy.int32(10)).counts() == {}  # type: ignore[arg-type]
    for junk in (None, 2.5, "3", True, torch.tensor(3), 10**30, -1):
        for arguments in ((junk, 10), (3, junk)):
            with pytest.raises(DecodeError):
                make(*arguments)
    for junk in (2.5, "3", True, 0):
        with pytest.raises(DecodeError, match="max_contexts"):
            NGramStorage(3, 10, max_contexts=junk)  # type: ignore[arg-type]


@final
class Mumbling(INgramStorage):
    """A user's storage, whose answer is given."""

    def __init__(self, given: object) -> None:
        super().__init__(2, 10)
        self.given = given

    @override
    def next_token(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.given  # type: ignore[return-value]

    @override
    def has_gram(self, ngram: Tensor) -> bool:
        return False

    @override
    def update(self, input_ids: Tensor, next_tokens: Tensor) -> None: ...

    @override
    def initialize(self, input_ids: Tensor) -> None: ...

    @override
    def reset(self) -> None: ...


@pytest.mark.parametrize("given", [None, 3, (3,), (None, True), (torch.tensor([1.5]), True), (torch.tensor([]), True)])
def test_a_users_storage_that_gives_no_token_is_refused(given: object) -> None:
    with pytest.raises(DecodeError, match=r"token|answer"):
        next(Mumbling(given).continuation((1,)))
    assert next(Mumbling((torch.tensor([[4]]), torch.tensor([[True]]))).continuation((1,))) == (4, True)


@pytest.mark.parametrize(
    ("tokens", "chances"),
    [
        (None, numpy.ones((2, 1))),
        (torch.zeros(2, 1, dtype=torch.long), numpy.ones((2, 1))),
        ([[1], [0]], numpy.ones((2, 1))),
        (numpy.array([[1.0], [0.0]]), numpy.ones((2, 1))),
        (numpy.array([[1], [0]]), numpy.array([[1], [0]])),
        (numpy.array([[1], [0]]), numpy.array([[numpy.nan], [0.5]])),
        (numpy.array([[1], [0]]), numpy.array([[-0.1], [0.5]])),
        (numpy.array([[1], [0]]), numpy.array([[7.0], [0.5]])),
        (numpy.array(1), numpy.array(0.5)),
    ],
)
def test_bigrams_are_tables_of_tokens_and_probabilities(tokens: object, chances: object) -> None:
    with pytest.raises(DecodeError):
        Bigrams(tokens, chances)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [1, None, 0.5, "0", (None,), (0.5,), ("0",), (True,), torch.zeros(2, 2)])
def test_a_table_is_asked_about_texts_only(text: object) -> None:
    with pytest.raises(DecodeError):
        TABLE.after(text)  # type: ignore[arg-type]


def test_a_table_knows_what_follows_its_tokens() -> None:
    known: tuple[Any, ...] = ((1,), (0, 9, 1), [1], numpy.array([0, 1]), (numpy.int64(1),))
    unknown: tuple[tuple[int, ...], ...] = ((), (2,), (1, 2), (-1,))
    assert [TABLE.after(text) for text in known] == [[(0, 0.25)]] * 5
    assert [TABLE.after(text) for text in unknown] == [()] * 4


def test_a_target_that_gives_no_rows_of_the_vocabulary_is_refused() -> None:
    for target in (None, lambda tokens, nodes: None, lambda tokens, nodes: torch.zeros(len(nodes) + 1, 9)):
        with pytest.raises(DecodeError):
            Bigrams.of(target, (1,), 8, 2)  # type: ignore[arg-type]
    with pytest.raises(DecodeError, match="no token to begin with"):
        Bigrams.of(lambda tokens, nodes: torch.zeros(len(nodes) + 1, 8), (), 8, 2)


def test_forgetting_while_a_draft_is_read_ends_it() -> None:
    storage = NGramStorage(3, 10)
    storage.initialize([1, 2, 3, 4, 5])
    stream = storage.continuation((1, 2))
    assert next(stream) == (3, True)
    storage.reset()
    assert next(stream)[1] is False


def test_saving_waits_for_a_lesson_and_not_the_other_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the file is written, others learn; what is in it is one moment's."""
    storage = learned(NGramStorage)
    before, learning = storage.counts(), Event()
    write = files._write

    def teach() -> None:
        storage.update([8], 9)
        learning.set()

    def slow(target: Path, content: bytes) -> None:
        Thread(target=teach).start()
        assert learning.wait(10)
        write(target, content)

    monkeypatch.setattr(files, "_write", slow)
    storage.save(tmp_path / "a")
    again = NGramStorage(3, 100)
    again.load(tmp_path / "a")
    assert again.counts() == before
    assert storage.counts()[8,] == {9: 1}


@contextmanager
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as the interpreter allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_threads(deeds: Sequence[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def guarded(deed: Callable[[], None]) -> None:
        try:
            deed()
        except BaseException as failure:
            failures.append(failure)

    threads = [Thread(target=guarded, args=(deed,)) for deed in deeds]
    with eager_switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def test_threads_lose_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = NGramStorage(3, 10)
    count = counts.count

    def hesitant(seen: dict[int, int], tokens: Sequence[int]) -> dict[int, int]:
        copy = dict(seen)
        sleep(0)  # another thread's turn, between reading a count and writing it
        seen.update(count(copy, tokens))
        return seen

    monkeypatch.setattr(counts, "count", hesitant)
    text = (1, 2, 3, 1, 2, 4)

    def teach() -> None:
        for _ in range(300):
            storage.learn(text, 1, [[token] for token in text[1:]])

    def look() -> None:
        for _ in range(2000):
            token, known = storage.next_token([1, 2])
            assert not known or token in (3, 4)

    in_threads([teach, teach, teach, look])
    assert storage.counts()[1, 2] == {3: 900, 4: 900}
    assert storage.counts()[2,] == {3: 900, 4: 900}


def test_threads_see_no_known_context_disappear() -> None:
    storage = NGramStorage(2, 5000)
    storage.initialize([token for token in range(5000) for _ in range(2)])

    def teach() -> None:
        for token in range(4999):
            storage.update([token], token + 1)

    def look() -> None:
        for token in range(4999):
            assert storage.next_token([token])[1]

    in_threads([teach, look, look])


def test_threads_keep_a_bound_and_a_saved_file_is_whole(tmp_path: Path) -> None:
    storage = NGramStorage(4, 50, max_contexts=40)

    def teach() -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            storage.initialize(torch.randint(50, (8,), generator=generator).tolist())
            assert len(storage) <= 40

    def keep(name: str) -> None:
        for _ in range(20):
            storage.save(tmp_path / name)
            NGramStorage(4, 50).load(tmp_path / name)
            storage.load(tmp_path / name)

    in_threads([teach, teach, lambda: keep("a"), lambda: keep("b")])
    assert len(storage) == len(storage.counts()) <= 40


@pytest.mark.parametrize("path", ["a folder", 3, b"bytes", "a\0b"])
def test_what_is_not_a_file_is_not_called_corrupted(path: object, tmp_path: Path) -> None:
    with pytest.raises(DecodeError) as raised:
        NGramStorage(3, 10).load(tmp_path if path == "a folder" else cast(str, path))
    assert "corrupted" not in str(raised.value)
    assert "name a file" in str(raised.value)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_lessons_may_start_at_a_small_number_of_numpy(start: int) -> None:
    ours, theirs = NGramStorage(4, 9), NGramStorage(4, 9)
    ours.learn((1, 2, 3), start, [[4]])
    theirs.learn((1, 2, 3), numpy.uint8(start), [[4]])  # type: ignore[arg-type]
    assert ours.counts() == theirs.counts()
