"""What the documents say about keys and terms is what the code holds, and what they link to exists."""

import re
from pathlib import Path

from docs import config_tables
from utils.config.config import KEYS
from utils.config.keys import UNUSED_KEYS
from utils.config.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_config_key_stands_in_its_page_with_its_default_and_meaning():
    page = config_tables.PAGE.read_text(encoding="utf-8")
    named = [row.split("`")[1] for row in page.splitlines() if row.startswith("| `")]
    assert named == [*KEYS, *(key.name for method in METHODS.values() for key in method.keys), *UNUSED_KEYS]
    assert config_tables.updated(page) == page, "run: python -m docs.config_tables"


def test_the_glossary_is_the_programs():
    page = config_tables.GLOSSARY_PAGE.read_text(encoding="utf-8")
    assert "- **A_T**" in page
    assert config_tables.updated(page) == page, "run: python -m docs.config_tables"


def headings(page: Path) -> set[str]:
    """What GitHub makes of a page's headings, to be linked to."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_place_that_the_documents_link_to_exists():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("*/README.md")]:
        for target, place in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                to = page.parent / target if target else page
                assert to.exists(), f"{page.relative_to(ROOT)} links to {target}"
                assert not place or place in headings(to), f"{page.relative_to(ROOT)} links to {target}#{place}"


def test_the_documents_are_few_and_the_first_one_short():
    assert len(README.splitlines()) <= 180
    assert len(list(ROOT.glob("docs/*.md"))) <= 14


def test_every_config_that_the_readme_runs_is_shipped():
    named = set(re.findall(r"--config=(exps/\w+\.json)", README)) - {"exps/my_pets.json"}
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
