"""A GGUF file with its matrices in another precision: `python -m benchmarks.dequantized --help`.

    python -m benchmarks.dequantized smollm2 bf16.gguf --dtype bfloat16
    specflow bench --engine llama.cpp --model bf16.gguf --dtype bfloat16 --also fast=specflow.accelerate:fast \\
        --decoders llama.cpp llama.cpp-lookup@10 autoregressive suffix@cost fast/autoregressive fast/tree@5

So llama.cpp and torch compute with the same weights, and read as many bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

from specflow.models import file_of

PRECISIONS: Final = {
    "float32": GGMLQuantizationType.F32,
    "bfloat16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}


def dequantized(source: Path, precision: GGMLQuantizationType, path: Path) -> Path:
    """The GGUF file `source`, of a llama, with its matrices in another precision, at `path`."""
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


def main() -> None:
    """Read the options and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="smollm2, or a GGUF file of a llama")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="bfloat16")
    options = parser.parse_args()
    dequantized(file_of(options.model), PRECISIONS[options.dtype], options.out)


if __name__ == "__main__":
    main()
