"""HTML fragments to plain text, as a reader would see them: paragraphs, dash lists, code in backticks, entities."""

import html
import re

# Only these are tags; `<region>` and the like are placeholders that somebody forgot to escape, and stay.
_BLOCKS = {
    'p': '\n\n', 'para': '\n\n', 'ul': '\n', 'ol': '\n', 'dl': '\n\n', 'dt': '\n\n', 'dd': '\n', 'pre': '\n\n',
    'note': '\n\n', 'important': '\n\n', 'fullname': '\n\n', 'h1': '\n\n', 'h2': '\n\n', 'h3': '\n\n', 'h4': '\n\n',
    'br': '\n', 'li': '\n', 'div': '\n\n', 'table': '\n\n', 'tr': '\n', 'td': ' ', 'th': ' ', 'title': '\n\n',
    'caution': '\n\n', 'warning': '\n\n', 'tip': '\n\n', 'examples': '\n\n',
}  # fmt: skip
_INLINE = (
    'a', 'i', 'b', 'em', 'strong', 'u', 'replaceable', 'link', 'filename', 'zonbook', 'xhtml', 'text', 'span', 'sub',
    'sup', 'small', 'tt', 'var', 'literal', 'thead', 'tbody', 'body', 'html',
)  # fmt: skip
# \x01 eats the white space after it and \x02 the white space before it, so '- ' and '`' touch their content.
_OPEN = {
    **_BLOCKS,
    'li': '\n- \x01',
    'note': '\n\nNote: \x01',
    'important': '\n\nImportant: \x01',
    'caution': '\n\nCaution: \x01',
    'warning': '\n\nWarning: \x01',
    'code': '`\x01',
}
_CLOSE = {**_BLOCKS, 'dt': '\n\x01', 'code': '\x02`'}
_TAG = re.compile(r'<(/?)(' + '|'.join(sorted({*_OPEN, *_INLINE}, key=len, reverse=True)) + r')(?:\s[^<>]*|/)?>', re.I)


def strip_html(text: str) -> str:
    """Plain text of an HTML fragment: no tags, entities resolved, blocks on lines of their own, no trailing space."""
    if '<' in text:
        text = _TAG.sub(_replacement, ' '.join(text.split()))
    if '&' in text:
        text = html.unescape(text)
    return _tidy(text)


def _replacement(match: re.Match[str]) -> str:
    table = _CLOSE if match[1] else _OPEN
    return table.get(match[2].lower(), '')


def _tidy(text: str) -> str:
    text = re.sub(r'\x01\s*|\s*\x02', '', text)
    text = re.sub(r'[^\S\n]+', ' ', text.replace('\u2028', ' ').replace('``', ''))
    text = re.sub(r' ?\n ?', '\n', text)
    text = re.sub(r'\n+(?=- )', '\n', text)
    text = re.sub(r'\n{3,}', '\n\n', text)
    return re.sub(r' ([.,;:])(?=\s|$)', r'\1', text).strip()
