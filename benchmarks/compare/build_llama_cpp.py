"""Build llama.cpp for this machine's processor, and its Python bindings. Runs in llama.cpp's environment (Python 3.11).

    python benchmarks/compare/build_llama_cpp.py llama-cpp-python==0.3.36

The source distribution of the bindings holds llama.cpp's sources. Library and server are built from them once, into
`llama.cpp/` of the environment, and the bindings are installed without a library of their own, so that both measure the
same code. Needs a C++ compiler; takes about ten minutes of one core, less with `CMAKE_BUILD_PARALLEL_LEVEL` set.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PREFIX = Path(sys.prefix)
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
TARGETS = ("llama", "llama-server")


def main() -> None:
    """Build."""
    parser = argparse.ArgumentParser(description="Build llama.cpp and install its Python bindings.")
    parser.add_argument("requirement", help="of the bindings, as in llama-cpp-python==0.3.36")
    requirement = parser.parse_args().requirement
    variables = os.environ | {"PATH": f"{PREFIX / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    variables |= {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}  # of the bindings: without a library

    def run(*command: str) -> None:
        subprocess.run(command, env=variables, check=True)

    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    sources = ("--no-deps", "--no-build-isolation", "--no-binary", ":all:")
    with tempfile.TemporaryDirectory() as directory:
        run(*pip, "download", *sources, "--dest", directory, requirement)
        (archive,) = Path(directory).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(directory, filter="data")
        (project,) = (path.parent for path in Path(directory).glob("*/vendor/llama.cpp"))
        build = str(PREFIX / "llama.cpp")
        options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        run("cmake", "-S", str(project / "llama.cpp"), "-B", build, "-G", "Ninja", *options)
        run("cmake", "--build", build, "--target", *TARGETS)
        run(*pip, "install", *sources, requirement)


if __name__ == "__main__":
    main()
