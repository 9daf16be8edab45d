"""The README's Python runs as pasted, and the pages' links lead somewhere."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qwen_vision_bridge.loading.registry import FAMILIES
from tests.conftest import STOCK

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_readme_edits_with_the_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FAMILIES, "miniature", replace(STOCK, steps=4))
    (block,) = (block for block in BLOCKS if 'family="miniature"' in block)
    names: dict[str, Image.Image] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["baseline"].size == names["enhanced"].size
    assert names["baseline"].tobytes() != names["enhanced"].tobytes()
    assert Image.open("result.png").width > 4 * names["baseline"].width


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_of_the_readme_compiles(block: str) -> None:
    compile(block, "README.md", "exec")


def test_commands_of_the_readme_name_scripts_and_files() -> None:
    lines = README.replace("\\\n", " ").splitlines()
    words = [word for line in lines if line.startswith("uv run python") for word in shlex.split(line)]
    paths = [word for word in words if re.search(r"\.(py|png)$", word)]
    assert len(paths) >= 2
    assert all((ROOT / path).is_file() for path in paths)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]
