"""Builds soap_opt._C, the compiled operators, where that is possible; everything else is in pyproject.toml.

A missing torch or compiler, or a failed build, never breaks the install: pure PyTorch is used then, and
``python -m soap_opt.report`` says why. SOAP_OPT_BUILD=0 leaves the build out, SOAP_OPT_BUILD=1 makes its failure an error.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
WANTED = os.environ.get("SOAP_OPT_BUILD", "")


def compiled() -> dict:
    """setup()'s arguments for the extension; none where it cannot be built."""
    if WANTED == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if WANTED == "1":
            raise
        print("soap_opt: no torch to build against (pip install --no-build-isolation has it): pure Python", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            folder = ROOT if self.inplace or getattr(self, "editable_mode", False) else Path(self.build_lib)
            package = folder / "soap_opt"
            note = package / "_build_failure.txt"
            for stale in (note, *package.glob("_C.*")):  # of an earlier install in place
                stale.unlink(missing_ok=True)
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if WANTED == "1":
                    raise
                package.mkdir(parents=True, exist_ok=True)
                note.write_text(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}\n")
                print(f"soap_opt: the extension was not built, pure Python instead: {error}", file=sys.stderr)

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

        def get_output_mapping(self) -> dict[str, str]:
            return {built: source for built, source in super().get_output_mapping().items() if Path(built).exists()}

    # -fno-..: vectorised sqrt. -Wno-psabi: vectors are passed between inlined functions only.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"] if os.name != "nt" else ["/O2", "/openmp"]
    if sys.platform == "linux":
        flags.append("-fopenmp")
    # OpenMP is compiled in but not linked: its symbols come with torch, so that there is one runtime, which knows that a
    # matrix product inside a parallel region is not to start threads of its own.
    extension = CppExtension(
        name="soap_opt._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        extra_compile_args={"cxx": flags},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**compiled())
