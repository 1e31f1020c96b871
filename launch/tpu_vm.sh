#!/usr/bin/env bash
# TPU VMs of Google Cloud: create one, run a command on all its hosts, follow it, restart it after a
# preemption, delete it.
#
#   launch/tpu_vm.sh create NAME --zone=ZONE --type=v5litepod-8 [--spot]
#   launch/tpu_vm.sh run    NAME --zone=ZONE [--disk=DIR] -- --exp=afa_resnet50
#   launch/tpu_vm.sh watch  NAME --zone=ZONE --type=v5litepod-8 [--spot] [--disk=DIR] -- --exp=...
#   launch/tpu_vm.sh logs   NAME --zone=ZONE
#   launch/tpu_vm.sh delete NAME --zone=ZONE
#
# `run` copies this directory to all hosts, installs it and starts `experiments.run` there; it goes on
# without this connection. `watch` does what `create` and `run` do, again whenever the VM was
# preempted, until the run has ended. --disk is a directory on all hosts that outlives the VM, such as a
# mounted bucket: there the run continues. --dry_run prints the commands instead. Needs `gcloud`.
set -euo pipefail

readonly VERSION="v2-alpha-tpuv5-lite" # software of the VM
readonly REMOTE="afa" # directory on the hosts
readonly PAUSE=60 # seconds between two looks at the VM
readonly PREEMPTED=75
dry_run=false
spot=()
disk="runs"
zone=""
kind=""

fail() {
  echo "error: $1" >&2
  exit 2
}

show() {
  if "$dry_run"; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

cloud() { show gcloud compute tpus tpu-vm "$@" --zone="$zone"; }

on_all() { cloud ssh "$name" --worker=all --command="$1"; }

create() {
  [ -n "$kind" ] || fail "--type is missing, such as --type=v5litepod-8"
  cloud create "$name" --accelerator-type="$kind" --version="$VERSION" ${spot[@]+"${spot[@]}"}
}

run() {
  [ "${#words[@]}" -gt 0 ] || fail "the command of the run is missing: -- --exp=afa_resnet50"
  local command archive
  archive="$(mktemp -d)/afa.tar.gz"
  show git archive --format=tar.gz --output="$archive" HEAD
  cloud scp "$archive" "$name:afa.tar.gz" --worker=all
  on_all "mkdir -p $REMOTE && tar -xzf afa.tar.gz -C $REMOTE && cd $REMOTE && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
  command="$(printf '%q ' .venv/bin/python -m experiments.run --launch.coordinator=environment "${words[@]}")"
  # Ends a run of before, which would hold the TPU; the exit code goes to a file.
  on_all "cd $REMOTE && mkdir -p $disk && pkill -f experiments.run; rm -f code; nohup bash -c $(printf '%q' "$command --workdir=$disk/run > log.txt 2>&1; echo \$? > code") > /dev/null 2>&1 &"
}

state() { gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2> /dev/null || echo MISSING; }

code() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command="cat $REMOTE/code" 2> /dev/null || true; }

watch() {
  local found
  if "$dry_run"; then
    create
    run
    return
  fi
  while true; do
    found="$(state)"
    case "$found" in
      READY)
        found="$(code)"
        if [ "$found" = 0 ]; then
          echo "the run has ended"
          return
        elif [ "$found" = "$PREEMPTED" ]; then
          run
        elif [ -n "$found" ]; then
          fail "the run has ended with exit code $found: launch/tpu_vm.sh logs $name --zone=$zone"
        fi
        ;;
      CREATING | STARTING | REPAIRING | RESTARTING) ;;
      *)
        [ "$found" = MISSING ] || cloud delete "$name" --quiet
        create
        run
        ;;
    esac
    sleep "$PAUSE"
  done
}

[ $# -ge 2 ] || fail "launch/tpu_vm.sh ACTION NAME ... (its first lines say how)"
action="$1"
name="$2"
shift 2
words=()
while [ $# -gt 0 ]; do
  case "$1" in
    --zone=*) zone="${1#*=}" ;;
    --type=*) kind="${1#*=}" ;;
    --disk=*) disk="${1#*=}" ;;
    --spot) spot=(--spot) ;;
    --dry_run) dry_run=true ;;
    --)
      shift
      words=("$@")
      break
      ;;
    *) fail "$1 is not an option (allowed: --zone, --type, --disk, --spot, --dry_run, --)" ;;
  esac
  shift
done
[ -n "$zone" ] || fail "--zone is missing, such as --zone=us-west4-a"
"$dry_run" || command -v gcloud > /dev/null || fail "gcloud is not installed"
case "$action" in
  create | run | watch) "$action" ;;
  logs) on_all "tail -n 50 -F $REMOTE/log.txt" ;;
  delete) cloud delete "$name" --quiet ;;
  *) fail "'$action' is unknown (allowed: create, run, watch, logs, delete)" ;;
esac
