"""Texts in TensorBoard: the settings of a run, and what it answers."""

import json
import struct

from running import lines

from lm.training.recorder import Event


def texts(workdir):
    """{tag: (step, text)} of the newest event of each, as the text plugin reads them."""
    found = {}
    for path in sorted((workdir / 'tensorboard').iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from('<Q', data, at)
            event, at = Event.FromString(data[at + 12 : at + 12 + size]), at + 16 + size
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == 'text':
                    (text,) = value.tensor.string_val
                    shown = [line.removeprefix('    ') for line in text.decode().splitlines()]
                    found[value.tag] = event.step, '\n'.join(shown)
    return found


def test_settings_and_samples_are_shown(lab, tmp_path):
    lab.train(tmp_path / 'run', steps=2, eval__every=1)
    found = texts(tmp_path / 'run')
    step, settings = found.pop('settings')
    assert step == 0 and json.loads(settings) == json.loads((tmp_path / 'run' / 'config.json').read_text())['config']
    last = [r for r in lines(tmp_path / 'run', 'samples.jsonl') if r['step'] == 2]
    assert found == {
        f'samples/{r["prompt_id"]}/{r["temperature"]}': (2, '\n'.join(f'{r["prompt"]}[…]{r["text"]}'.splitlines()))
        for r in last
    }
    assert len(found) == 2
