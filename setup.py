"""Build of the two compiled modules. What is static about the package is in pyproject.toml.

``sdcore._cpu`` (csrc/cpu) is built wherever a C++17 compiler works, ``sdcore._cuda`` (csrc/cuda)
wherever nvcc is found. Neither needs torch, and sdcore works without either: what was not built,
and why, is written to ``sdcore/_build.json``, from which ``sdcore info`` tells it.

Environment: SDCORE_BUILD_CUDA=0|1|auto (with 1, a CUDA module that can't be built is an error),
SDCORE_CUDA_ARCHS="80;90" (default: this machine's GPUs, else those of ARCHITECTURES that nvcc
knows), MAX_JOBS, CXX, CUDA_HOME.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]


class Unavailable(Exception):
    """Why a module cannot be built on this machine."""


class Recipe(NamedTuple):
    """The commands that compile a file and link a module, less their inputs and outputs."""

    compile: list[str]
    link: list[str]
    facts: dict[str, Any]


class BuildModules(build_ext):
    """Builds the modules with ninja: in parallel, and only what changed."""

    def run(self) -> None:
        try:
            wish = cuda_wish(os.environ)
            jobs = job_count(os.environ)
            archs = asked_architectures(os.environ)
        except ValueError as error:
            sys.exit(f"error: {error}")
        os.environ["LC_ALL"] = "C"  # first_error() looks for errors in English.
        if self.inplace:
            # Editable installs name a throwaway folder, in which every build would start over.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = f"build/temp.{tag}"
        recipes = {"cpu": cpu_recipe, "cuda": lambda: cuda_recipe(wish, archs, jobs)}
        report: dict[str, dict[str, Any]] = {}
        self.report_path().unlink(missing_ok=True)
        for extension in self.extensions:
            kind = extension.name.rpartition("_")[2]
            try:
                report[kind] = {"built": True, **self.build_module(extension, recipes[kind], jobs)}
            except Unavailable as reason:
                if kind == "cuda" and wish == "1":
                    sys.exit(f"error: SDCORE_BUILD_CUDA=1, but {reason}")
                report[kind] = {"built": False, "reason": str(reason)}
                print(f"sdcore: {extension.name} is left out: {reason}", file=sys.stderr)
        self.report_path().write_text(json.dumps(report, indent=2) + "\n")

    def build_module(self, extension: Extension, recipe: Any, jobs: int) -> dict[str, Any]:
        target = self.module_path(extension)
        # First of all, so that a module of an earlier build never outlives a failure; and never
        # written over, because a process may be running from it.
        target.unlink(missing_ok=True)
        if os.name == "nt":
            raise Unavailable("MSVC is not supported yet")
        commands = recipe()
        temp = Path(self.build_temp, extension.name)
        defines = [f'-DSDCORE_VERSION="{self.distribution.get_version()}"']
        commands.compile.extend(defines + header_flags(temp))
        shutil.copy2(run_ninja(commands, extension.sources, temp, jobs), target)
        return commands.facts

    def module_path(self, extension: Extension) -> Path:
        """In the source tree for editable installs, in build_lib otherwise."""
        path = Path(self.get_ext_fullpath(extension.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def report_path(self) -> Path:
        return self.module_path(self.extensions[0]).with_name("_build.json")

    def get_outputs(self) -> list[str]:
        paths = [self.report_path(), *map(self.module_path, self.extensions)]
        return [str(path) for path in paths if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """For editable installs: from where a wheel would hold a file to where it is."""
        outputs = self.get_outputs() if self.inplace else []
        return {str(Path(self.build_lib, "sdcore", Path(file).name)): file for file in outputs}


class CopyPython(build_py):
    """Starts from an empty folder: a file deleted since the last build would stay in it, and go
    into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "sdcore"), ignore_errors=True)
        super().run()


def cuda_wish(environ: Mapping[str, str]) -> str:
    wish = environ.get("SDCORE_BUILD_CUDA") or "auto"
    if wish not in ("0", "1", "auto"):
        raise ValueError(f"SDCORE_BUILD_CUDA must be 0, 1 or auto; got {wish!r}")
    return wish


def job_count(environ: Mapping[str, str]) -> int:
    jobs = environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not re.fullmatch(r"[1-9]\d*", jobs):
        raise ValueError(f"MAX_JOBS must be a positive whole number; got {jobs!r}")
    return int(jobs)


def asked_architectures(environ: Mapping[str, str]) -> list[int]:
    asked = environ.get("SDCORE_CUDA_ARCHS", "")
    names = [name for name in re.split(r"[;,\s]+", asked) if name]
    if not all(re.fullmatch(r"[1-9]\d{1,2}", name) for name in names):
        raise ValueError(f'SDCORE_CUDA_ARCHS must be numbers such as "80;90"; got {asked!r}')
    return sorted({int(name) for name in names})


def choose_architectures(asked: list[int], present: list[int], supported: list[int]) -> list[int]:
    """What to compile for: what was asked for, else the GPUs here, else all we support."""
    if unknown := [arch for arch in asked if arch not in supported]:
        names = ", ".join(map(str, unknown))
        raise Unavailable(f"this nvcc does not support {names} of SDCORE_CUDA_ARCHS")
    # A GPU that is newer than nvcc runs the PTX of the newest architecture that nvcc knows.
    here = sorted(set(present)) if set(present) <= set(supported) else []
    if chosen := asked or here or [arch for arch in ARCHITECTURES if arch in supported]:
        return chosen
    raise Unavailable(f"this nvcc supports none of the architectures {ARCHITECTURES}")


def cpu_recipe() -> Recipe:
    compiler = find_compiler()
    # LDSHARED is C's linker, then the flags that make a Python module on this system.
    linker = shlex.split(sysconfig.get_config_var("LDSHARED"))
    flags = itertools.dropwhile(lambda word: not word.startswith("-"), linker)
    link = [*compiler, *flags, "-pthread"]
    return Recipe([*compiler, *CXX_FLAGS], link, {"compiler": describe(compiler)})


def cuda_recipe(wish: str, asked: list[int], jobs: int) -> Recipe:
    """nvcc compiles and links, so that it alone must know where CUDA's files are."""
    if wish == "0":
        raise Unavailable("SDCORE_BUILD_CUDA=0 was set when sdcore was built")
    nvcc = find_nvcc(os.environ)
    compiler = find_compiler()
    release = re.findall(r"release ([\d.]+)", ask(nvcc, "--version")) or ["unknown"]
    supported = map(int, re.findall(r"compute_(\d+)\b", ask(nvcc, "--list-gpu-arch")))
    archs = choose_architectures(asked, present_gpus(), list(supported))
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    # -ccbin takes no launcher (ccache g++): nvcc's own choice of a host compiler serves then.
    host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
    # Cores that would idle because there are few files compile architectures in parallel.
    threads = min(len(archs), max(1, jobs // max(1, len(sources("cuda")))))
    flags = ["-O3", "-std=c++17", f"--threads={threads}"]
    flags += [f"-Xcompiler={flag}" for flag in CXX_FLAGS if flag not in flags]
    # nvcc splits values at commas unless they are escaped.
    flags += ["-DSDCORE_CUDA_ARCHS=" + "\\,".join(map(str, archs))]
    return Recipe(
        compile=[nvcc, *host, *flags, *targets],
        link=[nvcc, *host, "-shared", "-cudart=static", "-nodlink", "-Xcompiler=-fPIC,-pthread"],
        facts={"nvcc": release[0], "compiler": describe(compiler), "architectures": archs},
    )


def find_compiler() -> list[str]:
    """CXX, or else the first of the usual C++ compilers that can compile a Python module."""
    usual = [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    asked = os.environ.get("CXX")
    candidates = [asked] if asked else list(filter(None, dict.fromkeys(usual)))
    probe = "#include <Python.h>\n#include <thread>\nstd::thread worker;\n"
    flags = [*CXX_FLAGS, "-isystem", sysconfig.get_path("include"), "-fsyntax-only", "-x", "c++"]
    complaints = []
    for command in map(shlex.split, candidates):
        if shutil.which(command[0]):
            answer = capture([*command, *flags, "-"], probe)
            if answer.returncode == 0:
                return command
            error = first_error(answer.stdout)
            complaints.append(f"{shlex.join(command)} can't compile a Python module: {error}")
    looked = ", ".join(candidates)
    missing = f"a C++ compiler was not found (looked for {looked}) when sdcore was built"
    raise Unavailable(complaints[0] if complaints else missing)


def find_nvcc(environ: Mapping[str, str]) -> str:
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home]
    places += [shutil.which("nvcc", path=environ.get("PATH")), "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if place and os.access(place, os.X_OK):
            return place
    looked = "looked in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda"
    raise Unavailable(f"nvcc was not found ({looked}) when sdcore was built")


def present_gpus() -> list[int]:
    """Compute capabilities of this machine's GPUs, 90 for 9.0; none if the driver doesn't tell."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", answer.stdout)]


def describe(compiler: list[str]) -> str:
    return ask(*compiler, "--version").splitlines()[0]


def ask(*command: str) -> str:
    answer = capture(list(command))
    if answer.returncode:
        raise Unavailable(f"{shlex.join(command)} failed: {first_error(answer.stdout)}")
    return answer.stdout


def capture(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs it with this input. Both of its streams come back as one, whatever their encoding."""
    both: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        return subprocess.run(command, input=text, encoding="utf-8", errors="replace", **both)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, f"error: {error}")


def first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = filter(re.compile(r"\b(error|fatal)\s*:|cannot find|undefined").search, lines)
    return next(errors, lines[0] if lines else "it printed nothing")


def header_flags(temp: Path) -> list[str]:
    """Under build isolation pybind11 lies in a new folder each time. A link to it keeps the
    commands the same; ninja would build everything again if they changed."""
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 was not found when sdcore was built") from None
    temp.mkdir(parents=True, exist_ok=True)
    link = temp / f"pybind11-{pybind11.__version__}"
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include())
    return ["-isystem", str(link), "-isystem", sysconfig.get_path("include")]


def run_ninja(recipe: Recipe, sources: list[str], temp: Path, jobs: int) -> Path:
    module, script = temp / "module.so", temp / "build.ninja"
    script.write_text(ninja_script(recipe, sources, temp, module))
    command = [find_ninja(), "-f", str(script), "-j", str(jobs)]
    if subprocess.run(command).returncode:
        # Once more, for what it prints: the first run shows it while it is compiling.
        error = first_error(capture(command).stdout)
        raise Unavailable(f"it did not compile when sdcore was built: {error}")
    return module


def ninja_script(recipe: Recipe, sources: list[str], temp: Path, module: Path) -> str:
    """Ninja builds again when a command changes. The compilers' versions are in a comment at its
    end, because a new compiler may lie where the old one was."""
    words = shlex.join(recipe.compile), shlex.join(recipe.link), json.dumps(recipe.facts)
    compile, link, facts = (word.replace("$", "$$") for word in words)
    objects = {source: temp / f"{Path(source).name}.o" for source in sources}
    return f"""\
builddir = {temp}
rule compile
  command = {compile} -MMD -MF $out.d -c $in -o $out # {facts}
  description = compile $in
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out # {facts}
  description = link $out
build {module}: link {" ".join(map(str, objects.values()))}
""" + "".join(f"build {path}: compile {source}\n" for source, path in objects.items())


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    except ImportError:
        if found := shutil.which("ninja"):
            return found
    raise Unavailable("ninja was not found when sdcore was built")


def sources(kind: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", kind).glob("*.c*") if path.suffix != ".cuh")


if __name__ == "__main__":
    setup(
        # Installed inside sdcore, because another package owns the name triton_kernels.
        package_dir={"sdcore.triton_kernels": "triton_kernels"},
        packages=[*find_packages(include=["sdcore", "sdcore.*"]), "sdcore.triton_kernels"],
        ext_modules=[Extension(f"sdcore._{kind}", sources(kind)) for kind in ("cpu", "cuda")],
        cmdclass={"build_ext": BuildModules, "build_py": CopyPython},
    )
