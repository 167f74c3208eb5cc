"""Builds soap_opt._C, the compiled operators, where that is possible; everything else is in pyproject.toml.

A missing torch or compiler, or a failed build, never breaks the install: pure PyTorch is used then, and
``python -m soap_opt.report`` says why. SOAP_OPT_BUILD=0 leaves the build out, SOAP_OPT_BUILD=1 makes its failure an error.
soap_opt._C_cuda, the CUDA implementations, is built where a CUDA toolkit is (whether a GPU is there is never asked), for
TORCH_CUDA_ARCH_LIST; without it the rest is built all the same. SOAP_OPT_BUILD_CUDA=0 and =1 as above; =1 wants all of it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
WANTED = os.environ.get("SOAP_OPT_BUILD", "")
WANTED_CUDA = os.environ.get("SOAP_OPT_BUILD_CUDA", "")
FORCED = "1" in (WANTED, WANTED_CUDA)
CUDA_MODULE = "soap_opt._C_cuda"
CUDA_ARCHITECTURES = ("8.0", "8.6", "9.0", "10.0")


def compiled() -> dict:
    """setup()'s arguments for the extension; none where it cannot be built."""
    if WANTED == "0" and WANTED_CUDA == "1":
        raise SystemExit("SOAP_OPT_BUILD=0 and SOAP_OPT_BUILD_CUDA=1 contradict each other: the CUDA part needs the rest")
    if WANTED == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if FORCED:
            raise
        print("soap_opt: no torch to build against (pip install --no-build-isolation has it): pure Python", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            folder = ROOT if self.inplace or getattr(self, "editable_mode", False) else Path(self.build_lib)
            package = folder / "soap_opt"
            note = package / "_build_failure.txt"
            self.cuda_note = package / "_cuda_build_failure.txt"
            for stale in (note, self.cuda_note, *package.glob("_C.*"), *package.glob("_C_cuda.*")):  # of an earlier install
                stale.unlink(missing_ok=True)
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if FORCED:
                    raise
                package.mkdir(parents=True, exist_ok=True)
                note.write_text(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}\n")
                print(f"soap_opt: the extension was not built, pure Python instead: {error}", file=sys.stderr)

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                if self.started or self.extensions[-1].name != CUDA_MODULE or WANTED_CUDA == "1":
                    raise
                self.without_cuda(error)  # torch does not like this toolkit, and looks before it builds anything
                del self.extensions[-1]
                super().build_extensions()

        started = False

        def build_extension(self, extension) -> None:
            self.started = True
            try:
                super().build_extension(extension)
            except (Exception, SystemExit) as error:
                if extension.name != CUDA_MODULE or WANTED_CUDA == "1":
                    raise
                self.without_cuda(error)

        def without_cuda(self, error: BaseException) -> None:
            self.cuda_note.parent.mkdir(parents=True, exist_ok=True)
            self.cuda_note.write_text(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}\n")
            print(f"soap_opt: the CUDA kernels were not built, the CPU engine alone instead: {error}", file=sys.stderr)

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
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp") if path.parent.name != "cuda"),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        extra_compile_args={"cxx": flags},
    )
    return {"ext_modules": [extension, *cuda_extension(flags)], "cmdclass": {"build_ext": OptionalBuild}}


def cuda_extension(flags: list[str]) -> list:
    """soap_opt._C_cuda where it is to be built: none or one."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension

    if WANTED_CUDA == "0" or (WANTED_CUDA != "1" and (CUDA_HOME is None or torch.version.cuda is None)):
        return []
    if CUDA_HOME is None:
        raise RuntimeError("SOAP_OPT_BUILD_CUDA=1, but there is no CUDA toolkit: set CUDA_HOME, or put nvcc on the PATH")
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # torch's own default asks which GPU is there, also where it is empty
        known = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        chips = [chip for chip in CUDA_ARCHITECTURES if "sm_" + chip.replace(".", "") in known] or list(CUDA_ARCHITECTURES)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chips) + "+PTX"
    folder = ROOT / "csrc" / "cuda"
    # The CUDA runtime is linked statically: what is built also loads where torch has none. No headers of cuBLAS or cuSOLVER
    # are needed; products go through ATen.
    return [
        CppExtension(
            name=CUDA_MODULE,
            optional=WANTED_CUDA != "1",
            sources=sorted(str(path.relative_to(ROOT)) for path in (*folder.glob("*.cpp"), *folder.glob("*.cu"))),
            depends=sorted(str(path.relative_to(ROOT)) for path in (*folder.glob("*.h"), *folder.glob("*.cuh"))),
            extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
            library_dirs=cuda_library_dirs(CUDA_HOME),
            libraries=["cudart_static", "rt", "dl", "pthread"],
        )
    ]


def cuda_library_dirs(home: str) -> list[str]:
    """Where the toolkit's libraries are. nvcc knows; its folder's neighbour need not be lib64 (a wrapper in /usr/local/bin)."""
    done = subprocess.run([f"{home}/bin/nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    return re.findall(r'"-L([^"]+)"', done.stderr) or [f"{home}/lib64"]


setup(**compiled())
