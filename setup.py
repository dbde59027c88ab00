"""Builds the native operators; everything else stands in pyproject.toml.

They are one plain shared library that ONNX Runtime loads, not a Python module. Without a C++
compiler the installation goes on without it, and the portable operator bodies run.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
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
UNIX_ARGUMENTS = ["-std=c++17", "-O3", "-fno-math-errno", "-fvisibility=hidden"]
# MSVC takes every intrinsic without a flag; /EHsc: the glue turns exceptions into statuses.
MSVC_ARGUMENTS = ["/std:c++17", "/O2", "/EHsc"]


class BuildLibrary(build_ext):
    """Builds a library with one exported function, named alike for every Python."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link with the arguments of the compiler that was found."""
        msvc = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = list(MSVC_ARGUMENTS if msvc else UNIX_ARGUMENTS)
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """The entry that ONNX Runtime looks for; a Python module would export PyInit_..."""
        return ["RegisterCustomOps"]

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library goes: beside runtime_py/native.py, which finds it."""
        suffix = ".dll" if os.name == "nt" else ".so"
        return str(Path(*fullname.split("."))) + suffix


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
    cmdclass={"build_ext": BuildLibrary},
)
