"""A real model obeys: every answer is what the grammar says, with drafts and without, by llguidance and by xgrammar."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import torch
from torch.nn import Module

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    Processor,
    SuffixDrafter,
    Tokens,
    limits_of,
    run,
    speculative_step,
    start,
    then,
)
from specflow.cli import main
from specflow.constraints import Constrained, CutForbidden, Forced, Grammar
from specflow.drafters import propose_nothing
from specflow.interop import Generate, InOrder, ProcessorList
from specflow.models import Loaded
from specflow.stages import Adjust, Draft, Reject, Verify, ending
from specflow.state import Drafter, Finished

SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["happy", "sad"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,6}$"}, "maxItems": 2},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
COMPACT: Final = {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}


def decoded(
    loaded: Loaded,
    model: Module,
    grammar: Grammar,
    processor: Processor,
    drafter: Callable[[Any], Drafter],
    new: int = 90,
    seed: int = 0,
) -> Finished:
    prompt = loaded.chat("Describe a person as JSON.")
    answer, dice = grammar.after(prompt), Dice(torch.Generator().manual_seed(seed))
    draft, cut, adjust = Draft(drafter(answer), Fixed(8)), CutForbidden(answer), Adjust(dice)
    verify = Verify(CachedPredictor(model), Constrained(processor, answer), Reject(dice))
    end = ending(answer.is_over)
    state = start(prompt, new, loaded.stop, limits_of(model)).unwrap()
    finished = run(lambda state: state.then(draft).then(cut).then(verify).then(adjust).then(end), state)
    assert answer.is_complete(finished.state)
    return finished


@pytest.mark.parametrize("schema", [SCHEMA, COMPACT], ids=["any spaces", "no spaces"])
def test_answers_are_valid_and_drafts_change_none(
    smollm2: Loaded, fast_smollm2: Module, schema: dict[str, Any]
) -> None:
    grammar = Grammar.json_schema(schema, smollm2.tokenizer, smollm2.stop)
    for seed, processor in enumerate((GreedyProcessor(), MultinomialProcessor(1.0), MultinomialProcessor(1.0))):
        given = smollm2, fast_smollm2, grammar, processor
        alone = decoded(*given, lambda answer: propose_nothing, seed=seed)
        drafted = decoded(*given, lambda answer: then(Forced(answer), SuffixDrafter()), seed=seed)
        assert drafted.state.tokens == alone.state.tokens
        jsonschema.validate(json.loads(smollm2.tokenizer.decode(alone.state.output, skip_special_tokens=True)), SCHEMA)
        assert drafted.state.tally.steps < alone.state.tally.steps


@pytest.mark.parametrize("text", ["naïve 😀 café", 'a"b\\c/d', "日本語\n"])
def test_a_lone_choice_is_said_byte_by_byte(smollm2: Loaded, fast_smollm2: Module, text: str) -> None:
    """Characters of several tokens, and what a grammar has to quote."""
    grammar = Grammar.choice([text, text + "!"], smollm2.tokenizer, smollm2.stop)
    finished = decoded(smollm2, fast_smollm2, grammar, GreedyProcessor(), Forced)
    assert smollm2.tokenizer.decode(finished.state.output, skip_special_tokens=True) in (text, text + "!")
    pattern = Grammar.regex(re.escape(text), smollm2.tokenizer, smollm2.stop)
    finished = decoded(smollm2, fast_smollm2, pattern, GreedyProcessor(), Forced)
    assert smollm2.tokenizer.decode(finished.state.output, skip_special_tokens=True) == text


def test_xgrammar_goes_through_the_same_door(smollm2: Loaded, fast_smollm2: Module) -> None:
    pytest.importorskip("xgrammar")
    from specflow.constraints.xgrammar import ebnf, json_schema, regex  # noqa: PLC0415 - xgrammar is not everywhere

    size = limits_of(smollm2.model).vocab_size or 0
    parts = smollm2.tokenizer, smollm2.stop, size
    for seed, processor in enumerate((GreedyProcessor(), MultinomialProcessor(1.0))):
        grammar = json_schema(SCHEMA, *parts)
        given = smollm2, fast_smollm2, grammar, processor
        alone = decoded(*given, lambda answer: propose_nothing, seed=seed)
        drafted = decoded(*given, lambda answer: then(Forced(answer), SuffixDrafter()), seed=seed)
        assert drafted.state.tokens == alone.state.tokens
        jsonschema.validate(json.loads(smollm2.tokenizer.decode(alone.state.output, skip_special_tokens=True)), SCHEMA)
        assert drafted.state.tally.steps < alone.state.tally.steps
    for grammar, texts in ((regex("yes|no", *parts), "yes|no"), (ebnf('root ::= "so" | "so so"', *parts), "so( so)?")):
        ids = decoded(smollm2, fast_smollm2, grammar, GreedyProcessor(), Forced).state.output
        said = smollm2.tokenizer.decode(ids[:-1])
        assert re.fullmatch(texts, said) is not None or re.fullmatch(texts[:-1], said) is not None
    with pytest.raises(DecodeError, match="xgrammar does not take"):
        regex("(", *parts)


def _speculative(loaded: Loaded, processor: Processor, prompt: Tokens) -> Tokens:
    step = speculative_step(SuffixDrafter(), CachedPredictor(loaded.model), processor, Dice())
    return run(step, start(prompt, 30, loaded.stop).unwrap()).state.output


def test_xgrammars_own_processor_obeys_under_drafts(short: Loaded) -> None:
    """In `Generate` and `InOrder` as it is; `ProcessorList`, which would have to copy it, refuses it and names them."""
    xgrammar: Any = pytest.importorskip("xgrammar")
    contrib: Any = pytest.importorskip("xgrammar.contrib.hf")
    size = limits_of(short.model).vocab_size
    known = xgrammar.TokenizerInfo.from_huggingface(short.tokenizer, vocab_size=size, stop_token_ids=[2])
    compiled = xgrammar.GrammarCompiler(known).compile_json_schema(json.dumps(SCHEMA))
    prompt, model = short.chat("Describe a person as JSON."), short.model
    ids, plain = torch.tensor([prompt]), {"do_sample": False, "max_new_tokens": 30}
    generate: Any = model.generate
    theirs = generate(ids, logits_processor=[contrib.LogitsProcessor(compiled)], **plain)[0, len(prompt) :].tolist()
    drafted = generate(
        ids,
        logits_processor=[contrib.LogitsProcessor(compiled)],
        custom_generate=Generate(SuffixDrafter()),
        **plain,
    )
    assert drafted[0, len(prompt) :].tolist() == theirs
    assert list(_speculative(short, InOrder([contrib.LogitsProcessor(compiled)]), prompt)) == theirs
    with pytest.raises(DecodeError, match="use InOrder"):
        ProcessorList([contrib.LogitsProcessor(compiled)])


class ByLLGuidance:
    """A logits processor as people write it over llguidance, which brings none itself."""

    def __init__(self, tokenizer: object, schema: dict[str, Any]) -> None:
        llguidance: Any = pytest.importorskip("llguidance")
        hf: Any = pytest.importorskip("llguidance.hf")
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        self.matcher = llguidance.LLMatcher(hf.from_tokenizer(tokenizer), grammar)
        self.is_new = True

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.is_new:
            assert self.matcher.consume_token(int(ids[0, -1]))
        self.is_new = False
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
        return scores.masked_fill(allowed[: scores.shape[1]] == 0, -torch.inf)


def test_a_processor_over_llguidance_obeys_under_drafts(short: Loaded) -> None:
    prompt, generate = short.chat("Describe a person as JSON."), short.model.generate
    ids, plain = torch.tensor([prompt]), {"do_sample": False, "max_new_tokens": 30}
    calls: Any = generate
    theirs = calls(ids, logits_processor=[ByLLGuidance(short.tokenizer, COMPACT)], **plain)[0, len(prompt) :].tolist()
    drafted = calls(
        ids,
        logits_processor=[ByLLGuidance(short.tokenizer, COMPACT)],
        custom_generate=Generate(SuffixDrafter()),
        **plain,
    )
    assert drafted[0, len(prompt) :].tolist() == theirs
    assert list(_speculative(short, InOrder([ByLLGuidance(short.tokenizer, COMPACT)]), prompt)) == theirs
    with pytest.raises(DecodeError, match="use InOrder"):
        ProcessorList([ByLLGuidance(short.tokenizer, COMPACT)])
    # And ours says what theirs says.
    grammar = Grammar.json_schema(COMPACT, short.tokenizer, short.stop)
    law = Constrained(GreedyProcessor(), grammar.after(prompt))
    assert list(_speculative(short, law, prompt)) == theirs


def test_prefix_allowed_tokens_fn_is_honoured_under_drafts(short: Loaded) -> None:
    """With a matcher of ours in it, though it keeps a state of its own."""
    prompt = short.chat("Describe a person as JSON.")
    generate: Any = short.model.generate

    def allowed() -> Callable[[int, torch.Tensor], list[int]]:
        answer = Grammar.json_schema(COMPACT, short.tokenizer, short.stop).after(prompt)
        size = limits_of(short.model).vocab_size or 0
        return lambda batch, ids: list(answer.allowed(tuple(ids.tolist()), size).nonzero().flatten().tolist())

    ids, plain = torch.tensor([prompt]), {"do_sample": False, "max_new_tokens": 30}
    theirs = generate(ids, prefix_allowed_tokens_fn=allowed(), **plain)
    drafted = generate(
        ids, prefix_allowed_tokens_fn=allowed(), custom_generate=Generate(SuffixDrafter(), Fixed(6)), **plain
    )
    assert drafted.tolist() == theirs.tolist()


# The command.


def test_the_command_prints_the_answer_and_nothing_else(
    smollm2: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA), encoding="utf-8-sig")  # as some editors keep it
    assert main(["generate", "Describe a person as JSON.", "--json-schema", str(file), "--seed", "1", "--sample"]) == 0
    printed = capsys.readouterr()
    jsonschema.validate(json.loads(printed.out), SCHEMA)
    assert "tokens/s" in printed.err
    assert main(["generate", "Is the sky blue?", "--choices", "yes", "no"]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")
    assert main(["generate", "When?", "--regex", "[0-9]{4}-[0-9]{2}", "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch("[0-9-]{1,7}\n", printed.out) is not None
    assert "beginning of one" in printed.err
    assert main(["generate", "When?", "--regex", "in [0-9]{4}", "--stop", "in"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("in")
    assert "beginning of one" not in printed.err  # more room would not make it longer
    lark = tmp_path / "grammar.lark"
    lark.write_text('start: "red" | "green"', encoding="utf-8-sig")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"id": 1, "prompt": "A colour?"}\n{"id": 2, "prompt": "Another?"}\n')
    assert main(["generate", "--file", str(prompts), "--out", str(out), "--grammar", str(lark), "--slots", "2"]) == 0
    answers = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert len(answers) == 2
    assert set(answers) <= {"red", "green"}


@pytest.mark.parametrize(
    "options",
    [
        ["--regex", "("],
        ["--regex", "a", "--choices", "b"],
        ["--json-schema", "nowhere.json"],
        ["--choices", ""],
    ],
)
def test_the_command_refuses_what_is_no_grammar(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Hm?", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
