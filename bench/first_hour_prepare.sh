#!/usr/bin/env bash
# Makes .first_hour/, what bench/first_hour.sh takes along to a machine without a network: below 60 MiB together with the checkout.
#
#     bash bench/first_hour_prepare.sh                  everything; a quarter of an hour on two cores
#     bash bench/first_hour_prepare.sh cache            one part anew: extensions, wheels, gradients or cache
#
# Parts:
#   extensions   soap_opt/_C and _C_cuda for that machine's Python and torch, stripped (sm_90 alone)
#   wheels       packages that it does not have
#   gradients    of the LIC models, made here (bench/first_hour/gradients.py)
#   cache        Triton's, warm: bench/first_hour.sh --dry steps here as its stages step there, with a driver that only pretends, so
#                that exactly those kernels are compiled which are launched. To be made anew after every change of kernels/ or of
#                soap_opt/cuda/tables.py; bench/first_hour/unpack.py says what else makes it miss. FIRST_HOUR_SWEEP=0 leaves out the
#                hundred kernels of the sweep: most of the time here, half a minute of 16 cores there.
#
# Environment:
#   FIRST_HOUR_PYTHON    a Python of that machine's version (3.12) with its torch (2.11.0), numpy, ninja, setuptools, pytest and
#                        hypothesis; without it a virtual environment is made in build/first_hour_venv (python3.12, several GB)
#   MODELS_PYTHON        a Python with compressai and torchvision, of any version (default: .venv/bin/python)
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH='torch==2.11.0'
WHEELS=(compressai==1.2.8 pytorch_optimizer==4.1.0 pytorch-msssim==1.0.0 tomli==2.5.0)
PLATFORMS=(manylinux_2_34_x86_64 manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
CACHE=/tmp/soap_opt_triton_cache  # (any folder: unpack.py rewrites the paths in its index)
LIMIT_MIB=60

FOLDER=$PWD/.first_hour
MODELS_PYTHON=${MODELS_PYTHON:-.venv/bin/python}
COPY=$(mktemp -d "${TMPDIR:-/tmp}/first-hour-copy-XXXXXX")
trap 'rm -rf "$COPY"' EXIT
mkdir -p "$FOLDER"

travels() {
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [ -e "$file" ]; then printf '%s\0' "$file"; fi
  done
}

# As the other machine will have it: what travels, and nothing that was built here for another Python
copy() { travels | tar --null -T - -cf - | tar -xf - -C "$COPY"; }

python() {
  if [ -z "${FIRST_HOUR_PYTHON:-}" ]; then
    FIRST_HOUR_PYTHON=$PWD/build/first_hour_venv/bin/python
    if ! [ -x "$FIRST_HOUR_PYTHON" ]; then
      python3.12 -m venv build/first_hour_venv
      "$FIRST_HOUR_PYTHON" -m pip install -q "$TORCH" numpy 'setuptools>=77' ninja pytest hypothesis
    fi
  fi
}

extensions() {
  rm -rf "$FOLDER/extensions" && mkdir -p "$FOLDER/extensions"
  (cd "$COPY" && SOAP_OPT_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 "$FIRST_HOUR_PYTHON" setup.py -q build_ext --inplace >/dev/null)
  cp "$COPY"/soap_opt/_C*.so "$FOLDER/extensions/"
  strip --strip-unneeded "$FOLDER"/extensions/*.so
}

wheels() {
  rm -rf "$FOLDER/wheels" && mkdir -p "$FOLDER/wheels"
  "$FIRST_HOUR_PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --abi cp312 --abi abi3 --abi none "${PLATFORMS[@]/#/--platform=}" -d "$FOLDER/wheels" "${WHEELS[@]}"
}

gradients() {
  rm -rf "$FOLDER/gradients"
  "$MODELS_PYTHON" -m bench.first_hour.gradients "$FOLDER/gradients"
}

cache() {
  rm -rf "$CACHE"
  mkdir -p "$COPY/.first_hour"  # (not the cache that was)
  ln -sfn "$FOLDER/extensions" "$FOLDER/wheels" "$COPY/.first_hour/"
  # the cubins alone: what a launch needs
  local stages='build report smoke tests steps profile sanitizer training'
  [ "${FIRST_HOUR_SWEEP:-1}" = 0 ] || stages="$stages sweep"
  (cd "$COPY" && OUT=$COPY/out FIRST_HOUR_ALL=1 FIRST_HOUR_PYTHON=$FIRST_HOUR_PYTHON TRITON_CACHE_DIR=$CACHE \
    TRITON_STORE_BINARY_ONLY=1 bash bench/first_hour.sh --dry $stages >"$COPY/dry.log" 2>&1) || true
  sed -n '/^== summary/,$p' "$COPY/dry.log"
  echo "$CACHE" >"$CACHE/made-at"
  find "$CACHE" -name '*.source' -delete
  tar -C "$CACHE" -cJf "$FOLDER/triton_cache.tar.xz" made-at $(cd "$CACHE" && ls | grep -v made-at)
  rm -rf "$CACHE"
}

python
copy
for part in ${*:-extensions wheels gradients cache}; do
  case $part in
    extensions | wheels | gradients | cache) echo "== $part" && "$part" ;;
    *) echo "no part is called $part" >&2 && exit 2 ;;
  esac
done

echo "== sizes"
(cd "$FOLDER" && du -ab --max-depth=2 . | sort -rn | awk '{ printf "%8.2f MiB  %s\n", $1 / 1048576, $2 }')
tree=$(travels | du -cb --files0-from=- | tail -n 1 | cut -f1)
folder=$(du -sb "$FOLDER" | cut -f1)
echo "$(((tree + folder) / 1048576)) MiB: the checkout $((tree / 1048576)), .first_hour $((folder / 1048576)); at most $LIMIT_MIB"
[ $(((tree + folder) / 1048576)) -lt $LIMIT_MIB ]
