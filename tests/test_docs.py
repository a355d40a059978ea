"""What the documentation points to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("lavis_xformer/assets/mini/*/README.md")]


def missing(text: str, folder: Path) -> list[str]:
    """Relative links of a page that lead nowhere, and paths of ours in its code and YAMLs that aren't there."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    paths = re.findall(
        r"\b(?:projects|configs|run_scripts|tests|lavis_xformer)/[\w./-]+\.(?:yaml|py|sh|md|txt)\b", text
    )
    return [link for link in links if not (folder / link).exists()] + [p for p in paths if not (ROOT / p).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path):
    assert not missing(page.read_text(), page.parent)


def test_what_leads_nowhere_is_found():
    assert missing("[a](gone.md) [b](README.md#c) `projects/gone.yaml` [d](https://x.y/z.md)", ROOT) == [
        "gone.md",
        "projects/gone.yaml",
    ]


def test_every_module_has_its_place_in_the_plan_of_the_house():
    plan = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    package = ROOT / "lavis_xformer"
    top = [
        p.name if p.suffix else f"{p.name}/"
        for p in package.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    ]
    assert not [name for name in top if name not in plan]
