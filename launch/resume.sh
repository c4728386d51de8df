#!/usr/bin/env bash
# Runs a training command again for as long as it leaves with status 75: saved after SIGTERM, to be continued.
#   launch/resume.sh python -m lm.main --config=configs/pretrain.py --workdir=/mnt/runs/first
# SIGTERM to this script goes to the command, which saves; the script then ends with 75 itself, for its own scheduler.
set -u
[ $# -gt 0 ] || { echo "usage: launch/resume.sh COMMAND [ARGUMENT …]" >&2; exit 2; }
asked=
while :; do
  "$@" &
  child=$!
  trap 'asked=1; kill -TERM "$child"' TERM INT
  wait "$child"; status=$?
  # a signal ends `wait` early, with a status above 128: wait for the command itself
  while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
  [ "$status" -eq 75 ] && [ -z "$asked" ] || exit "$status"
done
