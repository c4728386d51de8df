#!/usr/bin/env bash
# etils 1.15.0: `epath.Path('gs://bucket/run').resolve()` puts the working directory before a bucket's address.
#
# A path in a bucket is absolute already, and `epath.Path` says so where it is joined, printed and compared. `resolve()`
# alone treats it as one of this machine: the result names no bucket any more, and whatever is written there lands in
# a local folder called `gs:`. Code that resolves the paths it is given has to leave those of buckets alone.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install -q 'etils[epath]==1.15.0'
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
grep -q '^given gs://bucket/run$' seen
grep -q '^resolved CWD/gs:/' seen
echo 'as stated: the address is gone'
