"""lm.chat at a terminal, driven through a pseudo-terminal as a person does."""

import json
import os
import sys

import pytest
from running import ROOT

pexpect = pytest.importorskip('pexpect')

PASTE = '\x1b[200~{}\x1b[201~'


@pytest.mark.slow
def test_a_conversation(dialogues, tmp_path):
    """The line editor, the commands, a paste with an empty line in it, Ctrl-C at both places, and Ctrl-D."""
    env = {**os.environ, 'TERM': 'xterm', 'XLA_FLAGS': '', 'LM_CACHE': str(tmp_path), 'JAX_PLATFORMS': 'cpu'}
    words = ['-m', 'lm.chat', str(dialogues.run('sft')), '--seed=3', '--max_new_tokens=16']
    chat = pexpect.spawn(sys.executable, words, cwd=str(ROOT), env=env, encoding='utf8', timeout=60)
    for seen in ('loading', r'step \d+, .*parameters.*temperature 0.7', 'seed 3; /help'):
        chat.expect(seen)
    chat.send('thrown away\x03/hepl\r')
    chat.expect(r'/hepl is no command \(did you mean /help\?\)')
    chat.send('/help\r')
    chat.expect('/temperature +T')
    chat.send('/temperature 2\r/temperature x\r/system Be brief.\r')
    for seen in ('temperature 2', '/temperature x: must be', 'the system says: Be brief.'):
        chat.expect(seen)
    chat.send(PASTE.format('the bucket\n\n/quit\necho run by the shell\n') + '\r')
    chat.expect('echo run by the shell')
    chat.expect('a message, or /help')
    chat.send('/seed\r')
    chat.expect('seed 4')
    saved = tmp_path / 'saved.jsonl'
    chat.send(f'/save {saved}\r')
    chat.expect('saved in')
    chat.send('\x04')
    chat.expect(pexpect.EOF)
    chat.close()
    assert (chat.exitstatus, chat.signalstatus) == (0, None)
    (line,) = saved.read_text().splitlines()
    system, user, assistant = json.loads(line)['messages']
    assert system == {'role': 'system', 'content': 'Be brief.'} and assistant['role'] == 'assistant'
    assert user == {'role': 'user', 'content': 'the bucket\n\n/quit\necho run by the shell'}
    assert 'the bucket' in (tmp_path / 'chat_history').read_text()
    assert (tmp_path / 'chat_history').stat().st_mode & 0o077 == 0
