"""Print what a TensorRT binding has of the names that this code uses; see scripts/tensorrt-api."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engines"))

from tensorrt_names import signatures

module = importlib.import_module(sys.argv[1])
print(json.dumps({"version": module.__version__, "signatures": signatures(module)}))
