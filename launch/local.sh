#!/usr/bin/env bash
# Runs a training command as N processes of this machine that train one run, and again while they leave with 75.
#   launch/local.sh 2 -- python -m lm.main --config=configs/pretrain.py
# Lines on stderr begin with the number of their process; stdout has process 0's object alone. A signal goes to all.
# When one of them fails all end, and the worst status is this script's. With NVIDIA GPUs, process I gets GPU I.
set -u
[ $# -ge 3 ] && [ "$1" -ge 1 ] 2>/dev/null && [ "$2" = -- ] ||
  { echo "usage: launch/local.sh N -- COMMAND [ARGUMENT …]" >&2; exit 2; }
if [ -z "${LM_LOCAL:-}" ]; then # starting again is the other script's work
  LM_LOCAL=1 exec "$(dirname "$0")/resume.sh" "$0" "$@"
fi
unset LM_LOCAL
n=$1; shift 2
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 1

pids=() readers=() statuses=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((i = 0; i < n; i++)); do
  exec {err}> >(trap '' TERM INT; exec sed -u "s/^/[$i] /" >&2)
  readers+=($!)
  gpu=(); [ -e /dev/nvidia0 ] && [ -z "${CUDA_VISIBLE_DEVICES:-}" ] && gpu=("CUDA_VISIBLE_DEVICES=$i")
  env "${gpu[@]}" "$@" --coordinator="127.0.0.1:$port" --num_processes="$n" --process_id="$i" 2>&"$err" {err}>&- &
  pids+=($!)
  exec {err}>&-
done

deadline=
while :; do
  alive=()
  for ((i = 0; i < n; i++)); do
    [ -z "${statuses[i]:-}" ] || continue
    if kill -0 "${pids[i]}" 2>/dev/null; then alive+=("${pids[i]}"); continue; fi
    wait "${pids[i]}"; statuses[i]=$?
    case ${statuses[i]} in 0 | 75) ;; *) deadline=${deadline:-$((SECONDS + 60))} ;; esac
  done
  [ ${#alive[@]} -gt 0 ] || break
  if [ -n "$deadline" ] && [ $SECONDS -gt "$deadline" ]; then kill -KILL "${alive[@]}" 2>/dev/null; fi
  sleep 0.2 & wait $!
done
wait "${readers[@]}"

worst=0
for status in "${statuses[@]}"; do # 0, then 75, then the others by their number
  if [ "$status" -eq 75 ]; then
    [ "$worst" -ne 0 ] || worst=75
  elif [ "$status" -ne 0 ] && { [ "$worst" -eq 75 ] || [ "$status" -gt "$worst" ]; }; then
    worst=$status
  fi
done
exit "$worst"
