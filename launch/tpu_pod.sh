#!/usr/bin/env bash
# Trains on a Cloud TPU pod, from asking for one to deleting it: a queued resource, this commit installed on every worker, the
# same command on all of them, and process 0's log here. Preempted, or status 75: it begins again and the run goes on.
#   ZONE=us-west4-a ACCELERATOR=v5litepod-64 launch/tpu_pod.sh [--dry-run] NAME -- \
#     --config=configs/pretrain.py:1b --workdir=gs://BUCKET/runs/1b --config.data.mixture=…
# --dry-run prints what would run. The checkpoints have to be in a bucket: the machines and their disks are deleted.
# Needs gcloud with a project and the right to make TPUs; SPOT=0 asks for machines that are not taken away; a pod that
# was left behind is deleted by: gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -u
here=$(cd "$(dirname "$0")" && pwd)
dry=
[ "${1:-}" != --dry-run ] || { dry=1; shift; }
[ $# -ge 3 ] && [ "$2" = -- ] && [ -n "${ZONE:-}" ] && [ -n "${ACCELERATOR:-}" ] ||
  { echo "usage: ZONE=… ACCELERATOR=… launch/tpu_pod.sh [--dry-run] NAME -- --config=… --workdir=gs://…" >&2; exit 2; }
if [ -z "$dry" ] && [ -z "${LM_TPU_POD:-}" ]; then # starting again is the other script's work
  LM_TPU_POD=1 exec "$here/resume.sh" "$0" "$@"
fi
name=$1; shift 2
case $ACCELERATOR in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac

run() {
  if [ -z "$dry" ]; then "$@"; return; fi
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_=:/.,-]*) printf '%s ' "${word@Q}" ;; *) printf '%s ' "$word" ;; esac
  done
  echo
}
queue() { gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }
state() { queue describe "$name" --format='value(state.state)' 2>/dev/null || echo GONE; }
on() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker="$1" --command="$2"
}

create() {
  [ "${SPOT:-1}" = 0 ] || set -- --spot
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$ZONE" \
    --accelerator-type="$ACCELERATOR" --runtime-version="${RUNTIME:-$runtime}" "$@" || return
  [ -n "$dry" ] && return
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in FAILED | SUSPEND* | GONE) return 1 ;; esac
    sleep 30
  done
}

delete() { run gcloud compute tpus queued-resources delete "$name" --zone="$ZONE" --force --quiet; }

install() { # the images' own Python is older than ours
  run git -C "$here/.." archive --format=tar.gz --prefix=lm/ --output=/tmp/lm.tar.gz HEAD &&
    run gcloud compute tpus tpu-vm scp /tmp/lm.tar.gz "$name:" --zone="$ZONE" --worker=all &&
    on all 'tar -xzf lm.tar.gz && cd lm && python3 -m pip install -q uv && python3 -m uv venv -q --python=3.12 &&
      python3 -m uv pip install -q -e ".[tpu,corpus,hub]"'
}

start() { # it runs on though the connection ends; its status is left in a file
  on all "cd lm && rm -f status log && (setsid nohup bash -c $(printf '%q' "$1& echo \$! >pid; wait \$!; echo \$? >status") >log 2>&1 </dev/null &)"
}

# shellcheck disable=SC2016,SC2329 # the worker expands it; the trap calls it
stop() { # the run saves and leaves with 75; by its number, because a pattern would end the shell that notes its status
  on all 'kill -TERM "$(cat lm/pid)"'
}

# shellcheck disable=SC2016 # the worker expands it
follow() { # process 0's log, and the status, which is the same in all
  on 0 'cd lm; tail -n +1 -F log & until [ -e status ]; do sleep 2; done; sleep 2; kill %1; exit "$(cat status)"'
}

[ -n "$dry" ] || [ "$(state)" = GONE ] || delete
trap 'delete; exit 143' TERM INT # a pod that nobody follows is paid for all the same
create || { delete; exit 1; } # no right, no quota, a wrong name: once more would not help
install && start "$(printf '%q ' .venv/bin/python -m lm.main --coordinator=auto "$@")"
status=$?
if [ "$status" -eq 0 ]; then
  follow &
  trap stop TERM INT
  wait $!; status=$?
  while kill -0 $! 2>/dev/null; do wait $!; status=$?; done
  [ "$status" -le 128 ] || { wait $!; status=$?; } # it ended while the trap was at work
fi
[ -n "$dry" ] || [ "$(state)" = ACTIVE ] || status=75 # the machines were taken away
delete
exit "$status"
