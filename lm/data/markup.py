"""HTML fragments to plain text, as a reader would see them: paragraphs, dash lists, code in backticks, entities."""

import html
import re

# Only these are tags; `<region>` and the like are placeholders that somebody forgot to escape, and stay.
_PARAGRAPHS = 'p para dl dt pre fullname h1 h2 h3 h4 div table title examples tip note important caution warning'
_LINES = 'ul ol dd br li tr'
_INLINE = (
    'a i b em strong u replaceable link filename zonbook xhtml text span sub sup small tt var literal thead tbody body '
    'html'
)
_BLOCKS = dict.fromkeys(_PARAGRAPHS.split(), '\n\n') | dict.fromkeys(_LINES.split(), '\n') | {'td': ' ', 'th': ' '}
# \x01 eats the white space after it and \x02 the white space before it, so '- ' and '`' touch their content.
_CALLOUTS = {name: f'\n\n{name.capitalize()}: \x01' for name in ('note', 'important', 'caution', 'warning')}
_OPEN = _BLOCKS | _CALLOUTS | {'li': '\n- \x01', 'code': '`\x01'}
_CLOSE = _BLOCKS | {'dt': '\n\x01', 'code': '\x02`'}
_TAG = re.compile(rf'<(/?)({"|".join([*_OPEN, *_INLINE.split()])})(?:\s[^<>]*|/)?>', re.I)


def strip_html(text: str) -> str:
    """Plain text of an HTML fragment: no tags, entities resolved, blocks on lines of their own, no trailing space."""
    if '<' in text:
        text = _TAG.sub(_replacement, ' '.join(text.split()))
    text = re.sub(r'\x01\s*|\s*\x02', '', html.unescape(text))
    text = re.sub(r'[^\S\n]+', ' ', text.replace('\u2028', ' ').replace('``', ''))
    text = re.sub(r' ?\n ?', '\n', text)
    text = re.sub(r'\n+(?=- )', '\n', text)
    text = re.sub(r'\n{3,}', '\n\n', text)
    return re.sub(r' ([.,;:])(?=\s|$)', r'\1', text).strip()


def _replacement(match: re.Match[str]) -> str:
    table = _CLOSE if match[1] else _OPEN
    return table.get(match[2].lower(), '')
