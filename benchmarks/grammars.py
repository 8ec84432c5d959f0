"""Answers that obey JSON schemas: whether they do, whether drafts change them, and what each decoder's tokens cost.

    python -m benchmarks.grammars --texts 40

decodes texts for each of 20 schemas with SmolLM2: under the grammar alone, with forced drafts, with forced drafts and
what the text repeats (all over the model of `accelerate.fast`), and in `generate` with a processor over llguidance and
with xgrammar's own, where it is installed. The texts of a schema are greedy for the first prompt and sampled by seeds
for the others. Decoders take turns; a figure is tokens a second over all texts of a schema.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any, Final, TypeAlias, final

import jsonschema
import torch
from attrs import define, field

from specflow import (
    CachedPredictor,
    Dice,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    Predictor,
    Processor,
    SuffixDrafter,
    Tokens,
    limits_of,
    start,
    then,
    unfold,
)
from specflow.accelerate import fast
from specflow.constraints import Constrained, Constraint, CutForbidden, Forced, Grammar, Matcher
from specflow.drafters import propose_nothing
from specflow.models import Loaded, load
from specflow.stages import Adjust, Draft, Reject, Verify, ending
from specflow.state import DecodeState, Drafter, Finished

Schema: TypeAlias = dict[str, Any]


def thing(needed: Mapping[str, Schema], **optional: Schema) -> Schema:
    """An object with these fields and no others."""
    fields = {**needed, **optional}
    return {"type": "object", "properties": fields, "required": list(needed), "additionalProperties": False}


def text(most: int = 24) -> Schema:
    return {"type": "string", "maxLength": most}


def like(pattern: str) -> Schema:
    return {"type": "string", "pattern": f"^{pattern}$"}


def whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def several(items: Schema, least: int = 1, most: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


YES_OR_NO: Final[Schema] = {"type": "boolean"}
DAY: Final = like("20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])")
CLOCK: Final = like("([01][0-9]|2[0-3]):[0-5][0-9]")
VERSION: Final = like("[0-9]{1,2}\\.[0-9]{1,2}\\.[0-9]{1,2}")
PLACE: Final[Schema] = {
    "type": "array",
    "prefixItems": [
        {"type": "number", "minimum": -180, "maximum": 180},
        {"type": "number", "minimum": -90, "maximum": 90},
    ],
    "items": False,
    "minItems": 2,
}

SCHEMAS: Final[dict[str, Schema]] = {
    "package manifest": thing(
        {"name": like("[a-z][a-z-]{2,15}"), "version": VERSION, "license": one_of("MIT", "Apache-2.0", "ISC")},
        description=text(40),
        private=YES_OR_NO,
    ),
    "dependencies": thing(
        {"dependencies": several(thing({"package": like("[a-z-]{3,12}"), "minimumVersion": VERSION}))}
    ),
    "address": thing(
        {"streetAddress": text(), "locality": text(16), "postalCode": like("[0-9]{5}"), "countryName": text(16)},
        postOfficeBox=text(8),
    ),
    "calendar event": thing(
        {"summary": text(), "startDate": DAY, "startTime": CLOCK, "durationInMinutes": whole(5, 480)}, location=text()
    ),
    "point on a map": thing(
        {"type": {"const": "Feature"}, "geometry": thing({"type": {"const": "Point"}, "coordinates": PLACE})}
    ),
    "line on a map": thing({"type": {"const": "LineString"}, "coordinates": several(PLACE, 2, 4)}),
    "call of a weather tool": thing(
        {
            "tool": {"const": "get_current_weather"},
            "arguments": thing({"location": text(20), "temperatureUnit": one_of("celsius", "fahrenheit")}),
        }
    ),
    "call of one of two tools": {
        "anyOf": [
            thing({"tool": {"const": "search_the_web"}, "arguments": thing({"searchQuery": text(30)})}),
            thing(
                {
                    "tool": {"const": "calculate"},
                    "arguments": thing({"firstNumber": whole(0, 99), "secondNumber": whole(0, 99)}),
                }
            ),
        ]
    },
    "job posting": thing(
        {"jobTitle": text(), "employmentType": one_of("fullTime", "partTime", "contract"), "remote": YES_OR_NO},
        salaryPerYear=whole(10000, 200000),
    ),
    "card of a person": thing(
        {"fullName": like("[A-Z][a-z]{1,9} [A-Z][a-z]{1,9}"), "birthDate": DAY, "nickNames": several(text(10), 0, 2)}
    ),
    "recipe": thing(
        {
            "title": text(),
            "servings": whole(1, 12),
            "ingredients": several(thing({"name": text(12), "grams": whole(1, 900)})),
        }
    ),
    "film": thing(
        {"title": text(), "releaseYear": whole(1900, 2030), "genres": several(one_of("drama", "comedy", "horror"))}
    ),
    "health record": thing(
        {"patientIdentifier": like("P[0-9]{6}"), "bloodType": one_of("A", "B", "AB", "0"), "emergency": YES_OR_NO}
    ),
    "order": thing(
        {
            "orderNumber": like("[A-Z]{2}-[0-9]{4}"),
            "items": several(thing({"productName": text(16), "quantity": whole(1, 20)})),
            "deliveryAddress": thing({"street": text(), "city": text(16)}),
        }
    ),
    "device": thing(
        {"deviceType": one_of("sensor", "switch", "camera"), "ipAddress": like("10\\.0\\.[0-9]{1,2}\\.[0-9]{1,2}")}
    ),
    "colour theme": thing(
        {"primaryColour": like("#[0-9a-f]{6}"), "backgroundColour": like("#[0-9a-f]{6}"), "darkMode": YES_OR_NO}
    ),
    "review": thing({"ratingFromOneToFive": whole(1, 5), "reviewText": text(60), "wouldRecommend": YES_OR_NO}),
    "sentiment": thing({"sentiment": one_of("positive", "neutral", "negative"), "confidencePercent": whole(0, 100)}),
    "matrix": thing({"rows": several(several(whole(-9, 9), 3, 3), 2, 3)}),
    "settings": thing(
        {
            "logging": thing({"level": one_of("debug", "info", "error"), "maximumFileSize": whole(1, 512)}),
            "network": thing({"port": whole(1024, 65535), "useEncryption": YES_OR_NO}),
        },
        comment=text(20),
    ),
}
"""A dozen of them follow public specifications, in words of our own; no spaces between the parts."""


@final
@define(eq=False)
class Clock:
    """The time that grammars take, in seconds."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self.seconds += perf_counter() - began


@final
@define(eq=False)
class Timed:
    """A matcher whose answers are timed."""

    matcher: Matcher
    clock: Clock

    def mask(self) -> torch.Tensor:
        with self.clock.running():
            return self.matcher.mask()

    def after(self, token: int, /) -> Timed | None:
        with self.clock.running():
            place = self.matcher.after(token)
        return None if place is None else Timed(place, self.clock)

    def forced(self) -> Tokens:
        with self.clock.running():
            return self.matcher.forced()

    def may_end(self) -> bool:
        with self.clock.running():
            return self.matcher.may_end()


@final
@define(eq=False)
class Run:
    """What a decoder did for a schema: its texts, and the seconds that it took."""

    texts: list[Tokens] = field(factory=list)
    seconds: float = 0.0
    steps: int = 0

    @property
    def speed(self) -> float:
        return sum(map(len, self.texts)) / self.seconds


OURS: Final[dict[str, Callable[[Constraint], Drafter]]] = {
    "no drafts": lambda answer: propose_nothing,
    "forced": Forced,
    "forced, suffix": lambda answer: then(Forced(answer), SuffixDrafter()),
}


def ours(
    target: Predictor, grammar: Grammar, drafter: Callable[[Constraint], Drafter], state: DecodeState, seed: int | None
) -> tuple[Tokens, int]:
    """The text of a prompt, and its steps: greedy without a seed."""
    answer, dice = grammar.after(state.tokens), Dice(torch.Generator().manual_seed(seed or 0))
    inner: Processor = GreedyProcessor() if seed is None else MultinomialProcessor(0.8)
    draft, cut, adjust = Draft(drafter(answer), Fixed(16)), CutForbidden(answer), Adjust(dice)
    verify, end = Verify(target, Constrained(inner, answer), Reject(dice)), ending(answer.is_over)
    outcome: DecodeState | Finished = state
    for outcome in unfold(lambda state: state.then(draft).then(cut).then(verify).then(adjust).then(end), state):  # noqa: B007
        pass
    assert isinstance(outcome, Finished)
    assert answer.is_complete(outcome.state) or outcome.state.room == 0
    return outcome.state.output, outcome.state.tally.steps


@final
class OverLLGuidance:
    """A logits processor over llguidance, for one text."""

    def __init__(self, first: Any) -> None:  # noqa: ANN401 - another library's matcher
        self.matcher, self.is_new = first.deep_copy(), True

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.is_new:
            self.matcher.consume_token(int(ids[0, -1]))
        self.is_new = False
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
        return scores.masked_fill(allowed[: scores.shape[1]] == 0, -torch.inf)


def theirs(loaded: Loaded, schema: Schema) -> dict[str, Callable[[], Any]]:
    """What makes a logits processor of each library that is installed, of a grammar that is compiled already."""
    import llguidance  # noqa: PLC0415 - an extra
    from llguidance.hf import from_tokenizer  # noqa: PLC0415 - the same

    text_of = json.dumps(schema)
    tokenizer: Any = loaded.tokenizer
    first = llguidance.LLMatcher(from_tokenizer(tokenizer), llguidance.LLMatcher.grammar_from_json_schema(text_of))
    made: dict[str, Callable[[], Any]] = {"generate, llguidance": lambda: OverLLGuidance(first)}
    try:
        import xgrammar  # noqa: PLC0415 - it is not everywhere
        from xgrammar.contrib.hf import LogitsProcessor  # noqa: PLC0415 - the same
    except ImportError:
        return made
    known = xgrammar.TokenizerInfo.from_huggingface(
        loaded.tokenizer,
        vocab_size=limits_of(loaded.model).vocab_size,
        stop_token_ids=sorted(loaded.stop),
    )
    compiled = xgrammar.GrammarCompiler(known).compile_json_schema(text_of, any_whitespace=False)
    return made | {"generate, xgrammar": lambda: LogitsProcessor(compiled)}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--schemas", type=int, default=len(SCHEMAS))
    parser.add_argument("--new", type=int, default=160, help="the most tokens of a text")
    parser.add_argument("--peers", type=int, default=4, help="how many texts of a schema `generate` decodes")
    options = parser.parse_args()
    loaded = load("smollm2").unwrap()
    target = CachedPredictor(fast(loaded.model))
    print(f"SmolLM2-135M, float32, {options.texts} texts a schema, {torch.get_num_threads()} threads")
    names = [*OURS, "generate, llguidance", "generate, xgrammar"]
    print(f"| schema | valid | cut at the limit | drafts change | grammar's share | {' | '.join(names)} |")
    print("|---" * (5 + len(names)) + "|")
    gains: dict[str, list[float]] = {name: [] for name in names}
    shares: list[float] = []
    for name, schema in list(SCHEMAS.items())[: options.schemas]:
        compact = {**schema, "x-guidance": {"whitespace_flexible": False}}
        plain = Grammar.json_schema(compact, loaded.tokenizer, loaded.stop)
        runs, clock = {each: Run() for each in names}, Clock()
        processors = theirs(loaded, compact)
        timed = Grammar(lambda plain=plain, clock=clock: Timed(plain.start(), clock), plain.stop)  # type: ignore[misc]
        for number in range(options.texts):
            prompt = loaded.chat(f"Write a JSON object that describes this: {name}, example {number + 1}.")
            state = start(prompt, options.new, loaded.stop, limits_of(loaded.model)).unwrap()
            seed = number if number else None
            order = list(OURS)[number % 3 :] + list(OURS)[: number % 3]
            for each in order:
                began = perf_counter()
                output, steps = ours(target, plain, OURS[each], state, seed)
                runs[each].seconds += perf_counter() - began
                runs[each].texts.append(output)
                runs[each].steps += steps
            for each, make in processors.items() if number < options.peers else ():
                began = perf_counter()
                generate: Any = loaded.model.generate
                said = generate(
                    torch.tensor([prompt]),
                    logits_processor=[make()],
                    max_new_tokens=options.new,
                    do_sample=seed is not None,
                    temperature=0.8 if seed is not None else None,
                    top_k=0 if seed is not None else None,
                )
                runs[each].seconds += perf_counter() - began
                runs[each].texts.append(tuple(said[0, len(prompt) :].tolist()))
        state = start(loaded.chat(f"Write JSON: {name}."), options.new, loaded.stop, limits_of(loaded.model)).unwrap()
        began = perf_counter()
        ours(target, timed, OURS["forced, suffix"], state, None)
        shares.append(clock.seconds / (perf_counter() - began))
        alone = runs["no drafts"].texts
        said_texts = [loaded.tokenizer.decode(each, skip_special_tokens=True) for each in alone]
        cut = sum(len(each) >= options.new for each in alone)
        valid = sum(_is_valid(each, schema) for each in said_texts)
        changed = sum(
            one != other
            for each in OURS
            for one, other in zip(alone, runs[each].texts, strict=True)
            if each != "no drafts"
        )
        speeds = []
        for each in names:
            if runs[each].texts:
                gains[each].append(runs[each].speed / runs["no drafts"].speed)
            speeds.append(f"{runs[each].speed:.1f}" if runs[each].texts else "")
        print(
            f"| {name} | {valid} of {len(alone) - cut} | {cut} | {changed} | {shares[-1]:.1%} | {' | '.join(speeds)} |",
            flush=True,
        )
    medians = " | ".join([f"{median(each):.2f}" if each else "" for each in gains.values()])
    print(f"| median, tokens/s over those without drafts | | | | {median(shares):.1%} | {medians} |")


def _is_valid(answer: str, schema: Schema) -> bool:
    try:
        jsonschema.validate(json.loads(answer), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


if __name__ == "__main__":
    main()
