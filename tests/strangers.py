"""Every reader of files that may come from a stranger, and files to start from: for the tests and for scripts/fuzz.

A reader is given the bytes of one file. It takes them, or it raises a DiffexportError whose text is one line that a
terminal shows as it is; anything else is a defect: another exception, a hang, memory beyond a limit.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import diffexport
from diffexport import sample_folder, verification
from diffexport.bundle import CERTIFICATE, GOLDEN, MANIFEST, PLANS, WEIGHTS, Bundle
from diffexport.engines import record
from diffexport.engines.header import read_header
from diffexport.errors import DiffexportError
from diffexport.golden import check_cases
from diffexport.onnx_file import check_graph
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport_reference.checkpoints import load_checkpoint, save_checkpoint
from diffexport_reference.facts import facts_beside
from diffexport_reference.model import TimeInputMLP
from diffexport_reference.vae import VaeDecoder, load_decoder

FACTS = {"prediction": "eps", "scaled": False, "schedule": "ddpm"}
SPEC = diffexport.ModelSpec(
    family="MLP", shape=(2,), prediction="eps", scaled=False, schedule=DEFAULT_SCHEDULES["ddpm"]
)


@dataclass(frozen=True)
class Reader:
    """How bytes of a kind are read, and such bytes as they should be."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def outcome(reader: Reader, data: bytes) -> str | None:
    """What a reader says of some bytes: None where it takes them, else the line that it refuses them with."""
    try:
        reader.read(data)
    except DiffexportError as error:
        text = str(error)
        assert text.isprintable()
        assert text
        return text
    return None


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader, with files in a folder that this fills."""
    folder.mkdir(parents=True, exist_ok=True)
    return {**_of_bundles(folder), **_of_checkpoints(folder)}


def _of_bundles(folder: Path) -> dict[str, Reader]:
    torch.manual_seed(0)
    whole = folder / "whole.diffx"
    if not whole.exists():
        diffexport.export(TimeInputMLP(2, hidden_dims=(32, 32)).eval(), SPEC, whole, max_batch=1)
    seed = {path.name: path.read_bytes() for path in whole.iterdir()}
    manifest = Bundle.open(whole).manifest

    def in_bundle(name, check):
        """A reader of one file of a bundle whose other files are as they were."""
        path = folder / f"{name}.of.diffx"
        shutil.copytree(whole, path, dirs_exist_ok=True)

        def read(data):
            (path / name).write_bytes(data)
            check(path)

        return Reader(read, (seed[name],))

    def open_whole(path):
        bundle = Bundle.open(path)
        bundle.plan()
        verification._plans(bundle)

    def wanted(labels):
        return sample_folder.Settings(bundle="b", seed=1, labels=labels, plan="p", rows="r")

    def read_settings(data):
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / sample_folder.SETTINGS).write_bytes(data)
        sample_folder._claim(folder / "samples", wanted([0, 1]))

    def read_record(data):
        (folder / "engine").mkdir(exist_ok=True)
        (folder / "engine" / record.RECORD).write_bytes(data)
        found = record.read_engine(folder / "engine")
        record.stale(Bundle(whole, manifest), found)
        found.check_file()

    def read_engine_header(data):
        (folder / "any.engine").write_bytes(data)
        read_header(folder / "any.engine")

    settings = tuple(json.dumps(vars_of(wanted(labels))).encode() for labels in ([0, 1], None))
    return {
        "manifest": in_bundle(MANIFEST, open_whole),
        "certificate": in_bundle(CERTIFICATE, lambda path: verification._certificate(Bundle(path, manifest))),
        "plans": in_bundle(PLANS, lambda path: verification._plans(Bundle(path, manifest))),
        "golden cases": in_bundle(GOLDEN, lambda path: check_cases(SPEC, Bundle(path, manifest).golden())),
        "graph": in_bundle("step.onnx", lambda path: check_graph(path / "step.onnx", path / WEIGHTS)),
        "graph with a loop": in_bundle("sampler.onnx", lambda path: check_graph(path / "sampler.onnx", path / WEIGHTS)),
        "settings of samples": Reader(read_settings, settings),
        "engine record": Reader(read_record, (_RECORD,)),
        "engine header": Reader(read_engine_header, (b"vtrt" + bytes(60),)),
    }


def vars_of(struct):
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


_RECORD = json.dumps(
    {
        "schema": 1,
        "key": {
            "graph": "step",
            "graph_sha256": "0" * 64,
            "weights_sha256": "0" * 64,
            "precision": "fp32",
            "product": "tensorrt_rtx",
            "version": "1.7.1.116",
            "targets": ["sm86"],
            "profiles": [],
            "sides": {},
            "tf32": False,
            "workspace": None,
            "level": None,
        },
        "network": {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}],
            "outputs": [],
            "layers": {"matmul": {"float32": 3}},
            "multiply_adds": {"float32": 64},
        },
        "engine": {"size": 3, "sha256": "0" * 64},
        "build_seconds": 1.5,
        "peak_memory": 1000,
    }
).encode()


def _of_checkpoints(folder: Path) -> dict[str, Reader]:
    torch.manual_seed(0)
    state = TimeInputMLP(2, hidden_dims=(8, 8)).state_dict()
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(state, zipped)
    torch.save({"model": state, "epoch": 3}, legacy, _use_new_zipfile_serialization=False)
    own = folder / "seed.pt"
    save_checkpoint(own, model_class="TimeInputMLP", args={}, spec=SPEC, state_dict=state, training={})
    vae = VaeDecoder(2, 3, (8, 8), 1, 4, True, True)
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    config = {"_class_name": "AutoencoderKL", "latent_channels": 2, "norm_num_groups": 4, "scaling_factor": 0.5}

    def of_file(name, **facts):
        def read(data):
            (folder / name).write_bytes(data)
            load_checkpoint(folder / name, **facts)

        return read

    def facts(data):
        (folder / "beside.json").write_bytes(data)
        facts_beside(folder / "beside.pt")

    def decoder(name):
        path = folder / f"vae {name}"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(weights, path / "diffusion_pytorch_model.safetensors")

        def read(data):
            (path / name).write_bytes(data)
            load_decoder(path)

        return Reader(read, ((path / name).read_bytes(),))

    def pickled(data):
        (folder / "pickled.pt").write_bytes(_with_pickle(zipped.getvalue(), data))
        load_checkpoint(folder / "pickled.pt", **FACTS)

    given = {"heads": 2, "prediction": "v", "scaled": True, "schedule": {"kind": "loglinear", "start": 0.1, "end": 9.0}}
    return {
        "checkpoint": Reader(of_file("zip.pt", **FACTS), (zipped.getvalue(),)),
        "pickle of a checkpoint": Reader(pickled, (_pickle_of(zipped.getvalue()), _pickle_of(own.read_bytes()))),
        "old checkpoint": Reader(of_file("old.bin", **FACTS), (legacy.getvalue(),)),
        "own checkpoint": Reader(of_file("own.pt"), (own.read_bytes(),)),
        "safetensors": Reader(of_file("a.safetensors", **FACTS), (safetensors.torch.save(state),)),
        "facts": Reader(facts, (json.dumps(given).encode(), b'{"schedule": "ddpm", "label_names": ["a", "b"]}')),
        "config of a decoder": decoder("config.json"),
        "weights of a decoder": decoder("diffusion_pytorch_model.safetensors"),
    }


def _pickle_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as held:
        return held.read(next(name for name in held.namelist() if name.endswith("/data.pkl")))


def _with_pickle(archive: bytes, data: bytes) -> bytes:
    """A checkpoint with another pickle inside, and sums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as held, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as made:
        for name in held.namelist():
            made.writestr(name, data if name.endswith("/data.pkl") else held.read(name))
    return out.getvalue()


def altered(seed: bytes, edits: list[tuple[int, int, int]], number: int) -> bytes:
    """A file with some edits (kind, place, value): a byte set, cut out, put in; a part repeated; numbers made huge."""
    data = bytearray(seed)
    for kind, place, value in edits:
        at = place % (len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] = value % 256
        elif kind == 1:
            del data[at : at + 1 + value % 64]
        elif kind == 2:
            data[at:at] = bytes([value % 256]) * (1 + value % 9)
        elif kind == 3:
            data[at:at] = data[at : at + 1 + value % 64]
        elif kind == 4:
            data[at : at + 8] = np.uint64(number).tobytes()
        elif kind == 5:
            data[at:at] = str(number).encode()
        else:
            del data[at:]
    return bytes(data)
