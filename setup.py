"""Builds the compiled library ``alpkd_fast/_C.abi3.so`` against LibTorch's stable ABI.

One binary serves every torch >= 2.10 and every Python >= 3.10. Without a C++ compiler the package
installs as pure Python. ALPKD_FAST_CPU=1 demands the library, ALPKD_FAST_CPU=0 leaves it out.
"""

import os
import platform
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
CUDA_BUILD = runpy.run_path("csrc/cuda/build.py")


# Each instruction set is one file of its own; which of them runs is chosen at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SET_FLAGS = {
    "row_kernel_avx2.cpp": AVX2,
    "row_kernel_avx512.cpp": AVX512,
    "row_kernel_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}


class BuildLibrary(build_ext):
    """Compiles with LibTorch's headers; a failure is an error only where the library is demanded.

    Objects stay in build/objects: an editable install, a wheel and a second build compile a file once.
    """

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = "build/objects"

    def build_extension(self, extension):
        if extension.name == "alpkd_fast._C_cuda":
            CUDA_BUILD["build_if_wanted"](Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / "cuda")
            return
        try:
            from torch.utils.cpp_extension import include_paths, library_paths

            extension.include_dirs += include_paths()
            extension.library_dirs += library_paths()
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as jobs:
                compiled = jobs.map(lambda source: self.compile_source(extension, source), extension.sources)
                extension.extra_objects = list(compiled)
            extension.sources = []
            super().build_extension(extension)
        except Exception as error:
            if os.environ.get("ALPKD_FAST_CPU") == "1":
                raise
            print(f"alpkd_fast: the compiled library was not built, the package installs as pure Python: {error}",
                  file=sys.stderr)  # fmt: skip

    def compile_source(self, extension, source):
        on_x86 = platform.machine().lower() in ("x86_64", "amd64")
        flags = INSTRUCTION_SET_FLAGS.get(Path(source).name, []) if on_x86 else []
        (built,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
        if not newer_group([source, "setup.py", *extension.depends], built):
            return built
        self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=extension.define_macros,
            include_dirs=extension.include_dirs,
            extra_postargs=[*extension.extra_compile_args, *flags],
        )
        return built


library = Extension(
    "alpkd_fast._C",
    sources=SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    define_macros=[
        ("Py_LIMITED_API", "0x030A0000"),
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # LibTorch 2.10
    ],
    # -ffp-contract=fast: a * b + c is one fused multiply-add; never -ffast-math, NaN must come through.
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-g1",
        "-Wno-maybe-uninitialized",
    ],
    libraries=["torch_cpu"],
    language="c++",
    py_limited_api=True,
    optional=os.environ.get("ALPKD_FAST_CPU") != "1",
)

cuda_library = Extension("alpkd_fast._C_cuda", sources=[], py_limited_api=True, optional=True)

setup(
    packages=[*find_packages(include=["alpkd_fast", "alpkd_fast.*"]), "alpkd_fast.kernels"],
    package_dir={"alpkd_fast.kernels": "kernels"},
    package_data={"alpkd_fast": ["py.typed"], "alpkd_fast.kernels": ["budget.json"]},
    ext_modules=[*([] if os.environ.get("ALPKD_FAST_CPU") == "0" else [library]), cuda_library],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
