#!/usr/bin/env bash
# etils 1.15.0: `epath.Path('gs://bucket/run').resolve()` puts the working directory before a bucket's address.
#
# Expected: the address as it is, since it depends on no working directory. Seen: CWD/gs:/bucket/run, which names a
# local folder and no bucket. Code that resolves the paths it is given has to leave those of buckets alone.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install -q 'etils==1.15.0' 'etils[epath]'
cat > try.py <<'P'
import os
from importlib.metadata import version
from etils import epath
print('etils', version('etils'))
path = epath.Path('gs://bucket/run')
print('given', path)
print('resolved', str(path.resolve()).replace(os.getcwd(), 'CWD'))
P
env/bin/python try.py | tee seen
grep -q '^etils 1.15.0$' seen
grep -q '^given gs://bucket/run$' seen
grep -q '^resolved CWD/gs:/' seen
echo 'as stated: the address is gone'
