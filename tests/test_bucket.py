"""A run in a bucket, which cannot append: trained, killed and resumed through the real gcsfs, TensorStore and Orbax."""

import os
import subprocess
import sys
import time

import pytest
import running
from running import measured

from lm import files
from lm.errors import RunError

pytest.importorskip('gcsfs', reason="pip install -e '.[test]'")
bucket = pytest.importorskip('bucket')
WORKDIR = 'gs://some-bucket/runs/one'


@pytest.fixture
def store(monkeypatch):
    with bucket.serve() as (store, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield store


def read(store, name):
    return store.objects['some-bucket', f'runs/one/{name}'][0]


def there(store, name):
    with store.lock:
        return ('some-bucket', f'runs/one/{name}') in store.objects


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on_as_if_nothing_had_happened(lab, store, tmp_path):
    settings = {'steps': 40, 'eval__every': 40}
    process = lab.start(WORKDIR, **settings)
    end = time.monotonic() + 120
    while process.poll() is None and not there(store, 'checkpoints/8/commit_success.txt') and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    running.kill(process)
    begun = {line for line in read(store, 'log.txt').decode().splitlines()}
    process = lab.start(WORKDIR, **settings)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and running.one_object(out)['step'] == 40, err
    assert 'resumed at step ' in err
    assert begun <= set(read(store, 'log.txt').decode().splitlines())  # what was said before was not lost
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'metrics.jsonl').write_bytes(read(store, 'metrics.jsonl'))
    process = lab.start(tmp_path / 'whole', **settings)
    assert process.communicate(timeout=120) and process.returncode == 0
    train = lambda workdir: {k: v for k, v in measured(workdir).items() if k[1] == 'train/loss'}
    assert train(tmp_path / 'run') == train(tmp_path / 'whole')
    events = [data for (_, name), (data, _) in store.objects.items() if 'tfevents' in name]
    assert len(events) == 2 and all(len(data) > 500 for data in events)


CHILD = """
from lm import files
from etils import epath
folder = epath.Path('gs://some-bucket/run')
print([p.name for p in folder.iterdir()] if folder.exists() else [], flush=True)
input()
print(sorted(p.name for p in folder.iterdir()), (folder / 'b').read_bytes(), flush=True)
file = files.Growing(folder / 'log.txt')
for word in ('one', 'two', 'three'):
    file.add_line(word)
file.flush()
more = files.Growing(folder / 'log.txt')
more.add_line('four')
files.write_text(folder / 'whole', 'x')
print(files.absolute(folder))
"""


def test_what_grows_in_a_bucket_is_whole_and_what_others_write_is_seen(store):
    store.put('some-bucket', 'run/a', b'1')
    env = {**os.environ, 'PYTHONPATH': str(running.ROOT)}
    child = subprocess.Popen([sys.executable, '-c', CHILD], env=env, stdin=-1, stdout=-1, text=True)
    assert child.stdout is not None and child.stdout.readline() == "['a']\n"
    with store.lock:
        store.put('some-bucket', 'run/b', b'2')
    out, _ = child.communicate('\n')
    assert out.splitlines() == ["['a', 'b'] b'2'", 'gs://some-bucket/run']
    assert store.objects['some-bucket', 'run/log.txt'][0] == b'one\ntwo\nthree\nfour\n'
    assert store.writes['run/log.txt'] == 3  # at once, when it was flushed, and by the second
    assert store.objects['some-bucket', 'run/whole'][0] == b'x'


def test_an_object_that_grows_is_written_now_and_then(tmp_path, monkeypatch):
    """A bucket takes one write a second of an object."""
    now, wrote = [0.0], []
    monkeypatch.setattr(files, 'is_bucket', lambda path: True)
    monkeypatch.setattr(files.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(files, '_write', lambda path, data, mode: wrote.append((mode, bytes(data))))
    file = files.Growing(tmp_path / 'x')
    for second in range(files.BUCKET_SECONDS + 1):
        now[0] = second
        file.add(b'%d,' % second)
    whole = b''.join(b'%d,' % second for second in range(files.BUCKET_SECONDS + 1))
    assert wrote == [('wb', b'0,'), ('wb', whole)]
    file.flush()
    assert len(wrote) == 2  # there was nothing new


def test_what_a_bucket_refuses_is_one_line(tmp_path, monkeypatch):
    """gcsfs has errors that are no OSError."""
    monkeypatch.setattr(files, 'is_bucket', lambda path: True)
    monkeypatch.setattr(files, '_write', lambda *args: (_ for _ in ()).throw(Exception('Insufficient\n quota, 403')))
    with pytest.raises(
        RunError, match=r'x cannot be written \(Insufficient quota, 403\): what was there before is intact'
    ):
        files.write_text(tmp_path / 'x', 'y')
