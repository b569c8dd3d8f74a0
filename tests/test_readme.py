"""What the README says about keys and terms is what the code holds."""

import dataclasses
import re
from pathlib import Path

import pytest

from utils.config import Config, key_table
from utils.results.metrics import GLOSSARY

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_config_key_stands_in_the_readme_with_its_default_and_meaning():
    rows = key_table()
    assert [row.split("`")[1] for row in rows[2:]] == [field.name for field in dataclasses.fields(Config)]
    assert "\n".join(rows) in README


@pytest.mark.parametrize("term", GLOSSARY)
def test_every_definition_stands_in_the_readme_word_for_word(term):
    assert f"**{term}**: {GLOSSARY[term]}" in README


def test_every_file_that_the_documents_link_to_exists():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_config_that_the_readme_runs_is_shipped():
    named = set(re.findall(r"--config=(exps/\w+\.json)", README)) - {"exps/my_pets.json"}
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
