"""The spec's import paths: under specflow always, at the top level on request, and never over somebody's module."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import specflow
from specflow import DecodeError, caches, distribution, drafters, processors
from specflow.spec_paths import PATHS, install_spec_paths

ROOT = Path(specflow.__file__).parent.parent

APPENDIX = {
    "sampling": ["autoregressive_generate", "speculative_generate", "beam_search_generate"],
    "ngram_assisted": [
        "ngram_assisted_speculative_generate",
        "INgramStorage",
        "NGramStorage",
        "OneLevelNGramStorage",
    ],
    "utils.logits_processor": [
        "LogitsProcessor",
        "GreedyProcessor",
        "MultinomialProcessor",
        "TopKProcessor",
        "NucleusProcessor",
        "TopKNucleusProcessor",
    ],
    "sampling.speculative_decoding": ["max_fn"],
    "utils.caching": ["prune_cache"],
}
IMPORTS = "\n".join(f"from {module} import {name}" for module, names in APPENDIX.items() for name in names)


def program(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with `folder` as the place its own modules are in."""
    (folder / "program.py").write_text(text)
    command = [sys.executable, "program.py"]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in APPENDIX.items() for name in names])
def test_each_name_of_the_appendix_is_one_thing(module: str, name: str) -> None:
    homes = [home for home in (specflow, processors, drafters, distribution, caches) if hasattr(home, name)]
    assert homes
    for home in homes:
        assert getattr(import_module(f"specflow.{module}"), name) is getattr(home, name)


def test_every_path_is_stubbed_for_mypy_name_for_name() -> None:
    for path in PATHS:
        folder = ROOT / "typings" / path.replace(".", "/")
        stub = (folder / "__init__.pyi") if folder.is_dir() else folder.with_suffix(".pyi")
        for name in APPENDIX.get(path, []):
            assert f" {name} as {name}\n" in stub.read_text()


def test_without_the_call_nothing_resolves_and_with_it_everything_does(tmp_path: Path) -> None:
    result = program(f"import specflow\n{IMPORTS}", tmp_path)
    assert "ModuleNotFoundError: No module named 'sampling'" in result.stderr
    check = (
        "import sampling.speculative_decoding, utils.caching as caching\n"
        "assert sampling.speculative_generate is specflow.speculative_generate\n"
        "assert caching.prune_cache is specflow.caches.prune_cache\n"
        "from utils import logits_processor\n"
        "assert logits_processor.GreedyProcessor is specflow.GreedyProcessor is GreedyProcessor\n"
    )
    install = "import specflow\nfrom specflow.spec_paths import install_spec_paths\ninstall_spec_paths()\n"
    result = program(f"{install}{install}{IMPORTS}\n{check}", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def no_such_modules() -> Iterator[None]:
    """Nothing imported under the spec's names, before and after."""
    before = {path: sys.modules.pop(path) for path in PATHS if path in sys.modules}
    yield
    for path in PATHS:
        sys.modules.pop(path, None)
    sys.modules.update(before)


@pytest.mark.usefixtures("no_such_modules")
@pytest.mark.parametrize("shape", ["utils.py", "utils/__init__.py", "utils/empty.txt"])
@pytest.mark.parametrize("imported", [False, True])
def test_a_module_that_exists_is_never_shadowed(
    shape: str, imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / shape).parent.mkdir(exist_ok=True)
    (tmp_path / shape).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    if imported:
        import_module("utils")
    with pytest.raises(DecodeError, match="a module named utils exists already") as refusal:
        install_spec_paths()
    assert str(tmp_path) in str(refusal.value)
    assert refusal.value.remedy == "import from specflow.utils instead"
    assert "sampling" not in sys.modules
    assert import_module("utils") is not import_module("specflow.utils")


def test_nothing_is_installed_under_these_names() -> None:
    packages = (ROOT / "pyproject.toml").read_text()
    assert 'packages = ["specflow"]' in packages
    assert not any((ROOT / path.split(".")[0]).exists() for path in PATHS)
