"""Rules of the code base: layers, where hooks may live, sizes, locked requirements."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen_vision_bridge"
ROOTS = ("qwen_vision_bridge", "benchmarks", "recipes")
SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = [*SCRIPTS, *(path for root in ROOTS for path in sorted((ROOT / root).rglob("*.py")))]
HOOK_PLACES = ("injection.py", "patches.py", "loading/")
EXPORT = ("export", "--no-emit-project", "--all-extras", "--format", "requirements.txt", "--offline")
ADDRESS = re.compile(r"https?:|--(extra-)?index-url|--find-links")

# Attributes whose assignment exchanges code or constants of a stock module.
REPLACED = {"forward", "__call__", "CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def hooks_and_replacements(tree: ast.AST) -> Iterator[int]:
    """Lines that register a hook, replace a method, or set an attribute by a name known at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                called = function.attr
            else:
                called = function.id if isinstance(function, ast.Name) else ""
            if re.fullmatch(r"register_\w*hook|setattr|MethodType", called):
                yield node.lineno
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if any(isinstance(target, ast.Attribute) and target.attr in REPLACED for target in targets):
            yield node.lineno


def test_imports_keep_the_layers() -> None:
    """The contracts in pyproject.toml, type-checking imports included."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_no_imports_form_a_cycle() -> None:
    """Type-checking imports and imports inside functions count too."""
    import grimp

    graph = grimp.build_graph(*ROOTS, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the cycle


def test_the_library_imports_no_script() -> None:
    scripts = {path.stem for path in SCRIPTS}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules.append(node.module or "")
            assert scripts.isdisjoint(modules), f"{name_of(path)} imports {modules}"


def test_hooks_and_replaced_methods_have_their_places() -> None:
    """In the library, the scripts and the recipes; benchmarks time by hooks."""
    places = tuple(f"qwen_vision_bridge/{place}" for place in HOOK_PLACES)
    elsewhere = [
        f"{name_of(path)}:{line}"
        for path in [*SCRIPTS, *PACKAGE.rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
        if not name_of(path).startswith(places)
        for line in hooks_and_replacements(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not elsewhere


@pytest.mark.parametrize(
    "code",
    [
        "module.register_forward_hook(f)",
        "module.register_full_backward_pre_hook(f)",
        "layer.forward = f",
        "stock.Layer.forward = f",
        "setattr(layer, name, f)",
        "layer.run = MethodType(f, layer)",
        "pipeline_module.VAE_IMAGE_SIZE = 4",
    ],
)
def test_the_hook_rule_sees(code: str) -> None:
    assert list(hooks_and_replacements(ast.parse(code)))


def test_the_core_is_flat_and_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 20


def test_no_module_is_longer_than_350_lines() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {name: length for name, length in lengths.items() if length > 350}


def test_the_readme_is_at_most_8_kb() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8192


def test_tests_are_named_by_short_claims() -> None:
    functions = [
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert not [name for name in functions if len(name) > 60]


def test_every_subprocess_of_the_tests_has_a_deadline() -> None:
    endless = [
        f"{name_of(path)}:{node.lineno}"
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("subprocess.run", ".communicate", "check_output"))
        and "timeout" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not endless


def test_the_requirements_hold_no_address() -> None:
    assert not ADDRESS.search((ROOT / "requirements.lock").read_text(encoding="utf-8"))


def test_the_requirements_equal_a_fresh_export(tmp_path: Path) -> None:
    """`uv` resolves from `uv.lock` where there is one, else from its cache, and stays offline."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    for name in ("pyproject.toml", "uv.lock", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([uv, *EXPORT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"uv cannot resolve offline: {done.stderr.strip().splitlines()[-1]}")
    committed = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert requirements(done.stdout) == requirements(committed)


def requirements(text: str) -> list[str]:
    """The lines without comments, one of which holds the command."""
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]
