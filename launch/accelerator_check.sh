#!/usr/bin/env bash
# Checks and measures an accelerator in about eight minutes, and writes one JSON file.
#
#   launch/accelerator_check.sh [OUT.json]
#
# Runs `pytest -m accelerator`, the benchmark of training (ResNet-50, 224 px, bfloat16, compared
# with torch.compile) and that of exact search. A step that fails or takes too long does not stop
# the others; the exit code is 1 then. PYTHON chooses the interpreter, which needs afa's
# dependencies (ScaNN, Milvus and TensorFlow are not needed), pytest, pytest-xdist, beartype and,
# for the benchmarks, torch. On a CPU the sizes are small, to try the script.
set -uo pipefail
out=$(realpath -m "${1:-accelerator.json}")
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the device
export AFA_TEST_CACHE="$parts/cache" PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # others may warn

refuse() {
  echo "error: $1" >&2
  exit 2
}
[ -d "$(dirname "$out")" ] && [ -w "$(dirname "$out")" ] ||
  refuse "$out: the directory does not exist or cannot be written"
backend=$("$python" -c 'import jax; print(jax.default_backend())' 2>"$parts/backend.log") ||
  refuse "PYTHON=$python cannot use JAX: $(tail -1 "$parts/backend.log")"
if [ "$backend" = cpu ]; then
  training=(--image_size 32 --batch_size 8 --turns 2 --steps 1 --backbones resnet18)
  search=(--rows 5000 --dimensions 128)
  tests=(-n 2 -k "not memory") # compiling full-scale steps takes minutes there
  seconds=600
else
  training=(--backbones resnet50 --turns 5 --steps 6)
  search=(--rows 100000 1000000 --dimensions 128 512)
  tests=(-n 5)
  seconds=220
fi

step() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 began=$SECONDS code=0
  shift 2
  echo "== $name: $*"
  timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee "$parts/$name.log" || code=$?
  echo "$code $((SECONDS - began))" >"$parts/$name.rc"
}

step training 300 "$python" -m experiments.benchmarks.training "${training[@]}" \
  --out="$parts/training.json"
step search 80 "$python" -m experiments.benchmarks.search --parts exact "${search[@]}" \
  --out="$parts/search.json"
step tests "$seconds" "$python" -m pytest -p xdist.plugin -m accelerator tests/test_accelerator.py \
  "${tests[@]}" --durations=5 --junitxml="$parts/tests.xml"

"$python" - "$parts" "$out" <<'PY'
import datetime, importlib.metadata, json, os, platform, subprocess, sys
from pathlib import Path
from xml.etree import ElementTree

import jax

parts, out = Path(sys.argv[1]), Path(sys.argv[2])


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
found = {
    "date": datetime.date.today().isoformat(),
    "commit": commit.stdout.strip() or None,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "versions": {n: version(n) for n in ("jax", "flax", "optax", "orbax-checkpoint", "torch")},
    "steps": {},
}
for each in sorted(parts.glob("*.rc")):
    code, seconds = map(int, each.read_text().split())
    log = (parts / f"{each.stem}.log").read_text().splitlines()
    found["steps"][each.stem] = {"exit_code": code, "seconds": seconds, "last": log[-1:]}
for name in ("training", "search"):
    if (parts / f"{name}.json").exists():
        found[name] = json.loads((parts / f"{name}.json").read_text())
if (parts / "tests.xml").exists():
    suite = ElementTree.parse(parts / "tests.xml").getroot()[0]
    counted = ("tests", "failures", "errors", "skipped")
    found["tests"] = {name: int(suite.get(name)) for name in counted} | {
        "failed": [case.get("name") for case in suite.iter("testcase")
                   if case.find("failure") is not None or case.find("error") is not None],
        "measured": {each.get("name"): float(each.get("value")) for each in suite.iter("property")},
    }
out.write_text(json.dumps(found, indent=2) + "\n")
print(f"== {out}: " + ", ".join(f"{n} {s['exit_code']} in {s['seconds']} s"
                                for n, s in found["steps"].items()))
sys.exit(any(step["exit_code"] for step in found["steps"].values()))
PY
