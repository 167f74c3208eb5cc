#!/usr/bin/env bash
# Everything that a first hour on a GPU is to teach, in one command: at most 460 s, meant for 16 cores, without a network.
#
#     bash bench/first_hour.sh                  all stages
#     bash bench/first_hour.sh smoke sweep      these stages alone (after unpack and build)
#     bash bench/first_hour.sh --dry            on a machine without a GPU: every stage's code with pretended launches, tiny
#
# For a machine with a GPU and no network: run bench/first_hour_prepare.sh before, elsewhere, copy this tree and the ignored
# folder .first_hour to it, and run the first command above there.
#
# Time: every stage is a process of its own under `timeout`; none that fails or hangs keeps the next from running. Its limit
# is the smaller of its own, below, and what is left of FIRST_HOUR_SECONDS, counted from the start of this script, so that the
# whole ends in time whatever is slow: the limits add up to more, but where all was prepared unpack, build and report take 20
# s of their 155. A stage that would have less than 8 s is "skipped: no time left". Stages with parts stop these 10 s before
# their limit (a third of it below 30 s), all together, and still say what became of each.
#
# What remains: a stage's output goes to $OUT/NAME.log while it runs. That of its parts (of smoke, tests and sanitizer) goes
# to files of their own, which with the CSV files and the logs of the stages before are packed into $OUT/results.tar.gz, anew
# after each stage and every 10 s while one runs. So whenever the machine is lost, at most 3 files lie in $OUT, with all that
# was said until then but for the last 10 s of such parts. $OUT/summary.txt has a line for each stage that has ended; it is
# printed at the end. (Without OUT a temporary folder is made, and named.)
#
# Environment: OUT, FIRST_HOUR_PYTHON (default: python3), TRITON_CACHE_DIR, FIRST_HOUR_SECONDS (default: 460; with --dry ten
# hours, and 600 s for each stage). FIRST_HOUR_ALL=1 with --dry: all kernels that the stages take on a GPU, as
# first_hour_prepare.sh wants them, and an hour for each stage.
#
# It has not been run on a GPU yet.
set -u
BEGAN=$(date +%s.%N)
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
PACKER=''
trap 'stop_packing; rm -rf "$WORK"' EXIT
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
: "${FIRST_HOUR_SECONDS:=$([ -n "$DRY" ] && echo 36000 || echo 460)}"
KILL_AFTER=3                 # seconds between the signals of `timeout`
RESERVE=$((KILL_AFTER + 4))  # what the end of a stage may take beyond its limit: that, packing and the summary
LEAST=8                      # what a stage needs to begin at all
COMMON=(--device cuda --results "$WORK/packed" --gradients "$PREPARED/gradients")
[ -z "$DRY" ] || COMMON=(--device cpu --quick "${COMMON[@]:2}" ${FIRST_HOUR_ALL:+--all})

kernels() { find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l; }

seconds_since() { awk -v began="$1" -v now="$(date +%s.%N)" 'BEGIN { printf "%.1f", now - began }'; }

# (a file of its own for each process that packs; tar's exit status 1: a file grew meanwhile)
pack() {
  local archive=$WORK/results.$BASHPID.tar.gz
  tar -C "$WORK/packed" -czf "$archive" . 2>/dev/null
  [ $? -le 1 ] && mv "$archive" "$OUT/results.tar.gz"
}

pack_often() {
  while sleep 10 && kill -0 $$; do pack; done
}

stop_packing() {
  [ -z "$PACKER" ] || { kill "$PACKER" && wait "$PACKER"; } 2>/dev/null
  PACKER=''
}

# allowed SECONDS: what a stage with that limit may take, now
allowed() {
  local limit=$1
  [ -z "$DRY" ] || limit=$DRY_LIMIT
  awk -v limit="$limit" -v whole="$FIRST_HOUR_SECONDS" -v gone="$(seconds_since "$BEGAN")" -v reserve="$RESERVE" \
    'BEGIN { left = int(whole - gone - reserve); print(left < limit ? left : limit) }'
}

# until_of SECONDS: when a stage with that limit that begins now is to end by itself, a little before it would be killed
until_of() { awk -v now="$(date +%s.%N)" -v limit="$1" 'BEGIN { printf "%.1f", now + limit - (limit < 30 ? limit / 3 : 10) }'; }

# stage NAME SECONDS COMMAND ...: a line in the summary, whatever becomes of it
stage() {
  local name=$1 limit log=$OUT/$1.log began before code verdict key
  limit=$(allowed "$2")
  shift 2
  [ -z "$ONLY" ] || [[ $name == unpack || $name == build ]] || [[ $ONLY == *" $name "* ]] || return 0
  if [ "$limit" -lt "$LEAST" ]; then
    echo "$name: skipped: no time left" | tee -a "$SUMMARY"
    return 0
  fi
  began=$(date +%s.%N) before=$(kernels)
  FIRST_HOUR_UNTIL=$(until_of "$limit") timeout -k "$KILL_AFTER" "$limit" "$@" >"$log" 2>&1 </dev/null
  code=$?
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict='OUT OF TIME' ;;
    *) verdict=FAILED ;;
  esac
  key=$(grep '^key: ' "$log" | tail -n 1 | cut -c6-)
  [ -n "$key" ] || key="says last: $(tail -n 1 "$log" | cut -c1-200)"
  printf '%s: %s (exit %d, %s of %d s, %d kernels new in the cache) %s\n' "$name" "$verdict" "$code" \
    "$(seconds_since "$began")" "$limit" "$(($(kernels) - before))" "$key" | tee -a "$SUMMARY"
  mv "$log" "$WORK/packed/logs/"
  cp "$SUMMARY" "$WORK/packed/"
  pack
}

# python_stage NAME SECONDS MODULE [ARGUMENT ...]: of bench/first_hour
python_stage() {
  local name=$1 limit=$2 module=$3
  shift 3
  stage "$name" "$limit" "$PYTHON" -m "bench.first_hour.$module" "${COMMON[@]}" "$@"
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

pack_often >/dev/null 2>&1 </dev/null &
PACKER=$!
stage unpack 20 "$PYTHON" bench/first_hour/unpack.py "$PREPARED" "$SITE"
python_stage build 120 build  # 10 where all was prepared
stage report 15 bash -c report
CUDA_LAUNCH_BLOCKING=1 python_stage smoke 40 smoke
python_stage tests 110 run_tests
python_stage steps 80 steps
python_stage profile 22 kernel_times
python_stage sweep 60 sweep
python_stage sanitizer 60 sanitize
python_stage training 60 training

stop_packing  # (before the last time: an older archive must not come after it)
for log in steps profile sweep training; do
  [ -f "$WORK/packed/logs/$log.log" ] && echo "== $log" && grep '^|' "$WORK/packed/logs/$log.log" | cut -c1-170 | tail -n 25
done
echo "all: $(seconds_since "$BEGAN") s" | tee -a "$SUMMARY"
cp "$SUMMARY" "$WORK/packed/"
pack
echo "== summary"
cat "$SUMMARY"
