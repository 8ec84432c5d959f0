"""Decoders under lm-eval: the scores and the texts of its own `hf` model, whatever drafts them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

import pytest
import torch
from greenlet import GreenletExit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    LLMDrafter,
    MultinomialProcessor,
    Processor,
    Proposal,
    Step,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.batch import BatchPredictor
from specflow.models import Loaded
from specflow.stages.observe import Observer, unobserved
from specflow.state import Committed
from tests.test_bench import tokenizer
from tests.toys import disturbed, oracle, tiny_llama

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'specflow[lm-eval]'")

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.result_schema import EvalResults
from lm_eval.tasks import TaskManager

from specflow.interop.lm_eval import Compose, Limited, SpecflowLM

CONTEXT, NEW = 64, 24


@pytest.fixture(autouse=True, scope="module")
def _no_report_of_the_machine() -> Iterator[None]:
    """lm-eval adds one to its results, for which it asks pip and more: it takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield


PROMPTS: Final = ((5, 6, 7, 5), (9, 3), (11, 12, 11), tuple(range(1, 60)) * 2, (8,), (20, 21))
"""One of them is longer than the context."""


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def model(seed: int = 0) -> PreTrainedModel:
    """A model whose text ends where its tokenizer's does."""
    made = tiny_llama(seed, context=CONTEXT)
    made.generation_config.eos_token_id = 0
    return made


MODEL: Final = model()


def said(prompt: Sequence[int]) -> str:
    """What the model says, up to w7."""
    told = oracle(prompt[-(CONTEXT - NEW) :], MODEL, NEW, {0, 7})
    return words([token for token in told if token not in {0, 7}])


def task(name: str, rows: Sequence[Mapping[str, object]], **config: object) -> dict[str, object]:
    """A task whose rows are here. A function gives them, so that nothing is looked for elsewhere."""
    rows_only = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}, "test_split": "test"}
    return {"task": name, **rows_only, **config}


WRITTEN: Final = task(
    "written",  # of every other prompt the answer is the model's own, so that half is right
    [{"prompt": words(ids), "answer": said(ids) if i % 2 else "w1"} for i, ids in enumerate(PROMPTS)],
    output_type="generate_until",
    doc_to_text="{{prompt}}",
    doc_to_target="{{answer}}",
    generation_kwargs={"until": ["w7"], "max_gen_toks": NEW},
    metric_list=[{"metric": "exact_match"}],
)
CHOSEN: Final = task(
    "chosen",
    [
        {"prompt": words(ids), "choices": ["w4", words(oracle(ids[:3], MODEL, 3)), "w4 w9"], "right": i % 2}
        for i, ids in enumerate(PROMPTS)
    ],
    output_type="multiple_choice",
    doc_to_text="{{prompt}}",
    doc_to_target="{{right}}",
    doc_to_choice="{{choices}}",
    metric_list=[{"metric": "acc"}],
)
READ: Final = task(
    "read",
    [{"text": words(ids * 2)} for ids in PROMPTS],
    output_type="loglikelihood_rolling",
    doc_to_text="",
    doc_to_target="{{text}}",
    metric_list=[{"metric": "word_perplexity"}],
)


def evaluated(
    lm: SpecflowLM | HFLM,
    *tasks: dict[str, object] | str,
    use_cache: str | None = None,
    chat: bool = False,
    manager: TaskManager = TaskManager(include_defaults=False),
) -> EvalResults:
    return simple_evaluate(
        lm, tasks=[*tasks], task_manager=manager, bootstrap_iters=0, use_cache=use_cache, apply_chat_template=chat
    )


def asked(*arguments: object) -> Instance:
    return Instance("generate_until", {}, arguments, 0)


def told(results: EvalResults, name: str) -> list[object]:
    """What a model said to each request of a task."""
    return [sample["resps"] for sample in results["samples"][name]]


def plain(target: Limited) -> Compose:
    return lambda processor: autoregressive_step(target, processor, Dice())


def drafting(target: Limited, observe: Observer = unobserved) -> Compose:
    """Drafts of a model that is right most of the time."""
    drafter = CachedPredictor(disturbed(MODEL, 1, 0.1))

    def compose(processor: Processor) -> Step:
        drafts, dice = LLMDrafter(drafter, processor, Dice()), Dice()
        return speculative_step(drafts, target, processor, dice, Fixed(4), observe=observe)

    return compose


@pytest.fixture(scope="module")
def theirs() -> EvalResults:
    """What lm-eval's own model says."""
    return evaluated(HFLM(MODEL, tokenizer=tokenizer(), batch_size=1), WRITTEN, CHOSEN, READ)


@pytest.mark.parametrize("compose", [plain, drafting])
@pytest.mark.parametrize("target", [CachedPredictor(MODEL), BatchPredictor(MODEL, 3)], ids=["alone", "batched"])
def test_scores_and_texts_are_those_of_the_model_itself(
    target: Limited, compose: Callable[[Limited], Compose], theirs: EvalResults
) -> None:
    ours = evaluated(SpecflowLM(target, tokenizer(), compose(target), slots=3), WRITTEN, CHOSEN, READ)
    assert told(ours, "written") == told(theirs, "written")
    assert ours["results"]["written"] == theirs["results"]["written"]
    assert 0 < ours["results"]["written"]["exact_match,none"] < 1
    assert ours["results"]["chosen"] == theirs["results"]["chosen"]
    assert 0 < ours["results"]["chosen"]["acc,none"] < 1
    torch.testing.assert_close(told(ours, "chosen"), told(theirs, "chosen"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(told(ours, "read"), told(theirs, "read"), rtol=1e-9, atol=1e-9)


FACTS: Final = (
    ("What is the capital of France?", "Paris"),
    ("What is the opposite of hot?", "cold"),
    ("What do bees make?", "honey"),
)

TASK: Final = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}}}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
"""

TASKS: Final = {
    "asked": 'output_type: generate_until\ngeneration_kwargs: {until: [".", "\\n"], max_gen_toks: 16}\n'
    "metric_list: [{metric: exact_match}]\n",
    "picked": f"output_type: multiple_choice\ndoc_to_choice: {json.dumps([answer for _, answer in FACTS])}\n"
    "metric_list: [{metric: acc}]\n",
}


@pytest.mark.parametrize("chat", [False, True])
def test_the_real_model_on_tasks_of_files(chat: bool, smollm2: Loaded, tmp_path: Path) -> None:
    """Tasks as lm-eval's users write them, with and without the model's chat template."""
    target = CachedPredictor(smollm2.model)
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in FACTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    for name, config in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path) + config)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def compose(processor: Processor) -> Step:
        return speculative_step(SuffixDrafter(), target, processor, Dice(), Fixed(4))

    lms = (
        SpecflowLM(target, smollm2.tokenizer, compose, stop=smollm2.stop),
        HFLM(smollm2.model, tokenizer=smollm2.tokenizer, batch_size=1),
    )
    ours, theirs = (evaluated(lm, *TASKS, chat=chat, manager=manager) for lm in lms)
    for name in TASKS:
        arguments = [[sample["arguments"] for sample in each["samples"][name]] for each in (ours, theirs)]
        assert arguments[0] == arguments[1]
        assert ours["results"][name] == theirs["results"][name]
    assert told(ours, "asked") == told(theirs, "asked")
    assert told(ours, "asked") != [[[""]]] * len(FACTS)
    torch.testing.assert_close(told(ours, "picked"), told(theirs, "picked"), rtol=1e-4, atol=1e-3)  # fp32


def test_drafts_are_accepted_and_rejected_meanwhile() -> None:
    counts: list[tuple[int, int]] = []
    target = CachedPredictor(MODEL)

    def observe(committed: Committed) -> None:
        verified = committed.adjusted.verified
        counts.append((verified.accepted, len(verified.drafted.proposals)))

    requests = [asked(words(ids), {"max_gen_toks": NEW}) for ids in PROMPTS]
    SpecflowLM(target, tokenizer(), drafting(target, observe)).generate_until(requests, disable_tqdm=True)
    assert 0 < sum(accepted for accepted, _ in counts) < sum(drafted for _, drafted in counts)


def test_another_model_has_another_score(theirs: EvalResults) -> None:
    other = CachedPredictor(model(1))
    scores = evaluated(SpecflowLM(other, tokenizer(), plain(other)), WRITTEN, READ)["results"]
    assert scores["written"]["exact_match,none"] < theirs["results"]["written"]["exact_match,none"]
    assert scores["read"] != theirs["results"]["read"]


TEMPLATE: Final = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %} w3"


def test_chat_templates_and_texts_that_begin_with_bos() -> None:
    """In a template's text the first token stands already."""
    target = CachedPredictor(MODEL)
    for_ours, for_hf = tokenizer(), tokenizer()
    for each in (for_ours, for_hf):
        each.bos_token, each.chat_template = "w2", TEMPLATE
        each.backend_tokenizer.post_processor = TemplateProcessing("w2 $A", special_tokens=[("w2", 2)])
    lm, hf = SpecflowLM(target, for_ours, drafting(target)), HFLM(MODEL, tokenizer=for_hf)
    without_context = lm.loglikelihood([asked("", "w6")]), hf.loglikelihood([asked("", "w6")])
    torch.testing.assert_close(*without_context, rtol=1e-9, atol=1e-9)
    assert lm.tok_encode("w2 w5") == lm.tok_encode("w5") == [2, 5]
    assert lm.tok_encode("w5", add_special_tokens=False) == [5]
    ours, theirs = (evaluated(each, WRITTEN, CHOSEN, chat=True) for each in (lm, hf))
    assert ours["samples"]["written"][0]["arguments"] == theirs["samples"]["written"][0]["arguments"]
    assert told(ours, "written") == told(theirs, "written")
    torch.testing.assert_close(told(ours, "chosen"), told(theirs, "chosen"), rtol=1e-9, atol=1e-9)


def test_what_lm_eval_has_cached_is_not_decoded_again(tmp_path: Path) -> None:
    target = CachedPredictor(MODEL)
    tasks, cache = (WRITTEN, CHOSEN, READ), str(tmp_path / "cache")
    first = evaluated(SpecflowLM(target, tokenizer(), drafting(target)), *tasks, use_cache=cache)

    class Silent:
        limits = target.limits

        def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> torch.Tensor:
            raise AssertionError("it is asked")

    silent = Silent()
    again = evaluated(SpecflowLM(silent, tokenizer(), plain(silent)), *tasks, use_cache=cache)
    assert again["results"] == first["results"]


def test_an_answer_is_cached_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is there after an interruption."""
    target, kept = CachedPredictor(MODEL), list[tuple[str, object, object]]()
    lm = SpecflowLM(target, tokenizer(), plain(target))
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *answer: kept.append(answer))
    good, bad = asked("w5 w6", {"max_gen_toks": 2}), asked("w5", {"num_beams": 2})
    with pytest.raises(DecodeError):
        lm.generate_until([good, bad], disable_tqdm=True)
    assert kept == [("generate_until", good.args, "w16 w26")]
    lm.loglikelihood([asked("w5", " w6")], disable_tqdm=True)
    lm.loglikelihood_rolling([asked("w5")], disable_tqdm=True)
    assert [answer[:2] for answer in kept[1:]] == [("loglikelihood", ("w5", " w6")), ("loglikelihood_rolling", ("w5",))]


def test_a_request_that_fails_ends_the_others() -> None:
    target, unwound = BatchPredictor(MODEL, slots=2), list[Tokens]()

    class Asked:
        limits = target.limits

        def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> torch.Tensor:
            try:
                return target(tokens, drafts)
            except GreenletExit:
                unwound.append(tokens)
                raise

    lm = SpecflowLM(Asked(), tokenizer(), plain(Asked()), slots=2)
    with pytest.raises(DecodeError) as raised:
        lm.generate_until([asked("w5 w6", {"max_gen_toks": 2}), asked("w5", {"num_beams": 2})], disable_tqdm=True)
    assert (len(unwound), raised.value.parameter) == (1, "gen_kwargs")


# Requests, without an evaluation.


def test_a_text_without_a_context_follows_the_token_that_stands_before_texts() -> None:
    target = CachedPredictor(MODEL)
    lm, hf = SpecflowLM(target, tokenizer(), plain(target)), HFLM(MODEL, tokenizer=tokenizer())
    requests = [asked("", "w5 w6"), asked("", "w0 w6"), asked("w5 ", "w6")]
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    torch.testing.assert_close(lm.loglikelihood(requests, disable_tqdm=True), expected, rtol=1e-9, atol=1e-9)
    assert lm.loglikelihood_rolling([asked("")], disable_tqdm=True) == [0]


def test_the_likeliest_continuation_is_known_as_that() -> None:
    target = CachedPredictor(MODEL)
    lm = SpecflowLM(target, tokenizer(), plain(target))
    likeliest = words(oracle([5, 6], MODEL, 3))
    scores = lm.loglikelihood([asked("w5 w6", f" {likeliest}"), asked("w5 w6", f" {likeliest} w1 w1")])
    assert [is_likeliest for _, is_likeliest in scores] == [True, False]


def test_a_text_ends_at_its_first_stop_string_however_many_tokens_a_step_adds() -> None:
    """The second string begins inside the first, and is whole later: it is not reached."""
    target = CachedPredictor(MODEL)
    one, two, three = words(oracle([9, 3], MODEL, 3, {0})).split()
    arguments = {"max_gen_toks": 9, "until": [f"{two[1:]} {three}", f"{one} {two}"]}

    def at_once(processor: Processor) -> Step:
        step = plain(target)(processor)
        return lambda state: run(step, state)

    for compose in (plain(target), at_once):
        lm = SpecflowLM(target, tokenizer(), compose)
        assert lm.generate_until([asked("w9 w3", arguments)], disable_tqdm=True) == [""]


def test_a_text_is_decoded_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    target, decoded = CachedPredictor(MODEL), list[int]()

    def at_once(processor: Processor) -> Step:
        step = plain(target)(processor)
        return lambda state: run(step, state)

    lm = SpecflowLM(target, tokenizer(), at_once)
    decode = lm.tokenizer.decode

    def noted(ids: Sequence[int], **named: bool) -> str:
        decoded.append(len(ids))
        return str(decode(ids, **named))

    monkeypatch.setattr(lm.tokenizer, "decode", noted)
    lm.generate_until([asked("w9 w3", {"max_gen_toks": 9, "until": ["never"]})], disable_tqdm=True)
    assert 0 < len([length for length in decoded if length > 1]) <= 2


def test_temperature_is_a_processors() -> None:
    target, temperatures = CachedPredictor(MODEL), list[float]()

    def compose(processor: Processor) -> Step:
        temperatures.append(processor.temperature if isinstance(processor, MultinomialProcessor) else 0)
        return autoregressive_step(target, processor, Dice(torch.Generator().manual_seed(1)))

    lm = SpecflowLM(target, tokenizer(), compose)
    arguments: list[dict[str, object]] = [
        {"do_sample": True, "temperature": 0.7},
        {"temperature": 0.7},
        {"do_sample": True},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 3},
        {},
    ]
    texts = lm.generate_until([asked("w5 w6", each | {"max_gen_toks": 9}) for each in arguments], disable_tqdm=True)
    assert temperatures == [0.7, 0.7, 1, 0, 0]
    step = autoregressive_step(target, MultinomialProcessor(0.7), Dice(torch.Generator().manual_seed(1)))
    output = run(step, start([5, 6], 9, [0]).unwrap()).state.output
    assert texts[0] == texts[1] == words([token for token in output if token])
    assert texts[3] == texts[4] == "w16 w26" != texts[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "'num_beams'"),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, "'top_p'"),
        ({"do_sample": True, "temperature": 0.0}, "not a positive number"),
        ({"max_gen_toks": CONTEXT}, "no room for a prompt"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_its_request(arguments: dict[str, object], message: str) -> None:
    target = CachedPredictor(MODEL)
    lm = SpecflowLM(target, tokenizer(), plain(target))
    with pytest.raises(DecodeError, match=message) as caught:
        lm.generate_until([asked("w5", {"max_gen_toks": 2}), asked("w5", arguments)], disable_tqdm=True)
    assert caught.value.__notes__ == ["in request 1 of generate_until"]


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    target = CachedPredictor(MODEL)
    with pytest.raises(DecodeError, match=f"longer than the context of {CONTEXT}: received {CONTEXT + 2} tokens"):
        SpecflowLM(target, tokenizer(), plain(target)).loglikelihood([asked("w5", " w6" * (CONTEXT + 2))])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("target", value) for value in (None, 3, MODEL, lambda tokens, drafts: tokens)],
        *[("tokenizer", value) for value in (None, "gpt2", MODEL)],
        *[("compose", value) for value in (None, 3, MODEL)],
        *[("stop", value) for value in (None, "w0", 1.5, [1.5], [True])],
        *[("slots", value) for value in (None, 0, -1, 1.5, True, torch.tensor(2))],
    ],
)
def test_what_it_cannot_be_made_of_is_refused(name: str, value: object) -> None:
    target = CachedPredictor(MODEL)
    parts: dict[str, object] = {"target": target, "tokenizer": tokenizer(), "compose": plain(target), name: value}
    make: Callable[..., object] = SpecflowLM
    with pytest.raises(DecodeError):
        make(**parts)


def test_a_tokenizer_that_ends_no_text_is_refused() -> None:
    endless, target = tokenizer(), CachedPredictor(MODEL)
    endless.eos_token = None
    with pytest.raises(DecodeError, match="no token that ends a text"):
        SpecflowLM(target, endless, plain(target))


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "specflow.interop.lm_eval")
    with pytest.raises(DecodeError, match=r"lm-eval is missing: .*; run `pip install 'specflow\[lm-eval\]'`"):
        import_module("specflow.interop.lm_eval")
