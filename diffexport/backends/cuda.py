"""The little of CUDA that running engines needs, through cuda-python: buffers, one stream, a captured graph.

Every call goes through ``call``, which turns a status into an error, so that nothing here can fail in silence.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from diffexport.errors import BackendError


@dataclass(frozen=True)
class Device:
    """The GPU in use.

    Attributes:
        name: as the driver calls it.
        capability: compute capability, sm89.
    """

    name: str
    capability: str


def runtime() -> Any:
    """The CUDA runtime's module.

    Raises:
        BackendError: cuda-python is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(
            "cuda-python is not installed; pip install 'diffexport[rtx]' or 'diffexport[trt]'"
        ) from error


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; its result, if it has one.

    Raises:
        BackendError: its status is an error.
    """
    cuda = runtime()
    status, *results = getattr(cuda, name)(*arguments)
    if status != cuda.cudaError_t.cudaSuccess:
        said = cuda.cudaGetErrorString(status)[1]
        raise BackendError(f"CUDA: {name}: {said.decode() if isinstance(said, bytes) else said}")
    return results[0] if results else None


def driver_installed() -> bool:
    """Whether the library of an NVIDIA driver is on this machine."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def device() -> Device:
    """The GPU that this process would use.

    Raises:
        BackendError: there is no driver, or no GPU.
    """
    if call("cudaDriverGetVersion") == 0:
        raise BackendError(
            "this machine has no NVIDIA driver, so that no engine can run here; building for other machines works: "
            "diffx build BUNDLE --backend trt-rtx --target sm89"
        )
    if call("cudaGetDeviceCount") == 0:
        raise BackendError("the NVIDIA driver of this machine sees no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi")
    properties = call("cudaGetDeviceProperties", 0)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(name.rstrip("\0"), f"sm{properties.major}{properties.minor}")


class DeviceArray:
    """Memory of an array on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        self.address = int(call("cudaMalloc", self.nbytes))

    def close(self) -> None:
        """Free it."""
        if self.address:
            call("cudaFree", self.address)
            self.address = 0


class Stream:
    """An order of work on the device. Everything here returns before the work is done, but ``download``."""

    def __init__(self) -> None:
        self.handle = call("cudaStreamCreate")

    def upload(self, target: DeviceArray, array: NDArray[Any]) -> None:
        """Copy from the host; the array may be changed afterwards."""
        given = np.ascontiguousarray(array, target.dtype)
        assert given.nbytes == target.nbytes, f"{given.shape} for a buffer of {target.shape}"
        self._copy(target.address, given.ctypes.data, target.nbytes, "cudaMemcpyHostToDevice")

    def send(self, target: DeviceArray, staging: Staging, array: NDArray[Any]) -> None:
        """Copy from the host by way of pinned memory, so that the host does not wait for what runs on the device."""
        staging.fill(array)
        self._copy(target.address, staging.address, target.nbytes, "cudaMemcpyHostToDevice")
        call("cudaEventRecord", staging.sent, self.handle)

    def download(self, source: DeviceArray) -> NDArray[Any]:
        """Wait for everything so far, and copy to the host."""
        out = np.empty(source.shape, source.dtype)
        self._copy(out.ctypes.data, source.address, source.nbytes, "cudaMemcpyDeviceToHost")
        self.synchronize()
        return out

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Copy on the device."""
        assert target.nbytes == source.nbytes
        self._copy(target.address, source.address, target.nbytes, "cudaMemcpyDeviceToDevice")

    def clear(self, target: DeviceArray) -> None:
        """Set every byte to zero."""
        call("cudaMemsetAsync", target.address, 0, target.nbytes, self.handle)

    def synchronize(self) -> None:
        """Wait for everything so far."""
        call("cudaStreamSynchronize", self.handle)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[list[Any]]:
        """Record the work of the block in place of doing it; the list holds the graph afterwards, for ``launch``."""
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.handle, mode)
        captured: list[Any] = []
        try:
            yield captured
        except BaseException:
            with contextlib.suppress(BackendError):  # the capture is void, which its end says once more
                call("cudaStreamEndCapture", self.handle)
            raise
        graph = call("cudaStreamEndCapture", self.handle)
        captured.append(call("cudaGraphInstantiate", graph, 0))
        call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Do what was recorded."""
        call("cudaGraphLaunch", graph, self.handle)

    def forget(self, graph: Any) -> None:
        """Free what was recorded."""
        call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Free it."""
        call("cudaStreamDestroy", self.handle)

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        call("cudaMemcpyAsync", target, source, nbytes, getattr(runtime().cudaMemcpyKind, kind), self.handle)


class Staging:
    """Pinned memory on the host, and the event that says when what it held was sent."""

    def __init__(self, target: DeviceArray) -> None:
        self.address = int(call("cudaMallocHost", target.nbytes))
        self.sent = call("cudaEventCreate")
        bytes_ = (ctypes.c_uint8 * target.nbytes).from_address(self.address)
        self._array = np.frombuffer(memoryview(bytes_), target.dtype).reshape(target.shape)
        self._array[:] = 0

    def fill(self, array: NDArray[Any]) -> None:
        """Wait until what it held was sent, and hold an array in its place, which may be a part of the first axis."""
        call("cudaEventSynchronize", self.sent)
        self._array[: len(array)] = array

    def close(self) -> None:
        """Free it."""
        call("cudaEventDestroy", self.sent)
        call("cudaFreeHost", self.address)
