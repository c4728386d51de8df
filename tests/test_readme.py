"""Links and files that the README and docs/ name exist, and CI finds the two commands in the README."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'benchmarks/README.md', *sorted((ROOT / 'docs').glob('*.md'))]
FILE = re.compile(r'(?<![\w./-])((?:lm|configs|benchmarks|tests|launch|docs)/[\w./-]*\w\.(?:py|md|sh|jsonl|svg))')


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', head.lower()).replace(' ', '-') for head in heads}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in link]
    for link in links:
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        assert target.exists(), f'{page.name} links to {link}'
        assert not anchor or anchor in anchors(target), f'{page.name} links to {link}'
    for name in FILE.findall(text):
        assert (ROOT / name).exists(), f'{page.name} names {name}'


@pytest.mark.parametrize('command', ['-m lm.main', '-m pytest'])
def test_ci_finds_the_two_commands(command):
    """As .ci/run looks for them: one line, at its beginning."""
    found = re.findall(rf'^python3 -m venv .*{re.escape(command)}.*$', PAGES[0].read_text(), re.MULTILINE)
    assert len(found) == 1 and '&&' in found[0]


def test_each_page_of_docs_is_linked_from_the_readme():
    text = PAGES[0].read_text()
    assert [page.name for page in PAGES[2:] if f'(docs/{page.name})' not in text] == []
