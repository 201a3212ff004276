"""A C++ project around a bundle, ready to be built: the bundle, the runtime's sources, a main, a CMake file, a README."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from diffexport.bundle import Bundle
from diffexport.errors import BackendError, ExportError
from diffexport.files import replacing_folder, writing

_SOURCES = ("CMakeLists.txt", "cmake", "include", "src")
"""What of ``cpp/`` a project needs."""


@dataclass(frozen=True)
class Component:
    """A backend of the C++ runtime.

    Attributes:
        option: the CMake option that builds it in.
        name: its name in ``diffx::Backend``.
        headers: how CMake is told where the runtime's headers are.
        folder: what that folder is.
        library: what to install where the program runs.
        variable: the environment variable that names the library's file where it is in no usual place.
    """

    option: str
    name: str
    headers: str
    folder: str
    library: str
    variable: str


COMPONENTS = {
    "ort": Component(
        "DIFFX_ONNXRUNTIME",
        "OnnxRuntime",
        "-Donnxruntime_ROOT=FOLDER",
        "FOLDER is an unpacked release of ONNX Runtime, whose `include` holds `onnxruntime_c_api.h`",
        "ONNX Runtime 1.21 or later, `libonnxruntime.so.1`, of a release or a Python wheel",
        "DIFFX_ONNXRUNTIME_LIBRARY",
    ),
    "openvino": Component(
        "DIFFX_OPENVINO",
        "OpenVino",
        "-DOpenVINO_ROOT=FOLDER",
        "FOLDER is an unpacked release of OpenVINO, or its Python package, whose `include` holds `openvino/c/openvino.h`",
        "OpenVINO, `libopenvino_c.so`",
        "DIFFX_OPENVINO_LIBRARY",
    ),
    "trt": Component(
        "DIFFX_TENSORRT",
        "TensorRt",
        "-DTensorRT_ROOT=FOLDER -DCUDAToolkit_ROOT=FOLDER",
        "Both are folders with an `include`: that of TensorRT 10 or 11, `NvInferRuntime.h`, and of CUDA",
        "TensorRT of the headers' major version, `libnvinfer.so`, and engines made there by `diffx build --backend trt`",
        "DIFFX_TENSORRT_LIBRARY",
    ),
    "trt-rtx": Component(
        "DIFFX_TENSORRT",
        "TensorRtRtx",
        "-DTensorRT_ROOT=FOLDER -DCUDAToolkit_ROOT=FOLDER",
        "Both are folders with an `include`: that of TensorRT 11, `NvInferRuntime.h`, and of CUDA",
        "TensorRT for RTX 1.5 or later, `libtensorrt_rtx.so.1`, and engines made by `diffx build --backend trt-rtx`",
        "DIFFX_TENSORRT_RTX_LIBRARY",
    ),
}

_CMAKE = """\
cmake_minimum_required(VERSION 3.22)
project(sample LANGUAGES C CXX)

find_package(diffx QUIET)
if(NOT diffx_FOUND)
  {only}set({option} ON CACHE BOOL "")
  set(BUILD_SHARED_LIBS OFF CACHE BOOL "")
  add_subdirectory(diffx)
endif()

add_executable(sample main.cpp)
target_link_libraries(sample PRIVATE diffx::runtime)
"""

_MAIN = """\
#include <cstdio>
#include <fstream>

#include "diffx.hpp"

int main() try {{
    diffx::Bundle bundle("{bundle}");
    auto sampler = bundle.sampler(diffx::Backend::{backend});
    auto images = sampler.sample({{{request}, .steps = {steps}, .seed = 0}});
    std::ofstream("images.f32", std::ios::binary).write((const char*)images.data.data(), images.data.size() * 4);
}} catch (const diffx::Error& error) {{
    std::fprintf(stderr, "%s\\n", error.what());
    return 1;
}}
"""

_README = """\
# {name} in C++

`main.cpp` draws {count} samples of `{bundle}` and writes them to `images.f32`: float32, shape ({shape}), in [-1, 1].
`diffx/include/diffx.hpp` is the whole interface, `diffx.h` the same for C.

## x86-64

Needed to build: a C++20 compiler, CMake 3.22, nlohmann-json (Debian: `nlohmann-json3-dev`), and the headers of the runtime.
{folder}.

    cmake -S . -B build {headers}
    cmake --build build
    ./build/sample

Needed to run: {library}.
Where it lies in no usual place, `{variable}=/path/to/it ./build/sample`. The program finds `{bundle}`
in the folder where it is started; these three are all that another machine needs.

## aarch64

On the machine itself, as above. From another one, with Debian's `g++-aarch64-linux-gnu` (the runtime's library is opened
when the program runs, so that only its headers are needed):

    cmake -S . -B build-aarch64 --toolchain diffx/cmake/aarch64-linux-gnu.cmake {headers}
    cmake --build build-aarch64

## Jetson

JetPack brings CUDA and TensorRT 10 with headers. On the Jetson itself, take `diffx::Backend::TensorRt` in `main.cpp`, make
the engines (`diffx` is the Python package) and build with TensorRT alone:

    diffx build {bundle} --backend trt
    cmake -S . -B build {without}-DDIFFX_TENSORRT=ON -DTensorRT_ROOT=/usr -DCUDAToolkit_ROOT=/usr/local/cuda
    cmake --build build

Before its first sample the program runs recorded cases of the bundle, and refuses an engine that differs from PyTorch.
"""


def embed(bundle: Bundle, out: str | Path, backend: str = "ort") -> Path:
    """Write a C++ project that samples from a bundle.

    Args:
        out: a folder that is not there yet.
        backend: what the project runs on, of ``COMPONENTS``.

    Returns:
        The folder.

    Raises:
        BackendError: the C++ runtime has no such backend.
        ExportError: the folder exists, or cannot be written.
    """
    out = Path(out)
    if backend not in COMPONENTS:
        raise BackendError(f"backend {backend!r}: the C++ runtime has {', '.join(COMPONENTS)}")
    if out.exists():
        raise ExportError(f"{out}: exists; choose another --out or remove it")
    component, spec, decoder = COMPONENTS[backend], bundle.spec, bundle.manifest.decoder
    labels = [k % spec.num_classes for k in (3, 1, 4)] if spec.conditional else []
    shape = spec.shape
    if decoder is not None:
        shape = (decoder.channels, *(side * decoder.upscale for side in spec.shape[1:]))
    facts = {
        "name": bundle.manifest.name,
        "bundle": f"{bundle.manifest.name}.diffx",
        "backend": component.name,
        "request": f".labels = {{{', '.join(map(str, labels))}}}" if labels else ".num = 3",
        "steps": bundle.manifest.defaults.steps,
        "count": 3,
        "shape": ", ".join(map(str, (3, *shape))),
        "option": component.option,
        "only": "" if component.option == "DIFFX_ONNXRUNTIME" else 'set(DIFFX_ONNXRUNTIME OFF CACHE BOOL "")\n  ',
        "without": "" if component.option == "DIFFX_TENSORRT" else f"-D{component.option}=OFF ",
        "headers": component.headers,
        "folder": component.folder,
        "library": component.library,
        "variable": component.variable,
    }
    with writing(out, ExportError, "; nothing was left behind"), replacing_folder(out) as work:
        shutil.copytree(bundle.path, work / str(facts["bundle"]))
        (work / "diffx").mkdir()
        for name in _SOURCES:
            source = _sources() / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, work / "diffx" / name)
        for name, text in {"CMakeLists.txt": _CMAKE, "main.cpp": _MAIN, "README.md": _README}.items():
            (work / name).write_text(text.format(**facts), encoding="utf-8")
    return out


def _sources() -> Path:
    """The runtime's sources: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "cpp"
    return inside if inside.is_dir() else package.parent / "cpp"
