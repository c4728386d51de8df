#!/usr/bin/env bash
# jax 0.10.2: with several processes, `jax.device_put` refuses a host array that has a NaN in it.
#
# Two processes put the same array onto a sharding over the devices of both. Expected: an array, as without the NaN.
# Seen: AssertionError, "passed to device_put is not the same on each process". The comparison of what the processes
# have (multihost_utils.assert_equal) takes NaN to differ from itself.
# Who has NaN for "not known yet" makes the array with `jax.make_array_from_process_local_data`, which compares nothing.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install -q 'jax==0.10.2' 'jaxlib==0.10.2'
cat > try.py <<'P'
import socket, subprocess, sys
if len(sys.argv) == 1:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); where = f'127.0.0.1:{s.getsockname()[1]}'
    started = [subprocess.Popen([sys.executable, __file__, where, str(i)], stdout=-1, text=True) for i in range(2)]
    print(started[0].communicate()[0], end=''); started[1].communicate(); sys.exit()
import jax, numpy as np
jax.config.update('jax_platforms', 'cpu')
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
print('jax', jax.__version__, 'devices', jax.device_count())
mesh = jax.make_mesh((2,), ('x',))
everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
for value in (1.0, float('nan')):
    x = np.array([value], np.float32)
    for name, put in (('device_put', lambda: jax.device_put(x, everywhere)),
                      ('make_array', lambda: jax.make_array_from_process_local_data(everywhere, x))):
        try:
            put(); print(name, value, 'an array')
        except AssertionError as error:
            print(name, value, 'AssertionError:', str(error).partition('.')[0])
P
env/bin/python try.py 2>/dev/null | tee seen
grep -q '^device_put 1.0 an array$' seen
grep -q '^device_put nan AssertionError' seen
grep -q '^make_array nan an array$' seen
echo 'as stated: NaN differs from itself'
