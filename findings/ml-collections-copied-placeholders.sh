#!/usr/bin/env bash
# ml_collections 1.1.0: a ConfigDict made of another one shares its placeholders, and a value set in the copy is set in
# the original.
#
# Expected: `ConfigDict(config)` is a copy, as it is of plain fields. Seen: a plain field that is set in the copy stays
# as it was in the original, a field declared with `placeholder` changes in both: a trial run's setting leaks into the
# config of the run. `copy_and_resolve_references()` gives a copy of its own.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install -q 'ml_collections==1.1.0'
cat > try.py <<'P'
from importlib.metadata import version
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
print('ml_collections', version('ml_collections'))
config = ConfigDict({'batch': 8, 'microbatch': placeholder(int)})
copied = ConfigDict(config)
copied.batch, copied.microbatch = 16, 4
print('original after the copy was set: batch', config.batch, 'microbatch', config.microbatch)
config = ConfigDict({'microbatch': placeholder(int)})
apart = config.copy_and_resolve_references()
apart.microbatch = 4
print('with copy_and_resolve_references: microbatch', config.microbatch)
P
env/bin/python try.py | tee seen
grep -q '^ml_collections 1.1.0$' seen
grep -q '^original after the copy was set: batch 8 microbatch 4$' seen
grep -q '^with copy_and_resolve_references: microbatch None$' seen
echo 'as stated: the placeholder is one for both'
