"""What the documents say about keys and terms is what the code holds, and what they link to exists."""

import re
from pathlib import Path

from docs import config_tables
from utils.config.config import KEYS
from utils.config.keys import UNUSED_KEYS
from utils.config.methods import METHODS
from utils.results.tables import glossary_markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_config_key_stands_in_its_page_with_its_default_and_meaning():
    page = config_tables.PAGE.read_text(encoding="utf-8")
    named = [row.split("`")[1] for row in page.splitlines() if row.startswith("| `")]
    assert named == [*KEYS, *(key.name for method in METHODS.values() for key in method.keys), *UNUSED_KEYS]
    assert config_tables.updated(page) == page, "run: python -m docs.config_tables"


def test_the_glossary_is_the_programs():
    assert glossary_markdown() in (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")


def test_every_file_that_the_documents_link_to_exists():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_config_that_the_readme_runs_is_shipped():
    named = set(re.findall(r"--config=(exps/\w+\.json)", README)) - {"exps/my_pets.json"}
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
