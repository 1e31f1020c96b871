#!/usr/bin/env bash
# Runs the tests with the oldest and the newest versions that afa supports.
#
#   launch/check_versions.sh [oldest|newest|packages] ...   (default: all three)
#
# oldest, newest: makes the environment .venv-NAME of constraints-NAME.txt and runs all tests there;
# warnings are errors in both. No test is deselected.
# packages: packages a run under each of the two sets and the usual one (constraints.txt), and reads
# it under all three: the vectors are those of the run, or it is refused with the reason.
# PYTHON is the interpreter (default: python3.13).
set -euo pipefail
cd "$(dirname "$0")/.."
readonly PYTHON="${PYTHON:-python3.13}" SETS="oldest usual newest"

environment() {
  local pins="constraints-$1.txt"
  [ "$1" = usual ] && pins=constraints.txt
  [ -x ".venv-$1/bin/python" ] || "$PYTHON" -m venv ".venv-$1"
  ".venv-$1/bin/python" -m pip install -q -c "$pins" -e '.[dev]'
}

tests() {
  environment "$1"
  AFA_TEST_CACHE="${TMPDIR:-/tmp}/afa-tests-$1" ".venv-$1/bin/python" -m pytest \
    -n 2 --dist=loadfile -p no:cacheprovider
}

packages() {
  local home writer reader
  home="$(mktemp -d)"
  for writer in $SETS; do
    environment "$writer"
    ".venv-$writer/bin/python" -m experiments.run --exp=debug --workdir="$home/$writer"
    ".venv-$writer/bin/python" -m experiments.package --run="$home/$writer" \
      --out="$home/$writer-package"
  done
  for writer in $SETS; do
    for reader in $SETS; do
      echo "written with the $writer versions, read with the $reader:"
      ".venv-$reader/bin/python" -m afa.serving.predictor --package "$home/$writer-package" \
        --check || [ $? -eq 2 ]
    done
  done
  rm -r "$home"
}

[ $# -gt 0 ] || set -- oldest newest packages
for action in "$@"; do
  case "$action" in
    oldest | newest) tests "$action" ;;
    packages) packages ;;
    *)
      echo "error: '$action' is unknown (allowed: oldest, newest, packages)" >&2
      exit 2
      ;;
  esac
done
