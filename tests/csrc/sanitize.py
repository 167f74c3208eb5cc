"""The engine's edge shapes, for a build under AddressSanitizer and UBSan. Not a test by itself: .ci/sanitize runs it.

``prepare FOLDER [--self-test]`` edits a *copy* of csrc:

- Between the pieces of a core's workspace, which are parts of one tensor, lie poisoned elements; AddressSanitizer alone sees
  only what runs over the end of the whole.
- The instruction set can be limited at run time, so that one machine checks all that it has. Where it has no AVX-512, the
  compiler makes those tiles, of registers of 64 bytes, from AVX2's: the sums are the same, only slower.
- With --self-test, environment variables switch on errors that must be found.

``run [--self-test]`` steps and compares with the specification; a sanitizer's report ends the process with its exit code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Unpoisons at its end what lies between the pieces of one workspace.
RED_ZONES = """namespace soap_opt {
struct RedZones {
  const char *first = nullptr, *last = nullptr;
  RedZones() = default;
  RedZones(const RedZones&) = delete;
  void add(const void* begin, const void* end) {
    last = static_cast<const char*>(end);
    if (first == nullptr) first = static_cast<const char*>(begin);
    ASAN_POISON_MEMORY_REGION(begin, last - static_cast<const char*>(begin));
  }
  ~RedZones() {
    if (first != nullptr) ASAN_UNPOISON_MEMORY_REGION(first, last - first);
  }
};
"""

# (file, old, new): each must be found, so that a change of csrc cannot leave the checks out unnoticed
EDITS = [
    ("cpu/blocked.h", "#include <algorithm>\n", "#include <algorithm>\n#include <sanitizer/asan_interface.h>\n"),
    ("cpu/blocked.h", "namespace soap_opt {\n", RED_ZONES),
    ("cpu/blocked.h", "  int64_t numel = 0;\n\n", "  int64_t numel = 0;\n  RedZones red_zones;\n\n"),
    (
        "cpu/blocked.h",
        "numel += panels_of<T>(n) * kPackedWidth<T>; // cache lines\n",
        "const int64_t padded = (panels_of<T>(n) + 1) * kPackedWidth<T>; // one cache line that nobody may touch\n"
        "      if (memory != nullptr) red_zones.add(place + n, place + padded);\n"
        "      numel += padded;\n",
    ),
    (
        "cpu/simd.h",
        "inline int isa_level() {\n",
        'extern "C" int soap_opt_isa_limit;\ninline int isa_available();\n'
        "inline int isa_level() { return isa_available() < soap_opt_isa_limit ? isa_available() : soap_opt_isa_limit; }\n"
        "inline int isa_available() {\n",
    ),
    (
        "library.cpp",
        "TORCH_LIBRARY(soap_opt, m) {",
        'extern "C" {\nint soap_opt_isa_limit = 2;\n}\nTORCH_LIBRARY(soap_opt, m) {',
    ),
]

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
WITHOUT_AVX512_EDITS = [
    ("cpu/simd.h", f'target("{",".join(AVX512)},avx2,fma")', 'target("avx2,fma")'),
    ("cpu/simd.h", "avx512 ? 2 : avx2 ? 1 : 0", "avx2 ? 2 : avx512 ? 1 : 0"),
]

# What each self-test does: one element behind a Gram, one behind a piece of the workspace, a signed overflow
SELF_TESTS = ("heap", "workspace", "undefined")
SELF_TEST_EDITS = [
    ("cpu/loops.cpp", "#include <algorithm>\n", "#include <algorithm>\n#include <cstdlib>\n#include <cstring>\n"),
    (
        "cpu/loops.cpp",
        "  const T beta = T(beta_), weight = T(1 - beta_);\n",
        '  const char* wanted = std::getenv("SOAP_OPT_SELF_TEST");\n'
        '  if (wanted != nullptr && std::strcmp(wanted, "heap") == 0) gram[d * d] = 0;\n'
        '  if (wanted != nullptr && std::strcmp(wanted, "undefined") == 0) ld = (int64_t(1) << 62) * ld * 4;\n'
        "  const T beta = T(beta_), weight = T(1 - beta_);\n",
    ),
    (
        "cpu/step.cpp",
        "  if (!(sum_squares(g, n) <= kLargestSquaredNorm<T>)) return kUnusable;\n",
        '  const char* wanted = std::getenv("SOAP_OPT_SELF_TEST");\n'
        '  if (wanted != nullptr && std::string(wanted) == "workspace") work.whole[n + kPackedWidth<T>] = 0;\n'
        "  if (!(sum_squares(g, n) <= kLargestSquaredNorm<T>)) return kUnusable;\n",
    ),
]


def has_avx512() -> bool:
    flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and set(AVX512) <= set(flags[1].split())


def prepare(folder: Path, self_test: bool) -> None:
    edits = EDITS + (SELF_TEST_EDITS if self_test else [])
    if not has_avx512():
        print("no AVX-512 here: its tiles are made of AVX2's registers")
        edits += WITHOUT_AVX512_EDITS
    for name, old, new in edits:
        path = folder / name
        text = path.read_text()
        if old not in text:
            sys.exit(f"tests/csrc/sanitize.py: csrc/{name} has nothing like {old.strip()!r} any more: adapt EDITS")
        path.write_text(text.replace(old, new))


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), "--self-test" in sys.argv)
    else:
        from edge_shapes import run  # which imports the copy, built by now

        run("--self-test" in sys.argv)
