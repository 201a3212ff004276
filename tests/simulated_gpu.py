"""A GPU that is simulated, to run the code around CUDA and TensorRT on any machine.

The calls keep the order and the promises of the real ones, the unkind ones too: work on a stream happens when it is waited
for, a copy from pinned memory reads it then, a capture refuses what it must not hold, an engine refuses a shape that its
profile lacks, and memory that is not freed is counted. What an engine computes is computed by ONNX Runtime.
"""

import ctypes
import enum
import hashlib
import importlib.machinery
import sys
import types

import numpy as np

from diffexport.backends.onnxruntime import load_graph
from diffexport.bundle import CPU_GRAPHS, entry_of, write_json
from diffexport.engines import header
from diffexport.engines.products import PRODUCTS
from diffexport.engines.profiles import Profile, input_ranges
from diffexport.engines.record import (
    SCHEMA,
    EngineKey,
    EngineRecord,
    Network,
    TensorInfo,
    engines_of,
    graph_sha256,
    weights_sha256,
)


class Status(enum.Enum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorStreamCaptureUnsupported = 900


class Kind(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


OK, INVALID, UNSUPPORTED = Status


class Cuda:
    """The functions of the CUDA runtime that ``diffexport.backends.cuda`` calls."""

    cudaError_t = Status
    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, capability=(8, 6)):
        self.capability = capability
        self.memory = {"device": {}, "pinned": {}}
        self.queue = []
        self.recording = None
        self.graphs, self.events, self.streams = {}, {}, set()
        self.launched = 0
        self.allocations = 0

    def cudaGetErrorString(self, status):
        return OK, status.name.encode()

    def cudaDriverGetVersion(self):
        return OK, 13000

    def cudaGetDeviceCount(self):
        return OK, 1

    def cudaGetDeviceProperties(self, index):
        major, minor = self.capability
        return OK, types.SimpleNamespace(name=b"Simulated\0\0", major=major, minor=minor)

    def _allocate(self, kind, size):
        if self.recording is not None:
            return UNSUPPORTED, None
        self.allocations += 1
        block = np.frombuffer(np.random.default_rng(0).bytes(max(size, 1)), np.uint8).copy()  # what lies there is noise
        self.memory[kind][block.ctypes.data] = block
        return OK, block.ctypes.data

    def _free(self, kind, address):
        return (OK if self.memory[kind].pop(int(address), None) is not None else INVALID,)

    def cudaMalloc(self, size):
        return self._allocate("device", size)

    def cudaFree(self, address):
        return self._free("device", address)

    def cudaMallocHost(self, size):
        return self._allocate("pinned", size)

    def cudaFreeHost(self, address):
        return self._free("pinned", address)

    def inside(self, kind, address, size):
        return any(start <= address and address + size <= start + len(b) for start, b in self.memory[kind].items())

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        on_device = {Kind.cudaMemcpyHostToDevice: [target], Kind.cudaMemcpyDeviceToHost: [source]}
        if not all(self.inside("device", a, size) for a in on_device.get(kind, [target, source])):
            return (INVALID,)
        if kind is Kind.cudaMemcpyDeviceToHost:
            self.flush()
            ctypes.memmove(target, source, size)
        elif kind is Kind.cudaMemcpyHostToDevice and not self.inside("pinned", source, size):
            staged = ctypes.string_at(source, size)
            self.enqueue(lambda: ctypes.memmove(target, staged, size))
        else:
            self.enqueue(lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def cudaMemsetAsync(self, target, value, size, stream):
        if not self.inside("device", target, size):
            return (INVALID,)
        self.enqueue(lambda: ctypes.memset(target, value, size))
        return (OK,)

    def cudaStreamCreate(self):
        self.streams.add(len(self.streams) + 1)
        return OK, len(self.streams)

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        if self.recording is not None:
            return (UNSUPPORTED,)
        self.flush()
        return (OK,)

    def cudaEventCreate(self):
        self.events[len(self.events) + 1] = 0
        return OK, len(self.events)

    def cudaEventDestroy(self, event):
        return (OK,)

    def cudaEventRecord(self, event, stream):
        self.enqueue(lambda: None)
        self.events[event] = len(self.queue)
        return (OK,)

    def cudaEventSynchronize(self, event):
        self.flush(self.events[event])
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        return OK, tuple(graph)

    def cudaGraphInstantiate(self, graph, flags):
        self.graphs[len(self.graphs) + 1] = graph
        return OK, len(self.graphs)

    def cudaGraphDestroy(self, graph):
        return (OK,)

    def cudaGraphExecDestroy(self, executable):
        self.graphs[executable] = None
        return (OK,)

    def cudaGraphLaunch(self, executable, stream):
        if self.graphs.get(executable) is None:
            return (INVALID,)
        self.launched += 1
        for work in self.graphs[executable]:
            self.enqueue(work)
        return (OK,)

    def enqueue(self, work):
        (self.queue if self.recording is None else self.recording).append(work)

    def flush(self, count=None):
        """Do the work that is queued, or the first so many pieces of it."""
        count = len(self.queue) if count is None else min(count, len(self.queue))
        done, self.queue = self.queue[:count], self.queue[count:]
        for event, place in self.events.items():
            self.events[event] = max(0, place - count)
        for work in done:
            work()

    @property
    def left(self):
        """What was not freed."""
        graphs = [graph for graph in self.graphs.values() if graph is not None]
        return len(self.memory["device"]), len(self.memory["pinned"]), len(graphs), len(self.streams)


class TensorRt:
    """The parts of a TensorRT module that run engines: those of the bundles that were shown to it."""

    class ILogger:
        Severity = types.SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

        def __init__(self):
            pass

    def __init__(self, cuda, version, *, rtx):
        self.cuda, self.__version__ = cuda, version
        self.engines = {}
        if rtx:
            self.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["WHOLE_GRAPH_CAPTURE", "DISABLED"])

    def show(self, bundle):
        """Let its engines be loaded."""
        for engine in engines_of(bundle)[0]:
            digest = hashlib.sha256(engine.file.read_bytes()).hexdigest()
            self.engines[digest] = engine.record, bundle.graph(engine.record.key.graph)

    def Runtime(self, log):
        def load(data):
            found = self.engines.get(hashlib.sha256(data).hexdigest())
            return None if found is None else Engine(self, *found)

        return types.SimpleNamespace(deserialize_cuda_engine=load)


class Engine:
    def __init__(self, trt, record, graph):
        self.trt, self.record, self.session = trt, record, load_graph(graph)

    def create_runtime_config(self):
        return types.SimpleNamespace(cuda_graph_strategy=None)

    def create_execution_context(self, config=None):
        assert (config is not None) == hasattr(self.trt, "CudaGraphStrategy")
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.cuda = engine, engine.trt.cuda
        self.profile, self.shapes, self.places, self.warm = 0, {}, {}, False

    def set_optimization_profile_async(self, index, stream):
        self.shapes, self.places, self.warm = {}, {}, False
        self.profile = index
        return index < len(self.engine.record.key.profiles)

    def set_input_shape(self, name, shape):
        record = self.engine.record
        known = {tensor.name: tensor.shape for tensor in record.network.inputs}
        least, _, most = input_ranges(name, known[name], record.key.profiles[self.profile], record.key.sides)
        self.shapes[name] = shape
        return all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name, address):
        self.places[name] = address
        return True

    def get_tensor_shape(self, name):
        (node,) = [node for node in self.engine.session.get_outputs() if node.name == name]
        free = {
            dim: side
            for tensor in self.engine.record.network.inputs
            for dim, side in zip(tensor.shape, self.shapes[tensor.name], strict=True)
            if isinstance(dim, str)
        }
        return tuple(eval(dim, {}, free) if isinstance(dim, str) else dim for dim in node.shape)

    def execute_async_v3(self, stream):
        assert isinstance(stream, int)
        if self.cuda.recording is not None and not self.warm:
            return False  # the first run allocates
        self.warm = True
        shapes, places, session = dict(self.shapes), dict(self.places), self.engine.session
        outputs = {node.name: self.get_tensor_shape(node.name) for node in session.get_outputs()}

        def work():
            feeds = {}
            for node in session.get_inputs():
                dtype = np.int64 if "int64" in node.type else np.float32
                size = int(np.prod(shapes[node.name])) * np.dtype(dtype).itemsize
                assert self.cuda.inside("device", places[node.name], size)
                feeds[node.name] = np.frombuffer(ctypes.string_at(places[node.name], size), dtype).reshape(
                    shapes[node.name]
                )
            for name, result in zip(outputs, session.run(list(outputs), feeds), strict=True):
                assert self.cuda.inside("device", places[name], result.nbytes)
                ctypes.memmove(places[name], np.ascontiguousarray(result).ctypes.data, result.nbytes)

        self.cuda.enqueue(work)
        return True


def install(monkeypatch, backend, bundle, batches=((1, 1), (3, 3), (2, 8)), capability=(8, 6), version="1.7.1.116"):
    """Put a simulated GPU and the product of a backend in place, and engines of every graph into the bundle's folder."""
    rtx = backend == "trt-rtx"
    cuda = Cuda(capability)
    trt = TensorRt(cuda, version, rtx=rtx)
    trt.__spec__ = importlib.machinery.ModuleSpec(PRODUCTS[backend].module, None)
    monkeypatch.setitem(sys.modules, PRODUCTS[backend].module, trt)
    monkeypatch.setattr("diffexport.backends.cuda.runtime", lambda: cuda)
    for graph in set(bundle.manifest.graphs) - set(CPU_GRAPHS):
        put_engine(bundle, backend, graph, tuple(Profile(low, high, high) for low, high in batches))
    trt.show(bundle)
    return cuda, trt


def put_engine(bundle, backend, graph, profiles, targets=("sm86",), version="1.7.1.116"):
    """An engine of a graph as ``diffx build`` writes it, whose bytes only the simulated product can load."""
    session = load_graph(bundle.graph(graph))
    dims = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}

    def infos(nodes):
        return tuple(TensorInfo(node.name, dims[node.type], tuple(node.shape)) for node in nodes)

    sides = dict(zip(("height", "width"), bundle.spec.shape[1:], strict=False)) if graph == "decoder" else {}
    key = EngineKey(
        graph=graph,
        graph_sha256=graph_sha256(bundle, graph),
        weights_sha256=weights_sha256(bundle),
        precision="fp32",
        product=PRODUCTS[backend].module,
        version=version,
        targets=targets,
        profiles=(Profile(1, 1, 1),) if graph == "decoder" else profiles,
        sides=sides,
        tf32=False,
        workspace=None,
        level=None,
    )
    body = key.folder.encode()
    mask = sum(1 << PRODUCTS["trt-rtx"].targets.index(target) for target in targets if backend == "trt-rtx")
    size = header.LAYOUT.size + len(body)
    data = header.LAYOUT.pack(b"vtrt", size, *map(int, version.split(".")), mask) + body
    folder = bundle.path / "engines" / key.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.engine").write_bytes(data)
    record = EngineRecord(
        schema=SCHEMA,
        key=key,
        network=Network(
            inputs=infos(session.get_inputs()), outputs=infos(session.get_outputs()), layers={}, multiply_adds={}
        ),
        engine=entry_of(folder / "model.engine"),
        build_seconds=1.0,
        peak_memory=1,
    )
    write_json(folder / "engine.json", record)
    return folder
