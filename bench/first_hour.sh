#!/usr/bin/env bash
# Everything that a first hour on a GPU is to teach, in one command: at most 460 s on 16 cores, without a network.
#
#     bash bench/first_hour.sh                  all stages
#     bash bench/first_hour.sh smoke sweep      these stages alone (after unpack and build)
#     bash bench/first_hour.sh --dry            on a machine without a GPU: every stage's code with pretended launches, tiny
#
# On a borrowed machine that gets this tree and no network: run bench/first_hour_prepare.sh before, at home, and take the ignored
# folder .first_hour along. The call is then
#
#     carry .first_hour, timeout 500 s:   bash bench/first_hour.sh
#
# Every stage is a process of its own under `timeout`; none that fails or hangs keeps the next from running. What it says goes to
# $OUT/NAME.log while it runs, then into $OUT/results.tar.gz with the CSV files, packed anew after each stage: whenever the machine
# is lost, at most 3 files lie in $OUT, and what was learned until then is in them. $OUT/summary.txt has a line for each stage;
# it is printed at the end. (Without OUT a temporary folder is made, and named.)
#
# Environment: OUT, FIRST_HOUR_PYTHON (default: python3), TRITON_CACHE_DIR. FIRST_HOUR_ALL=1 with --dry: all kernels that the stages
# take on a GPU, as first_hour_prepare.sh wants them.
#
# It has not been run on a GPU yet.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

DRY='' ONLY=''
for argument in "$@"; do
  case $argument in
    --dry) DRY=1 ;;
    -*) echo "usage: bash bench/first_hour.sh [--dry] [STAGE ...]" >&2; exit 2 ;;
    *) ONLY="$ONLY $argument " ;;
  esac
done

PYTHON=${FIRST_HOUR_PYTHON:-python3}
PREPARED=$PWD/.first_hour
: "${OUT:=$(mktemp -d "${TMPDIR:-/tmp}/first-hour-XXXXXX")}"
mkdir -p "$OUT"
WORK=$(mktemp -d "${TMPDIR:-/tmp}/first-hour-work-XXXXXX")
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$WORK/packed/logs"
SITE=$WORK/site
SUMMARY=$OUT/summary.txt
echo "results in $OUT"
: >"$SUMMARY"

# In dry mode Triton's own
[ -n "$DRY" ] || export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/soap_opt_triton_cache}
: "${TRITON_CACHE_DIR:=${HOME:-/root}/.triton/cache}"
# Another ptxas than Triton's own would miss that cache, and has never compiled these kernels
unset TRITON_PTXAS_PATH TRITON_PTXAS_BLACKWELL_PATH TRITON_INTERPRET SOAP_OPT_KERNELS
export TRITON_CACHE_DIR PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}"

# Two cores may have to compile there what 16 find compiled here
DRY_LIMIT=$([ -n "${FIRST_HOUR_ALL:-}" ] && echo 3600 || echo 600)
COMMON=(--device cuda --results "$WORK/packed" --gradients "$PREPARED/gradients")
[ -z "$DRY" ] || COMMON=(--device cpu --quick "${COMMON[@]:2}" ${FIRST_HOUR_ALL:+--all})

kernels() { find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l; }

seconds_since() { awk -v began="$1" -v now="$(date +%s.%N)" 'BEGIN { printf "%.1f", now - began }'; }

pack() {
  tar -C "$WORK/packed" -czf "$WORK/results.tar.gz" . && mv "$WORK/results.tar.gz" "$OUT/results.tar.gz"
}

# stage NAME SECONDS COMMAND ...: a line in the summary, whatever becomes of it
stage() {
  local name=$1 limit=$2 log=$OUT/$1.log began before code verdict key
  shift 2
  [ -z "$ONLY" ] || [[ $name == unpack || $name == build ]] || [[ $ONLY == *" $name "* ]] || return 0
  [ -z "$DRY" ] || limit=$DRY_LIMIT
  began=$(date +%s.%N) before=$(kernels)
  timeout -k 5 "$limit" "$@" >"$log" 2>&1 </dev/null
  code=$?
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict='OUT OF TIME' ;;
    *) verdict=FAILED ;;
  esac
  key=$(grep '^key: ' "$log" | tail -n 1 | cut -c6-)
  [ -n "$key" ] || key="says last: $(tail -n 1 "$log" | cut -c1-200)"
  printf '%s: %s (exit %d, %s of %d s, %d kernels new in the cache) %s\n' "$name" "$verdict" "$code" "$(seconds_since "$began")" \
    "$limit" "$(($(kernels) - before))" "$key" | tee -a "$SUMMARY"
  mv "$log" "$WORK/packed/logs/"
  cp "$SUMMARY" "$WORK/packed/"
  pack
}

# python_stage NAME SECONDS MODULE [ARGUMENT ...]: of bench/first_hour, which is told to end by itself a little before
python_stage() {
  local name=$1 limit=$2 module=$3 own=$(($2 - 5))
  shift 3
  [ -z "$DRY" ] || own=$((DRY_LIMIT - 20))
  stage "$name" "$limit" "$PYTHON" -m "bench.first_hour.$module" "${COMMON[@]}" --seconds "$own" "$@"
}

report() {
  nvidia-smi || echo "no nvidia-smi"
  "$PYTHON" -m soap_opt.report
  "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pytest|hypothesis|compressai|pytorch|pillow|nvidia-c)'
  nvcc --version | tail -n 2
  command -v compute-sanitizer gcc file
  env | grep -E '^(TRITON|TORCH|PYTORCH|CUDA|SOAP)' | sort
  nproc
  "$PYTHON" -c 'from soap_opt import _ext
print("key: CPU engine:", _ext._load_error or "loads", "- CUDA refresh:", _ext._cuda_load_error or "loads")'
}

export -f report
export PYTHON

BEGAN=$(date +%s.%N)
stage unpack 20 "$PYTHON" bench/first_hour/unpack.py "$PREPARED" "$SITE"
python_stage build 120 build  # 10 where all was prepared
stage report 15 bash -c report
CUDA_LAUNCH_BLOCKING=1 python_stage smoke 35 smoke
python_stage tests 110 run_tests
python_stage steps 80 steps
python_stage profile 22 kernel_times
python_stage sweep 60 sweep
python_stage sanitizer 60 sanitize
python_stage training 60 training

for log in steps profile sweep training; do
  [ -f "$WORK/packed/logs/$log.log" ] && echo "== $log" && grep '^|' "$WORK/packed/logs/$log.log" | cut -c1-170 | tail -n 25
done
echo "all: $(seconds_since "$BEGAN") s" | tee -a "$SUMMARY"
cp "$SUMMARY" "$WORK/packed/"
pack
echo "== summary"
cat "$SUMMARY"
