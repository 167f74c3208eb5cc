"""Put what bench/first_hour_prepare.sh made where this machine looks for it: extensions, wheels, Triton's cache.

    python -m bench.first_hour.unpack FOLDER SITE       (bench/first_hour.sh does)

Nothing is overwritten: an extension is copied where there is none, a wheel unpacked to SITE where its package is missing.
Imports neither torch nor soap_opt, which may not work yet.

What makes a kernel miss Triton's cache. A kernel's key (triton.compiler.compiler.get_cache_key, triton.runtime.jit) is made of

- Triton itself: every file of its compiler, language and backends, and libtriton.so, byte by byte: the same wheel;
- the kernel's source with the line that it begins at, the same of every function that it calls, and the values of the
  tl.constexpr that these name (so that an edited comment above a kernel, or another launch.TILES, compiles everything again);
- in Triton 3.6, which kernels the process hashed before it: common.same_hashes hashes them all in one order, in the tests too
  (pytest_plugin.py);
- types, alignments and constants of its arguments; options (warps, stages; the bytes of libdevice);
- ``ptxas --version`` and the compute capability: TRITON_PTXAS_PATH in the environment counts, first_hour.sh takes it away;
- environment variables: DISABLE_LLVM_OPT, TRITON_DISABLE_LINE_INFO, TRITON_DEFAULT_FP_FUSION and the like.

Where the checkout lies is not part of it (tried: 0 misses from another folder), nor where the cache does; but an entry names
its files by absolute paths, which are rewritten here where the cache was made elsewhere. The launchers in C, which gcc compiles
in half a second each, are kept under the hash of their source and of the platform; there are none in what was made without a
driver.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "soap_opt"


def extensions(folder: Path) -> None:
    """The compiled parts for this Python."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for file in sorted(folder.glob(f"*{suffix}")):
        target = PACKAGE / file.name
        if target.exists():
            print(f"{file.name}: is there")
        else:
            shutil.copyfile(file, target)
            print(f"{file.name}: copied")


def wheels(folder: Path, site: Path) -> None:
    """The packages that are missing, to a folder for PYTHONPATH."""
    site.mkdir(parents=True, exist_ok=True)
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for file in sorted(folder.glob("*.whl")):
        package, *_, python, abi, _ = file.stem.split("-")
        if tag not in python and "py3" not in python and abi != "abi3":
            print(f"{file.name}: for another Python")
        elif importlib.util.find_spec(package) is not None:
            print(f"{package}: is there")
        else:
            with zipfile.ZipFile(file) as archive:
                archive.extractall(site)
            print(f"{package}: unpacked")


def cache(archive: Path) -> None:
    """Triton's cache, to TRITON_CACHE_DIR; entries that are there stay."""
    place = Path(os.environ["TRITON_CACHE_DIR"])
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as entries:
        made_at = entries.next()
        if made_at is None or not made_at.name.startswith("made-at"):
            raise ValueError(f"{archive} does not say where it was made")
        was = entries.extractfile(made_at).read().decode().strip()
        for member in entries:
            if not (place / member.name).exists():
                entries.extract(member, place, filter="data")
    if was != str(place):
        for index in place.glob("*/__grp__*"):
            index.write_text(index.read_text().replace(f'"{was}/', f'"{place}/'))
    print(f"Triton's cache: {len(list(place.glob('*/*.cubin')))} kernels at {place}")


def main() -> None:
    folder, site = Path(sys.argv[1]), Path(sys.argv[2])
    start = time.perf_counter()
    if not folder.is_dir():
        print(f"there is no {folder}: nothing was prepared (bench/first_hour_prepare.sh)")
    for what, function in (
        ("extensions", lambda: extensions(folder / "extensions")),
        ("wheels", lambda: wheels(folder / "wheels", site)),
        ("cache", lambda: cache(folder / "triton_cache.tar.xz")),
    ):
        try:
            function()
        except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
            print(f"{what}: {type(error).__name__}: {error}")
    print(f"key: unpacked in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
