"""The C++ runtime: built with CMake, run as its users run it, and held to the Python runtime number by number."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from cpp_build import ROOT
from mending import shift_golden
from PIL import Image
from refusals import assert_refused

import diffexport
from diffexport.parity import LIMITS
from diffexport.pictures import grid
from diffexport.samplers import SAMPLERS

ORACLES = ROOT / "tests" / "oracles"


FAMILIES = {  # checkpoints of every family of models, with what a state dict does not tell
    "digits": (ROOT / "models" / "digits.pt", {}),
    "DiT": (ORACLES / "sd_dit_cond.safetensors", {"heads": 2, "prediction": "v", "scaled": True, "schedule": "ddpm"}),
    "U-Net": (
        ORACLES / "sd_unet_cond.safetensors",
        {"image_size": 12, "prediction": "eps", "scaled": True, "schedule": "ddpm"},
    ),
    "MLP": (ORACLES / "sd_mlp_cond.safetensors", {"prediction": "eps", "scaled": False, "schedule": "loglinear"}),
    "official DiT": (ORACLES / "official_dit.safetensors", {"heads": 4}),
}


@pytest.fixture(scope="session")
def family_bundle(tmp_path_factory):
    from diffexport_reference.checkpoints import load_checkpoint

    made = {}

    def make(name, precision="fp32"):
        if (name, precision) not in made:
            weights, facts = FAMILIES[name]
            module, spec = load_checkpoint(weights, **facts)
            out = tmp_path_factory.mktemp("families") / f"{weights.stem}.diffx"
            made[name, precision] = diffexport.export(
                module, spec, out, precision=precision, max_batch=2, thorough=False
            )
        return made[name, precision]

    return make


def plans_of(bundle):
    """The samplers whose ready-made plans a bundle has."""
    return sorted({name.rpartition(".")[0] for name in bundle.plans() if not name.endswith(".x_scale")} & set(SAMPLERS))


def assert_same_images(cpp, bundle, folder, steps, backend="ort"):
    """Every sampler, with guidance where the model allows it: C++ and Python agree to 1e-5."""
    names = plans_of(bundle)
    assert len(names) >= 5
    scale = 2.5 if bundle.spec.guidable else 1.0
    cpp.run("tests/diffx-draw", bundle.path, backend, steps, scale, folder / "drawn", *names)
    drawn = np.fromfile(folder / "drawn", np.float32).reshape(len(names), 5, -1)
    with bundle.sampler(backend, threads=1) as sampler:
        for name, found in zip(names, drawn, strict=True):
            options = {"sampler": name, "steps": steps, "guidance_scale": scale}
            expected = sampler.sample(num=5, batch=2, seed=2**40 + 3, first=5, **options)
            if sampler.decoder is not None:
                expected = sampler.decode(expected)
            expected = expected.reshape(5, -1)
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected), name


def test_units(cpp):
    """Noise vectors, SHA-256, the readers of manifests and tensors."""
    assert "SUCCESS" in cpp.run("tests/diffx-unit-tests").stdout


@pytest.mark.parametrize("name", ["plain", "variance", "flow", "unguided", "points", "decoded"])
def test_every_sampler_gives_the_images_of_python(cpp, toy_bundle, tmp_path, name):
    assert_same_images(cpp, toy_bundle(name), tmp_path, 10)


EVERY = [(name, p, backend) for name in FAMILIES for p in ("fp32", "fp16") for backend in ("ort", "openvino")]


@pytest.mark.parametrize(
    ("name", "precision", "backend"),
    [*EVERY, ("digits", "bf16", "openvino"), ("official DiT", "bf16", "openvino")],
)
def test_every_family_gives_the_images_of_python(cpp, family_bundle, tmp_path, name, precision, backend):
    assert_same_images(cpp, family_bundle(name, precision), tmp_path, 5, backend)


def test_bf16_without_openvino_is_refused_with_what_to_do(cpp, family_bundle):
    done = cpp.run("diffx-sample", family_bundle("official DiT", "bf16").path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ONNX Runtime has no bfloat16 on a CPU; take --backend openvino, or a bundle of fp16" in done.stderr


def test_diffx_sample_takes_the_words_of_diffx_sample(cpp, diffx, toy_bundle):
    """The same words give the same images; labels by name, too."""
    words = [toy_bundle("variance").path, "--labels", "bee,3-4,ant", "--steps", 5, "--sampler", "ddpm", "--seed", 7]
    words += ["--guidance-scale", 3, "--first", 2, "--batch", 3, "--num", 5, "--threads", 1, "--backend", "ort"]
    assert diffx("sample", *words, "--npz", "python.npz")[0] == 0
    told = json.loads(cpp.run("diffx-sample", *words, "--npy", "cpp.npy", "--json").stdout)
    assert (told["samples"], told["device"], told["written"]) == (5, "CPU", ["cpp.npy"])
    expected = np.load("python.npz")["x"]
    found = np.load("cpp.npy")
    assert (found.dtype, found.shape) == (np.dtype(np.float32), expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_example_of_the_documentation_compiles_and_runs(cpp, family_bundle):
    source = (ROOT / "cpp" / "tests" / "ten_lines.cpp").read_text()
    example = re.findall(r"^    (?!std::printf)\S.*$", source, re.MULTILINE)
    assert re.search(r"//     diffx::Bundle", (ROOT / "cpp" / "include" / "diffx.hpp").read_text())
    assert len(example) == 3
    bundle = family_bundle("DiT")
    text = cpp.run("tests/diffx-ten-lines", bundle.path).stdout
    expected = bundle.sampler().sample(labels=[3, 1, 4], steps=20, seed=0)
    assert text.startswith(f"4 sides, {expected.size} numbers, first ")
    assert float(text.split()[-1]) == pytest.approx(expected.flat[0], abs=1e-5)


def test_the_c_interface(cpp, family_bundle):
    """Also that each refusal is a status and a message; see cpp/tests/c_program.c."""
    bundle = family_bundle("DiT")
    numbers = [float(line) for line in cpp.run("tests/diffx-c-program", bundle.path).stdout.split()]
    options = {"sampler": "ddpm", "steps": 10, "guidance_scale": 2.0, "seed": 7}
    expected = bundle.sampler().sample([3, 1, 4], **options).ravel()
    np.testing.assert_allclose(numbers, expected, atol=1e-5 * np.abs(expected).max())


def test_the_library_exports_the_c_interface_and_nothing_else(cpp):
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", cpp.folder / "libdiffx-runtime.so"], capture_output=True, text=True, check=True
    )
    functions = {line.split()[2] for line in listed.stdout.splitlines() if line.split()[1] == "T"}
    header = (ROOT / "cpp" / "include" / "diffx.h").read_text()
    assert functions == set(re.findall(r"DIFFX_API [\w \*]*?(diffx_\w+)\(", header))


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_threads_share_a_bundle(cpp, toy_bundle, backend):
    assert cpp.run("tests/diffx-threads", toy_bundle("plain").path, backend).stdout == "the same\n"


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_the_selftest_holds_the_bundle_to_pythons_limits(cpp, toy_bundle, backend):
    done = cpp.run("diffx-sample", toy_bundle("decoded").path, "--backend", backend, "--selftest", "--json")
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["check"] for f in findings][-2:] == ["run", "decoder.image"]
    assert len(findings) == 8
    for finding in findings:
        assert finding["passed"]
        limits = LIMITS["fp32"]
        assert finding["limit"] == (limits.trajectory if finding["check"] == "run" else limits.step)
        assert 0 < finding["seconds_per_step"] < 10


def test_the_picture_is_the_one_that_python_draws(cpp, toy_bundle, family_bundle, tmp_path):
    for bundle in (toy_bundle("plain"), family_bundle("DiT")):  # latents, and gray pictures
        cpp.run("diffx-sample", bundle.path, "--num", 5, "--steps", 5, "--out", tmp_path / "a.png")
        expected = grid(bundle.sampler().sample(num=5, steps=5))
        assert np.abs(np.asarray(Image.open(tmp_path / "a.png"), int) - np.asarray(expected)).max() <= 1


def raw_runs(cpp, bundle, *words):
    """What lies between the runs of the network, after the first twenty: see cpp/tests/raw_runs.cpp."""
    shim = str(cpp.folder / "tests" / "libdiffx-raw-runs.so")
    real = cpp.environment["DIFFX_ONNXRUNTIME_LIBRARY"]
    environment = {"DIFFX_ONNXRUNTIME_LIBRARY": shim, "LD_PRELOAD": shim, "RAW_RUNS_LIBRARY": real}
    words = [bundle.path, "--sampler", "ddpm", "--steps", 10, *words]
    report = cpp.run("diffx-sample", *words, environment=environment).stderr.split()
    return dict(zip(report[::2], map(float, report[1::2]), strict=True))


def test_the_loop_allocates_nothing(cpp, family_bundle, tmp_path):
    """Between the runs of the network, noise and new batches included, malloc is not called once."""
    found = raw_runs(cpp, family_bundle("DiT"), "--num", 40, "--batch", 4, "--npy", tmp_path / "a.npy")
    assert found["runs"] == 80
    assert found["allocations"] == 0


@pytest.mark.parametrize("backend", ["ort", "openvino"])
@pytest.mark.parametrize("name", ["plain", "points"])
def test_memory_is_what_the_documentation_says(cpp, toy_bundle, tmp_path, name, backend):
    """6 (B + R) + N images of floats, and 2 (B + R) + N labels: B the batch, N the images asked for, R = N modulo B."""
    bundle = toy_bundle(name)

    def peak(num, batch):
        words = ["--backend", backend, "--num", num, "--batch", batch, "--sampler", "ddpm", "--steps", 5]
        environment = {"LD_PRELOAD": str(cpp.folder / "tests" / "libdiffx-heap.so")}
        words = ["diffx-sample", bundle.path, *words, "--threads", 1, "--npy", tmp_path / "a.npy"]
        return int(cpp.run(*words, environment=environment).stderr.split()[-1])

    least = peak(1, 1)
    image, label = 4 * int(np.prod(bundle.spec.shape)), 8 if bundle.spec.conditional else 0
    for num, batch in [(2000, 2000), (6000, 2000), (3000, 2000), (2999, 1000)]:
        rows = batch + num % batch
        bound = image * (6 * rows + num) + label * (2 * rows + num)
        assert 0.95 * bound < peak(num, batch) <= bound + least


def test_the_library_is_small(cpp, tmp_path):
    """Stripped, at most a megabyte with the backends, which are opened and not linked."""
    for name in ("libdiffx-runtime.so", "diffx-sample"):
        subprocess.run(["strip", "-o", tmp_path / name, cpp.folder / name], check=True)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000
    needed = subprocess.run(
        ["readelf", "-d", cpp.folder / "libdiffx-runtime.so"], capture_output=True, text=True, check=True
    )
    assert "onnxruntime" not in needed.stdout


def damage(kind, path):
    manifest = json.loads((path / "manifest.json").read_text())
    if kind == "cut off":
        (path / "weights.bin").write_bytes((path / "weights.bin").read_bytes()[:-1])
    elif kind == "altered":
        data = bytearray((path / "step.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (path / "step.onnx").write_bytes(data)
    elif kind == "version":
        manifest["schema"] = 2
    elif kind == "leaves":
        manifest["files"]["../outside"] = {"size": 1, "sha256": ""}
    elif kind == "link":
        shutil.move(path / "step.onnx", path.parent / "step.onnx")
        (path / "step.onnx").symlink_to(path.parent / "step.onnx")
    elif kind == "huge":
        manifest["model"]["shape"] = [2**40, 2**40, 2**40]
    elif kind == "no plans":
        (path / "plans.safetensors").unlink()
    elif kind == "no manifest":
        (path / "manifest.json").unlink()
        return
    elif kind == "text":
        (path / "manifest.json").write_text("not JSON")
        return
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("kind", "message"), [
    ("cut off", "weights.bin: "),
    ("altered", "step.onnx: sha256 is"),
    ("version", "schema version 2, this diffx reads 1"),
    ("leaves", "'../outside', expected a plain file name"),
    ("link", "not a regular file"),
    ("huge", "model.shape"),
    ("no plans", "plans.safetensors: missing"),
    ("no manifest", "cannot be read; expected a bundle"),
    ("text", "not a valid manifest"),
])  # fmt: skip
def test_bad_bundles_are_refused_in_one_line(cpp, toy_bundle, tmp_path, kind, message):
    path = tmp_path / "bad.diffx"
    shutil.copytree(toy_bundle("plain").path, path)
    damage(kind, path)
    done = cpp.run("diffx-sample", path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("diffx-sample: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(("words", "message", "status"), [
    (["--steps", "13"], "dpmpp-2m:5,10,20,50", 1),
    (["--steps", "13"], "add this one with `diffx export CKPT --plan dpmpp-2m:13`", 1),
    (["--sampler", "dimm"], "plan dimm:20", 1),
    (["--labels", "7"], "label '7': this model has labels 0..4", 2),
    (["--labels", "3", "--num", "2", "--per-label", "3"], "--per-label: give it without --num", 2),
    (["--backend", "nonsense"], "known: ort, ort-cuda, openvino, trt, trt-rtx", 1),
    (["--steps", "many"], "--steps many: expected a number of at least 1", 2),
    (["--guidance-scale", "nan"], "--guidance-scale nan: expected a finite number", 2),
    (["--hurry"], "--hurry: no such option", 2),
    (["--out", "/nowhere/a.png", "--steps", "5"], "/nowhere/a.png", 1),
    (["extra"], "expected one BUNDLE", 2),
])  # fmt: skip
def test_wrong_calls_are_refused_in_one_line(cpp, toy_bundle, words, message, status):
    done = cpp.run("diffx-sample", toy_bundle("plain").path, *words, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_runtime_that_is_missing_is_said(cpp, toy_bundle):
    environment = {"DIFFX_ONNXRUNTIME_LIBRARY": "libnowhere.so"}
    done = cpp.run("diffx-sample", toy_bundle("plain").path, check=False, environment=environment)
    assert done.returncode == 1
    assert "libnowhere.so: cannot open shared object file" in done.stderr
    assert "install ONNX Runtime's C library, or name the file in DIFFX_ONNXRUNTIME_LIBRARY" in done.stderr


@pytest.fixture
def changed(family_bundle, tmp_path):
    """A bundle whose recorded run is not what its network gives."""
    path = tmp_path / "changed.diffx"
    shutil.copytree(family_bundle("DiT").path, path)
    shift_golden(path, "run.x")
    return path


def test_the_selftest_refuses_what_differs(cpp, changed):
    done = cpp.run("diffx-sample", changed, "--selftest", check=False)
    assert done.returncode == 1
    assert re.search(r"^FAILED run ", done.stdout, re.M)
    assert "1 of 7 golden cases differ" in done.stderr


def test_a_selftest_that_is_asked_for_comes_before_the_first_sample(cpp, changed):
    """On the CPU, where it is off by itself: the C program asks for it, diffx-sample does not."""
    done = cpp.run("tests/diffx-c-program", changed, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(
        r"got status 5 \(1 of \d golden cases differ .* on CPU, most of all run \(relative L2 ", done.stderr
    )
    assert cpp.run("diffx-sample", changed, "--steps", 5, "--npy", changed.parent / "a.npy").returncode == 0


@pytest.fixture
def project(diffx, family_bundle, tmp_path):
    """What ``diffx embed`` writes, in the current folder."""
    bundle = family_bundle("DiT")
    code, out, _ = diffx("embed", bundle.path, "--out", "project")
    assert code == 0
    assert "wrote project" in out
    return tmp_path / "project"


def test_embed_writes_a_project_that_builds_and_draws(cpp, project, family_bundle):
    """With the sources that it brings, as its README says; then with an installed runtime, by CMake and by pkg-config."""

    def compiled(*command):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=project)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def drawn(program, **environment):
        (project / "images.f32").unlink(missing_ok=True)
        subprocess.run([program], check=True, cwd=project, env=cpp.environment | environment)
        return np.fromfile(project / "images.f32", np.float32)

    assert len((project / "main.cpp").read_text().partition("int main")[2].splitlines()) <= 10
    readme = (project / "README.md").read_text()
    for words in ("x86-64", "aarch64", "Jetson", "cmake -S . -B build -Donnxruntime_ROOT=FOLDER"):
        assert words in readme
    expected = family_bundle("DiT").sampler().sample([3, 1, 4], seed=0).ravel()
    headers = f"-Donnxruntime_ROOT={ROOT / 'build' / 'onnxruntime'}"
    compiled("cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug", headers)
    compiled("cmake", "--build", "build")
    np.testing.assert_allclose(drawn(project / "build" / "sample"), expected, atol=1e-5 * np.abs(expected).max())

    installed = project / "installed"
    compiled("cmake", "--install", cpp.folder, "--prefix", installed)
    compiled("cmake", "-S", ".", "-B", "found", "-G", "Ninja", f"-Ddiffx_ROOT={installed}")
    compiled("cmake", "--build", "found")
    assert not (project / "found" / "diffx").exists()
    np.testing.assert_allclose(drawn(project / "found" / "sample"), expected, atol=1e-5 * np.abs(expected).max())
    help_text = subprocess.run(
        [installed / "bin" / "diffx-sample", "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: diffx-sample BUNDLE" in help_text.stdout

    (config,) = installed.rglob("diffx.pc")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", f"--define-variable=prefix={installed}", config],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    compiled("g++", "-std=c++20", "main.cpp", *flags, "-o", "linked")
    (library,) = installed.rglob("libdiffx-runtime.so")
    found = drawn(project / "linked", LD_LIBRARY_PATH=str(library.parent))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_component_that_is_not_built_in_is_not_found(cpp, tmp_path):
    """The installed build has all of them; that of one without OpenVINO is put in its place."""

    def cmake(*words, **variables):
        options = [f"-D{name}={value}" for name, value in variables.items()]
        return subprocess.run(["cmake", *words, *options], capture_output=True, text=True, check=False)

    assert cmake("--install", cpp.folder, "--prefix", tmp_path / "i").returncode == 0
    headers = ROOT / "build" / "onnxruntime"
    cmake("-S", ROOT / "cpp", "-B", tmp_path / "o", DIFFX_PROGRAM="OFF", onnxruntime_ROOT=headers)
    (config,) = (tmp_path / "i").rglob("diffxConfig.cmake")
    shutil.copy(tmp_path / "o" / "diffxConfig.cmake", config)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES NONE)\n"
        "find_package(diffx REQUIRED COMPONENTS onnxruntime ${MORE})\n"
    )
    words = ["-S", tmp_path, "-B", tmp_path / "b"]
    assert cmake(*words, diffx_ROOT=tmp_path / "i").returncode == 0
    done = cmake(*words, diffx_ROOT=tmp_path / "i", MORE="openvino")
    assert done.returncode != 0
    assert "diffx was built without the component openvino" in " ".join(done.stderr.split())


def test_embed_refuses(diffx, toy_bundle, tmp_path):
    bundle = toy_bundle("plain").path
    (tmp_path / "there").mkdir()
    assert_refused(diffx("embed", bundle, "--out", "there"), "there: exists; choose another --out")
    assert_refused(diffx("embed", bundle, "--backend", "torch"), "the C++ runtime has ort, openvino, trt, trt-rtx")
    assert not (tmp_path / "plain-cpp").exists()


def test_the_library_compiles_for_64_bit_arm(cpp, tmp_path):
    for command in (
        ["cmake", "--preset", "aarch64", "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Debug"],
        ["cmake", "--build", tmp_path],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "cpp")
        assert done.returncode == 0, done.stdout + done.stderr
    found = subprocess.run(
        ["readelf", "-h", tmp_path / "libdiffx-runtime.so"], capture_output=True, text=True, check=True
    )
    assert "AArch64" in found.stdout
