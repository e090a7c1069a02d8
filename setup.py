"""Compiles the CPU kernels where there is a C++ compiler, and goes without where there is none.

Everything else about the distribution is in pyproject.toml. HFQUANT_NO_KERNELS=1 skips the compilation.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
SOURCES = Path("kernels/core/cpu")
PACKAGE = Path("hfquant/kernels/cpu")

_spec = importlib.util.spec_from_file_location("hfquant_build", ROOT / "hfquant" / "build.py")
builder = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = builder  # dataclasses look their module up
_spec.loader.exec_module(builder)

MESSAGE = """
hfquant: the CPU kernels were not compiled.
{reason}
hfquant is installed without them: the reference kernels run everything, slowly.
To get them, install a C++ compiler (g++ or clang++) and run: hfquant doctor --build
"""


class build_kernels(Command):
    """Put the library into the build folder, or next to its sources for an editable install."""

    user_options: ClassVar = []

    def initialize_options(self):
        """No options yet."""
        self.build_lib, self.editable_mode = None, False

    def finalize_options(self):
        """Build where the Python files are built."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    @property
    def library(self):
        """The file that this makes."""
        return (ROOT / SOURCES if self.editable_mode else Path(self.build_lib) / PACKAGE) / builder.LIBRARY

    def run(self):
        """Compile, or say once why not; never fail."""
        if not self.editable_mode:
            self.library.unlink(missing_ok=True)  # setuptools keeps build/ from one run to the next
        if os.environ.get("HFQUANT_NO_KERNELS") == "1":
            return
        try:
            built = builder.build_library(ROOT / SOURCES, self.library.parent)
        except (builder.BuildError, OSError) as problem:
            print(MESSAGE.format(reason=problem), file=sys.stderr)
        else:
            print(*built.lines(), built.warnings, sep="\n")

    def get_source_files(self):
        """None: the sources are package data."""
        return []

    def get_outputs(self):
        """The library, as a file of the package."""
        return [str(Path(self.build_lib) / PACKAGE / builder.LIBRARY)] if self.library.exists() else []

    def get_output_mapping(self):
        """For editable installs: where the file of the package really lies."""
        return {name: str(SOURCES / builder.LIBRARY) for name in self.get_outputs()} if self.editable_mode else {}


class build_all(build):
    """What setuptools builds, and the kernels."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None)]


class tagged_wheel(bdist_wheel):
    """A wheel with the library is for one platform, but for every Python: the library knows nothing of Python."""

    def run(self):
        """Build first, because whether there is a library decides what kind of wheel it is."""
        if not self.skip_build:
            self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_kernels").library.exists()
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self):
        """Python 3, no ABI, and this platform or any."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else (self.python_tag, "none", platform)


setup(cmdclass={"build": build_all, "build_kernels": build_kernels, "bdist_wheel": tagged_wheel})
