"""What this code uses of TensorRT's Python API, read off its source, and the signatures that a binding has for it."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "diffexport" / path
    for path in ("engines/network.py", "engines/worker.py", "engines/messages.py", "backends/tensorrt.py")
]

CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "ranges": "IOptimizationProfile",
    "tensor": "ITensor",
    "output": "ITensor",
    "layer": "ILayer",
    "source": "ILayer",
    "convolution": "IConvolutionLayer",
    "runtime": "Runtime",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
}
"""What a variable or an attribute of each name is, in those sources."""

MODULE = ("trt", "_trt")


def used():
    """{"Builder.create_network": {1}}: each name that is used, with the numbers of arguments that it is called with."""
    found = defaultdict(set)
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert not any(isinstance(argument, ast.Starred) for argument in node.args) or not _name(node.func)
                called[node.func] = len(node.args)
            if isinstance(node, ast.ClassDef):
                for base in filter(None, map(_name, node.bases)):
                    for method in node.body:
                        if isinstance(method, ast.FunctionDef) and method.name != "why":  # our own
                            found[f"{base}.{method.name}"].add(len(method.args.args) - 1)
        for node in ast.walk(tree):
            name = _name(node)
            if name:
                found[name] |= {called[node]} if node in called else set()
    return {name: found[name] for name in sorted(found)}


def _name(node):
    """The dotted name within TensorRT of an attribute, or None for anything else."""
    if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
        return None
    owner = node.value
    last = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else None
    if last in MODULE:
        return node.attr
    if last in CLASSES and (isinstance(owner, ast.Name) or getattr(owner.value, "id", "") == "self"):
        return f"{CLASSES[last]}.{node.attr}"
    outer = _name(owner)
    return f"{outer}.{node.attr}" if outer and outer[0].isupper() and outer.split(".")[-1][0].isupper() else None


def signatures(module):
    """{name: signatures} of everything used that a binding has; a name without any is a property or a value."""
    return {name: _signatures(module, name) for name in used() if _find(module, name) is not None}


def _find(module, name):
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _signatures(module, name):
    found = _find(module, name)
    if isinstance(found, type):
        found, name = found.__init__, f"{name}.__init__"
    pattern = rf"^\s*(?:\d+\. )?{re.escape(name.split('.')[-1])}\((.*)\) -> .*$"
    lines = re.findall(pattern, getattr(found, "__doc__", None) or "", flags=re.M)
    return [re.sub(r"\b\w*tensorrt\w*\.", "", line) for line in lines if "*args" not in line]


def takes(signature, count):
    """Whether a signature can be called with so many arguments beside self."""
    parameters, depth = [""], 0
    for character in signature:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parameters.append("")
        else:
            parameters[-1] += character
    parameters = [p for p in parameters if p.strip() and not p.strip().startswith("self")]
    return sum("=" not in p for p in parameters) <= count <= len(parameters)
