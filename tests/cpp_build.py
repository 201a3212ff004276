"""The C++ runtime, built for the tests: by CMake, with every backend, TensorRT's over a simulated GPU."""

import fcntl
import importlib.util
import os
import subprocess
from pathlib import Path

import onnxruntime

ROOT = Path(__file__).parent.parent
OPENVINO = Path(importlib.util.find_spec("openvino").submodule_search_locations[0])
SIMULATED = ROOT / "cpp" / "tests" / "simulated"


class Built:
    """The C++ runtime as built for the tests, with the runtimes of this Python environment.

    DIFFX_TEST_PRESET: the preset of cpp/CMakePresets.json to build; with sanitizers the programs run under them.
    """

    def __init__(self):
        self.preset = os.environ.get("DIFFX_TEST_PRESET", "default")
        self.folder = ROOT / "build" / ("cpp" if self.preset == "default" else f"cpp-{self.preset}")
        self.environment = os.environ | {
            "DIFFX_ONNXRUNTIME_LIBRARY": str(
                next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
            ),
            "DIFFX_OPENVINO_LIBRARY": str(next((OPENVINO / "libs").glob("libopenvino_c.so.*"))),
        }

    def build(self):
        """Configure and build what changed; several test processes take turns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run([ROOT / "scripts" / "setup-cpp"], check=True)
            configure = ["cmake", "--preset", self.preset, "-B", self.folder]
            options = ["DIFFX_TESTS=ON", "DIFFX_WERROR=ON", "DIFFX_OPENVINO=ON", f"OpenVINO_ROOT={OPENVINO}"]
            options += ["DIFFX_TENSORRT=ON", f"TensorRT_ROOT={SIMULATED}", f"CUDAToolkit_ROOT={SIMULATED}"]
            for command in ([*configure, *(f"-D{option}" for option in options)], ["ninja", "-C", self.folder]):
                done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "cpp")
                assert done.returncode == 0, done.stdout + done.stderr

    def run(self, name, *words, check=True, environment=None):
        """Run a program of the build; its exit status has to be 0 where ``check``."""
        command = [self.folder / name, *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.environment | (environment or {})
        )
        assert not check or done.returncode == 0, done.stderr
        return done
