"""What the documents say about keys and terms is what the code holds, and what they link to exists."""

import re
from pathlib import Path

from utils.config.config import KEYS
from utils.config.methods import METHODS
from utils.config.reference import affects_table, key_tables, unused_keys_table
from utils.results.tables import glossary_markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_config_key_stands_in_its_page_with_its_default_and_meaning():
    tables = key_tables()
    named = [row.split("`")[1] for row in tables.splitlines() if row.startswith("| `")]
    assert named == [*KEYS, *(key.name for method in METHODS.values() for key in method.keys)]
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert tables in page
    assert affects_table() in page
    assert unused_keys_table() in page


def test_the_glossary_is_the_programs():
    assert glossary_markdown() in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def test_every_file_that_the_documents_link_to_exists():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_config_that_the_readme_runs_is_shipped():
    named = set(re.findall(r"--config=(exps/\w+\.json)", README)) - {"exps/my_pets.json"}
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
