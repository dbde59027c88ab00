"""Builds the native operators; everything else stands in pyproject.toml.

They are one plain shared library that ONNX Runtime loads, not a Python module. Without a C++
compiler the installation goes on without it, and the portable operator bodies run.

The operators for CUDA devices are a second library, built only when asked for:
``python setup.py build_cuda``, or ``PHI4EXPORT_CUDA=1`` in the environment of pip.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("kernels")
SOURCES = (
    "dispatch",
    "isa_avx2",
    "isa_avx2_vnni",
    "isa_avx512",
    "isa_avx512_vnni",
    "isa_neon",
    "isa_neon_dot",
    "isa_portable",
    "ort_operators",
)
# -g0: Python's own -g makes the library, which every package carries, ten times as large.
UNIX_ARGUMENTS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
CUDA_LIBRARY = "_sambay_ops_cuda"
# Turing to Hopper, and intermediate code of the last for what comes after.
CUDA_ARCHITECTURES = "75;80;86;89;90"
CUDA_ARGUMENTS = ["-std=c++17", "-O3", "-t", "1", "-Werror", "all-warnings"]
# /EHsc: the glue turns exceptions into statuses.
MSVC_ARGUMENTS = ["/std:c++17", "/O2", "/EHsc"]
# MSVC takes every intrinsic without a flag, but would encode those of 128 bits as SSE, between
# instructions of AVX. Not AVX512 for isa_avx512*: a function of a standard header that stays out of
# line is shared with isa_avx2*.
MSVC_AVX2 = "/arch:AVX2"


class BuildLibrary(build_ext):
    """Builds a library with one exported function, named alike for every Python."""

    def run(self) -> None:
        """Build the library for processors, and the one for CUDA devices if it is asked for."""
        super().run()
        if os.environ.get("PHI4EXPORT_CUDA") == "1":
            build = self.get_finalized_command("build_cuda")
            build.output = str(Path("" if self.inplace else self.build_lib, "runtime_py"))
            self.run_command("build_cuda")

    def build_extension(self, ext: Extension) -> None:
        """Compile and link with the arguments of the compiler that was found."""
        msvc = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = list(MSVC_ARGUMENTS if msvc else UNIX_ARGUMENTS)
        if msvc and self.plat_name == "win-amd64":
            wide = [source for source in ext.sources if "isa_avx" in source]
            ext.sources = [source for source in ext.sources if source not in wide]
            arguments = [*MSVC_ARGUMENTS, MSVC_AVX2]
            ext.extra_objects = self.compiler.compile(
                wide, output_dir=self.build_temp, extra_postargs=arguments, depends=ext.depends
            )
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """The entry that ONNX Runtime looks for; a Python module would export PyInit_..."""
        return ["RegisterCustomOps"]

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library goes: beside runtime_py/native.py, which finds it."""
        suffix = ".dll" if os.name == "nt" else ".so"
        return str(Path(*fullname.split("."))) + suffix


class Wheel(bdist_wheel):
    """One wheel for every Python of a platform: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


class BuildCuda(Command):
    """Builds the operators for CUDA devices with nvcc, for Linux and Windows."""

    description = "build the native operators for CUDA devices"
    user_options: ClassVar = [
        ("architectures=", None, f"such as 80;90; default {CUDA_ARCHITECTURES}"),
        ("output=", None, "folder of the library; default runtime_py"),
    ]

    def initialize_options(self) -> None:
        """Set the defaults."""
        self.architectures, self.output = CUDA_ARCHITECTURES, "runtime_py"

    def finalize_options(self) -> None:
        """Nothing depends on other commands."""

    def run(self) -> None:
        """Compile what is older than the kernels, and link.

        Raises:
            SystemExit: there is no nvcc, or it fails.
        """
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise SystemExit("no nvcc on the PATH: install CUDA 12 or newer, or do not ask for it")
        numbers = self.architectures.split(";")
        targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
        targets.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
        windows = os.name == "nt"
        host = ["/O2", "/EHsc"] if windows else ["-fPIC", "-fvisibility=hidden"]
        settings = [*CUDA_ARGUMENTS, *targets, *(f"-Xcompiler={each}" for each in host)]
        newest = max(path.stat().st_mtime for path in KERNELS.rglob("*.*"))
        folder = Path("build", "cuda-" + "-".join(numbers))
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in sorted((KERNELS / "cuda").glob("*.cu")):
            built = folder / f"{source.stem}.o"
            if not built.exists() or built.stat().st_mtime < newest:
                _call(nvcc, *settings, "-c", str(source), "-o", str(built))
            objects.append(str(built))
        suffix = ".dll" if windows else ".so"
        library = Path(self.output, CUDA_LIBRARY + suffix)
        library.parent.mkdir(parents=True, exist_ok=True)
        _call(nvcc, *targets, "-shared", *objects, "-o", str(library))


def _call(*command: str) -> None:
    print(" ".join(command), flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit(f"{command[0]} failed: its message stands above")


setup(
    ext_modules=[
        Extension(
            "runtime_py._sambay_ops",
            sources=[str(KERNELS / f"{stem}.cc") for stem in SOURCES],
            # All headers, and operators that isa_*.cc include: a change of any builds anew.
            depends=[path.as_posix() for path in sorted(KERNELS.glob("*.*"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildLibrary, "build_cuda": BuildCuda},
)
