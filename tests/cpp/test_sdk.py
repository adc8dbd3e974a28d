"""The C++ library as a user has it: configured, built, installed, found by find_package, linked, run.

Compared with the Python package on the same files. The runtime is the libonnxruntime of the installed wheel.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from ort_library import ROOT, onnxruntime_headers
from PIL import Image
from tiny_onnx import COLOURS, tiny_info, write_tiny_onnx
from zoo import exported

from vimdeploy.cli.main import cli
from vimdeploy.models.variants import VimConfig
from vimdeploy.preprocess import Preprocessing, to_rgb

PHOTOS = sorted((ROOT / "vimdeploy" / "verify" / "photos").glob("*.jpg"))
DIGITS = ROOT / "examples" / "digits" / "vim_digits.pth"
DIGIT_IMAGES = sorted((ROOT / "calib" / "digits").rglob("*.png"))[::97]
COMPILER = os.environ.get("CXX", "g++")
# "address;undefined" runs everything below under these sanitizers.
SANITIZE = [name for name in os.environ.get("VIMDEPLOY_SANITIZE", "").split(";") if name]


@dataclass(frozen=True)
class Sdk:
    """An installed SDK, and the programs built against it."""

    prefix: Path
    check: Path
    classify_ort: Path
    classify_trt: Path


def shell(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def generator() -> list[str]:
    return ["-G", "Ninja"] if shutil.which("ninja") else []


def tensorrt_headers() -> dict[str, Path]:
    """Version → folder, of every copy in reach."""
    candidates = [Path(os.environ[name]) for name in ("TENSORRT_ROOT", "TENSORRT8_ROOT") if name in os.environ]
    candidates += sorted((ROOT / ".third").glob("*"))
    spec = importlib.util.find_spec("kernel_lens")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "include" / "tensorrt")
    found = {}
    for folder in (inner for candidate in candidates for inner in (candidate, candidate / "include")):
        if (folder / "NvInferRuntime.h").is_file():
            text = (folder / "NvInferVersion.h").read_text()
            numbers = [
                match[1] if match[1].isdigit() else re.search(rf"define {match[1]} +(\d+)", text)[1]
                for part in ("MAJOR", "MINOR")
                if (match := re.search(rf"define NV_TENSORRT_{part} +(\w+)", text))
            ]
            found.setdefault(".".join(numbers), folder)
    return found


def cuda_headers() -> Path | None:
    homes = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    return next((home for home in homes if (home / "include" / "cuda_runtime_api.h").is_file()), None)


def build_sdk(folder: Path, *options: str) -> str:
    """Configure, build and install into `folder`/prefix, warnings being errors. Returns what configuring said."""
    strict = ["-DVIMDEPLOY_WERROR=ON", f"-DVIMDEPLOY_SANITIZE={';'.join(SANITIZE)}"]
    configured = shell("cmake", "-S", ROOT, "-B", folder / "build", *generator(), *onnxruntime_headers(), *options,
                       *strict, "-DVIMDEPLOY_BUILD_SDK=ON")  # fmt: skip
    shell("cmake", "--build", folder / "build", "--parallel", 2)
    shell("cmake", "--install", folder / "build", "--prefix", folder / "prefix", "--component", "sdk")
    return configured.stdout


def build_consumer(source: Path, folder: Path, prefix: Path) -> None:
    flags = f"-fsanitize={','.join(SANITIZE)}" if SANITIZE else ""
    shell(
        "cmake", "-S", source, "-B", folder, *generator(), f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_FLAGS={flags}"
    )
    shell("cmake", "--build", folder)


@pytest.fixture(scope="session")
def sdk(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Sdk:
    """Built once, whichever worker comes first."""
    for tool in ("cmake", COMPILER):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    pictures = ("-include", "cstdio", "-include", "jpeglib.h", "-include", "png.h")
    if subprocess.run([COMPILER, "-fsyntax-only", "-x", "c++", *pictures, os.devnull], capture_output=True).returncode:
        pytest.skip("no libjpeg or libpng to build with: apt-get install libjpeg-dev libpng-dev")
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "sdk"
    folder.mkdir(exist_ok=True)
    built = Sdk(
        folder / "prefix",
        folder / "consumer" / "sdk_check",
        folder / "examples" / "classify_ort",
        folder / "examples" / "classify_trt",
    )
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            headers, cuda = tensorrt_headers(), cuda_headers()
            options = []
            if headers and cuda:
                # The newest: 8.5's own headers have a test of their own.
                newest = max(headers, key=lambda version: [int(number) for number in version.split(".")])
                options = [f"-DTENSORRT_ROOT={headers[newest]}", f"-DCUDA_HOME={cuda}"]
            log = build_sdk(folder, *options)
            build_consumer(ROOT / "tests" / "cpp" / "sdk", folder / "consumer", built.prefix)
            build_consumer(built.prefix / "share" / "vimdeploy" / "examples", folder / "examples", built.prefix)
            (folder / "done").write_text(log)
    if "SDK: without ONNX Runtime" in (folder / "done").read_text():
        pytest.skip("no headers of ONNX Runtime: ONNXRUNTIME_ROOT, libonnxruntime-dev")
    return built


@functools.cache
def libonnxruntime() -> str:
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("this onnxruntime wheel keeps no libonnxruntime.so of its own")
    return str(found[0])


def start(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    names = ("VIMDEPLOY_ONNXRUNTIME", "VIMDEPLOY_ORT_LIBRARY", "VIMDEPLOY_TENSORRT", "VIMDEPLOY_TRT_PLUGIN")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env=clean | {"VIMDEPLOY_ONNXRUNTIME": libonnxruntime()} | environment,
        capture_output=True,
        check=False,
        timeout=120,
    )


def answer(program: Path, *arguments: object, **environment: str) -> bytes:
    result = start(program, *arguments, **environment)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


def refused(program: Path, *arguments: object, code: int, **environment: str) -> str:
    """The message of a refusal: one error with its next step, nothing on stdout."""
    result = start(program, *arguments, **environment)
    text = result.stderr.decode()
    assert result.returncode == code, (result.returncode, text)
    assert text.count("Error: ") == 1 and result.stdout == b""
    assert "Hint: \n" not in text
    return " ".join(text.split())


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits.vim"
    result = CliRunner().invoke(cli, ["export", str(DIGITS), "-o", str(folder), "--no-verify"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose photographs are resized and cropped: the digits' 28 pixels skip the frame."""
    config = VimConfig(d_model=16, depth=2, img_size=(96, 128), patch_size=16, num_classes=7, d_state=4)
    model = exported(config)
    info = tiny_info(classes=7, size=(96, 128), labels=("ä", "b", "c", "d", "e", "f", "🙂"))
    onnx.helper.set_model_props(model, info.to_props())
    path = tmp_path_factory.mktemp("large") / "large.onnx"
    onnx.save(model, str(path))
    return path


def python_run(model: Path, *images: Path, options: tuple[str, ...] = ()) -> list[list[dict[str, object]]]:
    result = CliRunner().invoke(cli, ["run", str(model), *map(str, images), "--json", *options])
    assert result.exit_code == 0, result.output
    return [entry["predictions"] for entry in json.loads(result.stdout)["images"]]


def predictions(output: bytes) -> list[tuple[int, float, str]]:
    rows = [line.split(" ", 2) for line in output.decode().splitlines()]
    return [(int(index), float(probability), label) for index, probability, label in rows]


# ---- what is installed


def test_header_needs_nothing_but_the_standard_library(sdk: Sdk, tmp_path: Path) -> None:
    header = sdk.prefix / "include" / "vimdeploy" / "vimdeploy.h"
    included = re.findall(r"^#include (.*)$", header.read_text(), re.MULTILINE)
    assert included and all(re.fullmatch(r"<[a-z_]+>", name) for name in included)
    shell(COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", "c++", header)


def test_program_in_the_header_compiles(sdk: Sdk, tmp_path: Path) -> None:
    text = (sdk.prefix / "include" / "vimdeploy" / "vimdeploy.h").read_text()
    shown = re.search(r"//   #include <vimdeploy.*?\n//   }\n", text, re.DOTALL)
    assert shown
    source = tmp_path / "main.cc"
    source.write_text(re.sub(r"^//(   )?", "", shown[0], flags=re.MULTILINE))
    shell(COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{sdk.prefix}/include", "-fsyntax-only", source)


def test_nothing_of_a_runtime_is_linked(sdk: Sdk) -> None:
    needed = shell("readelf", "-d", sdk.prefix / "lib" / "libvimdeploy.so").stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert any(name.startswith("libjpeg") for name in libraries)
    assert not any(re.search("onnxruntime|nvinfer|cuda", name) for name in libraries)


@pytest.mark.parametrize("name", ["classify_ort.cc", "classify_trt.cc"])
def test_examples_are_short(name: str) -> None:
    assert len((ROOT / "sdk" / "examples" / name).read_text().splitlines()) < 80


# ---- pictures


def decoded(output: bytes) -> np.ndarray:
    width, height = np.frombuffer(output[:8], np.int32)
    return np.frombuffer(output[8:], np.uint8).reshape(height, width, 3)


def pictures(folder: Path) -> dict[str, Path]:
    """One file of each kind that JPEG and PNG know, of a photograph with odd sides."""
    photo = Image.open(PHOTOS[3]).convert("RGB").crop((3, 5, 246, 190))
    ramp = np.arange(300 * 7, dtype=np.uint32).reshape(7, 300) * 31
    files: dict[str, Path] = {}

    def put(name: str, image: Image.Image, **options: object) -> None:
        files[name] = folder / name
        image.save(folder / name, **options)

    for sampling, word in ((0, "444"), (1, "422"), (2, "420")):
        put(f"{word}.jpg", photo, quality=70, subsampling=sampling)
    put("progressive.jpg", photo, quality=60, progressive=True)
    put("grey.jpg", photo.convert("L"))
    put("cmyk.jpg", photo.convert("CMYK"))
    put("rgb.png", photo)
    put("alpha.png", Image.merge("RGBA", (*photo.split(), photo.convert("L"))))
    put("grey.png", photo.convert("L"))
    put("grey-alpha.png", Image.merge("LA", (photo.convert("L"), photo.getchannel(0))))
    put("bilevel.png", photo.convert("1"))
    put("wide-grey.png", Image.fromarray((ramp % 65536).astype(np.uint16)))
    for colours in (2, 4, 16, 256):
        put(f"palette-{colours}.png", photo.quantize(colours))
    put("palette-clear.png", photo.quantize(16), transparency=3)
    put("clear.png", photo, transparency=(1, 2, 3))
    return files


def test_pictures_decode_as_pil_decodes_them(sdk: Sdk, tmp_path: Path) -> None:
    files = {photo.name: photo for photo in PHOTOS} | pictures(tmp_path)
    assert len(PHOTOS) == 8
    for name, path in files.items():
        got = decoded(answer(sdk.check, "decode", path))
        want = np.asarray(to_rgb(Image.open(path)))
        assert got.shape == want.shape, name
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kind,bits", [(0, 1), (0, 2), (0, 4), (0, 16), (2, 16), (4, 16), (6, 16), (6, 8)])
def test_kinds_of_png_that_pil_reads_but_does_not_write(
    sdk: Sdk, tmp_path: Path, kind: int, bits: int, interlaced: bool
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(kind, bits, interlaced, width=13, height=11))
    np.testing.assert_array_equal(decoded(answer(sdk.check, "decode", path)), np.asarray(to_rgb(Image.open(path))))


def png(kind: int, bits: int, interlaced: bool, width: int, height: int) -> bytes:
    """A PNG of noise, written from the specification: chunks, filter 0, Adam7 passes."""
    import zlib

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    noise = np.random.default_rng(bits + kind)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    data = b""
    for x, y, dx, dy in passes if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0:
            for _ in range(rows):
                data += b"\0" + noise.integers(0, 256, -(-columns * channels * bits // 8), dtype=np.uint8).tobytes()

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, kind, 0, 0, int(interlaced)])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def preprocessed(sdk: Sdk, preprocessing: Preprocessing, path: Path) -> np.ndarray:
    height, width = preprocessing.img_size
    output = answer(sdk.check, "preprocess", height, width, preprocessing.resize or 0, path)
    return np.frombuffer(output, np.float32).reshape(3, height, width)


@pytest.mark.parametrize("size", [(224, 224), (384, 384), (28, 28), (224, 320), (300, 100), (512, 512)])
def test_photographs_are_preprocessed_to_the_bit(sdk: Sdk, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing.for_config(VimConfig(d_model=8, img_size=size))
    for photo in PHOTOS:
        want = preprocessing(Image.open(photo))
        np.testing.assert_array_equal(preprocessed(sdk, preprocessing, photo), want, err_msg=photo.name)


@pytest.mark.parametrize(
    "width,height",
    [(256, 256), (500, 375), (375, 500), (333, 251), (449, 331), (257, 256), (224, 224), (64, 48), (1000, 37), (1, 1)],
)
def test_noise_of_every_geometry_is_preprocessed_to_the_bit(sdk: Sdk, tmp_path: Path, width: int, height: int) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    for size in ((224, 224), (32, 32), (48, 96)):
        preprocessing = Preprocessing.for_config(VimConfig(d_model=8, img_size=size))
        want = preprocessing(Image.fromarray(pixels))
        np.testing.assert_array_equal(preprocessed(sdk, preprocessing, tmp_path / "noise.png"), want)


def test_pictures_that_are_refused(sdk: Sdk, tmp_path: Path) -> None:
    check = functools.partial(refused, sdk.check, "decode", code=2)
    assert "none.jpg does not exist" in check(tmp_path / "none.jpg")
    assert "is a folder" in check(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    assert "text.jpg is neither a JPEG nor a PNG" in check(tmp_path / "text.jpg")
    assert "empty.png is neither" in check(tmp_path / "empty.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.bmp")
    assert "convert it" in check(tmp_path / "x.bmp")
    for suffix in (".jpg", ".png"):
        whole = tmp_path / f"whole{suffix}"
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(whole)
        data = whole.read_bytes()
        for keep in (4, 30, 0.3, 0.5, 0.95):
            cut = tmp_path / f"cut{suffix}"
            cut.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
            text = check(cut)
            assert f"cut{suffix} is " in text and ("damaged" in text or "neither" in text)
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1, 30000)).save(thin)
    assert "would be scaled to 256x7680000" in refused(sdk.check, "preprocess", 224, 224, 256, thin, code=2)


def test_a_file_that_claims_to_be_huge_is_refused(sdk: Sdk, tmp_path: Path) -> None:
    data = bytearray(png(2, 8, False, width=4, height=4))
    import zlib

    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(data)
    assert "60000x60000 pixels are more than" in refused(sdk.check, "decode", tmp_path / "huge.png", code=2)


def test_damaged_bytes_never_crash(sdk: Sdk, tmp_path: Path) -> None:
    noise = np.random.default_rng(5)
    small = tmp_path / "small.jpg"
    Image.open(PHOTOS[0]).resize((40, 30)).save(small)
    for source in (small, pictures(tmp_path)["palette-16.png"]):
        data = bytearray(source.read_bytes())
        for _ in range(40):
            broken = bytearray(data)
            for place in noise.integers(8, len(data), 5):
                broken[place] = noise.integers(256)
            (tmp_path / "broken").write_bytes(broken)
            assert start(sdk.check, "decode", tmp_path / "broken").returncode in (0, 2)


# ---- models


def test_same_classes_and_probabilities_as_vimdeploy_run(sdk: Sdk, digits: Path, large: Path) -> None:
    assert len(DIGIT_IMAGES) > 10
    for model, images in ((digits, [*PHOTOS, *DIGIT_IMAGES]), (large, PHOTOS)):
        want = [p for ranked in python_run(model, *images) for p in ranked]
        got = predictions(answer(sdk.check, "classify", model, 5, *images))
        assert len(got) == len(want) == 5 * len(images)
        for (index, probability, label), entry in zip(got, want, strict=True):
            assert (index, label) == (entry["index"], entry["label"])
            assert probability == pytest.approx(entry["probability"], abs=5e-5)


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.stem)
def test_classify_ort_prints_what_vimdeploy_run_prints(sdk: Sdk, digits: Path, photo: Path) -> None:
    got = answer(sdk.classify_ort, photo, digits / "model.onnx").decode()
    result = CliRunner().invoke(cli, ["run", str(digits), str(photo)])
    assert result.exit_code == 0
    assert len(got.splitlines()) == 6
    # The table pads its last column.
    assert got.splitlines() == [line.rstrip() for line in result.stdout.splitlines()]


def test_examples_say_how_to_be_used(sdk: Sdk) -> None:
    for program in (sdk.classify_ort, sdk.classify_trt):
        result = start(program)
        assert result.returncode == 2 and b"Usage: " in result.stderr
    text = refused(sdk.check, "classify", "none.vim", 5, PHOTOS[0], code=2)
    assert "none.vim does not exist" in text


def test_metadata(sdk: Sdk, digits: Path) -> None:
    lines = answer(sdk.check, "info", digits).decode().splitlines()
    values = dict(line.split(" ", 1) for line in lines if " " in line and not line.startswith("label"))
    assert "ONNX Runtime >= 1.21" in values["features"]
    assert values["variant"].startswith("vim_digits")
    assert [values[key] for key in ("precision", "output", "channels", "height", "width", "classes", "resize")] == [
        "fp32", "logits", "3", "28", "28", "10", "0",
    ]  # fmt: skip
    assert (values["min_batch"], values["max_batch"]) == ("1", str(2**63 - 1))
    assert [line[6:] for line in lines if line.startswith("label ")][:3] == ["zero", "one", "two"]
    assert re.fullmatch(r"onnxruntime [\d.]+ CPU, vim op library", values["runtime"])
    assert values["notice"] == ""


def test_two_threads_share_a_model(sdk: Sdk, digits: Path) -> None:
    output = answer(sdk.check, "threads", digits, 2, 25, *PHOTOS[:3]).decode()
    assert output == "compared 50 wrong 0\n"


def test_library_and_function_body(sdk: Sdk, tmp_path: Path) -> None:
    """The tiny model's op computes twice what its function body says, so the answer tells which of them ran."""
    model = write_tiny_onnx(tmp_path / "tiny.onnx", tiny_info(labels=tuple(COLOURS)))

    def logits(**environment: str) -> np.ndarray:
        lines = answer(sdk.check, "run", model, 1, **environment).decode().splitlines()
        assert lines[0] == "logits 1 3"
        return np.array(lines[1:], dtype=float)

    body = logits(OPEN_OP_LIBRARY="off")
    np.testing.assert_allclose(logits(), 2 * body, rtol=1e-6)
    library = sdk.prefix / "lib" / "libvimdeploy_ort.so"
    np.testing.assert_allclose(logits(OPEN_OP_LIBRARY=str(library)), 2 * body, rtol=1e-6)
    np.testing.assert_allclose(logits(VIMDEPLOY_ORT_LIBRARY=str(library)), 2 * body, rtol=1e-6)
    # What was named and is not there is never passed over.
    text = refused(sdk.check, "run", model, 1, code=3, OPEN_OP_LIBRARY=str(tmp_path / "none.so"))
    assert "none.so is not a file" in text
    text = refused(sdk.check, "run", model, 1, code=3, VIMDEPLOY_ORT_LIBRARY=str(tmp_path / "none.so"))
    assert "VIMDEPLOY_ORT_LIBRARY names" in text
    (tmp_path / "bad.so").write_text("no library")
    assert "the op library cannot be loaded from" in refused(
        sdk.check, "run", model, 1, code=3, OPEN_OP_LIBRARY=str(tmp_path / "bad.so")
    )


def test_without_the_op_library_the_function_body_runs_and_is_named(sdk: Sdk, digits: Path, tmp_path: Path) -> None:
    shutil.copy(sdk.prefix / "lib" / "libvimdeploy.so", tmp_path / "libvimdeploy.so.0")
    model = write_tiny_onnx(tmp_path / "bare.onnx", body=False)
    environment = {"LD_LIBRARY_PATH": str(tmp_path)}
    # The programs' own run path would come first in RUNPATH's stead only if it were an RPATH.
    output = answer(sdk.check, "info", digits, **environment).decode()
    if "vim op library" in output:
        pytest.skip("the linker writes RPATH, which LD_LIBRARY_PATH does not override")
    assert "function body (scan), no op library" in output
    assert "notice Running the function body, which is slower" in output
    text = refused(sdk.check, "info", model, code=3, **environment)
    assert "carries no function body" in text and "VIMDEPLOY_ORT_LIBRARY" in text
    assert "carries no function body" in refused(sdk.check, "info", model, code=2, OPEN_OP_LIBRARY="off")


def test_fixed_batch_is_split_and_filled_up(sdk: Sdk, tmp_path: Path) -> None:
    images = []
    for name, colour in COLOURS.items():
        images.append(tmp_path / f"{name}.png")
        Image.new("RGB", (32, 32), colour).save(images[-1])
    model = write_tiny_onnx(tmp_path / "fixed.onnx", tiny_info(labels=tuple(COLOURS)), batch=2)
    got = predictions(answer(sdk.check, "classify", model, 1, *images))
    assert [label for _, _, label in got] == list(COLOURS)
    values = dict(
        line.split(" ", 1) for line in answer(sdk.check, "info", model).decode().splitlines() if "batch" in line
    )
    assert values == {"min_batch": "2", "max_batch": "2"}
    assert "a batch of 1, the model takes 2 to 2" in refused(sdk.check, "run", model, 1, code=2)
    dynamic = write_tiny_onnx(tmp_path / "dynamic.onnx")
    assert "a batch of 0" in refused(sdk.check, "run", dynamic, 0, code=2)
    assert "top_k is 0" in refused(sdk.check, "classify", dynamic, 0, images[0], code=2)


def test_half_inputs_and_outputs(sdk: Sdk, tmp_path: Path) -> None:
    image = tmp_path / "green.png"
    Image.new("RGB", (32, 32), COLOURS["green"]).save(image)
    info = tiny_info(labels=tuple(COLOURS))
    model = write_tiny_onnx(tmp_path / "half.onnx", info, dtype=onnx.TensorProto.FLOAT16)
    got = predictions(answer(sdk.check, "classify", model, 3, image))
    want = predictions(answer(sdk.check, "classify", write_tiny_onnx(tmp_path / "full.onnx", info), 3, image))
    assert [entry[2] for entry in got] == [entry[2] for entry in want] and got[0][2] == "green"
    np.testing.assert_allclose([entry[1] for entry in got], [entry[1] for entry in want], atol=2e-3)


def test_models_that_are_refused(sdk: Sdk, digits: Path, tmp_path: Path) -> None:
    check = functools.partial(refused, sdk.check, "info", code=2)
    assert "none.onnx does not exist" in check(tmp_path / "none.onnx")
    (tmp_path / "empty.vim").mkdir()
    assert "holds no model.onnx" in check(tmp_path / "empty.vim")
    (tmp_path / "model.txt").write_text("x")
    assert "ends in neither .onnx nor .plan" in check(tmp_path / "model.txt")
    (tmp_path / "text.onnx").write_text("no model")
    assert "ONNX Runtime cannot load" in check(tmp_path / "text.onnx")
    # Cut, but beside a manifest: said before the runtime reads it.
    shutil.copytree(digits, tmp_path / "cut.vim")
    data = (digits / "model.onnx").read_bytes()
    (tmp_path / "cut.vim" / "model.onnx").write_bytes(data[: len(data) // 2])
    assert "SHA-256 differs" in check(tmp_path / "cut.vim")
    assert "cannot load" in check(tmp_path / "cut.vim", OPEN_UNCHECKED="1")
    (tmp_path / "cut.vim" / "manifest.json").write_text('{"files": ')
    assert "manifest.json is damaged" in check(tmp_path / "cut.vim")
    text = refused(sdk.check, "enqueue", digits, code=2)
    assert "Enqueue takes device memory" in text


@pytest.mark.parametrize(
    "key,value,message",
    [("labels", "[1]", "a number where a string"), ("config", "{", "not JSON"),
     ("variant", None, "no vimdeploy.variant"), ("preprocessing", '{"img_size": [32, 32]}', 'no "resize"'),
     ("config", '{"img_size": [32]}', "img_size takes")],
)  # fmt: skip
def test_damaged_metadata_is_refused(sdk: Sdk, tmp_path: Path, key: str, value: str | None, message: str) -> None:
    path = write_tiny_onnx(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    props = {p.key: p.value for p in model.metadata_props}
    del model.metadata_props[:]
    changed = {k: v for k, v in (props | {f"vimdeploy.{key}": value}).items() if v is not None}
    onnx.helper.set_model_props(model, changed)
    onnx.save(model, str(path))
    text = refused(sdk.check, "info", path, code=2)
    assert "does not say what it is" in text and message in text


def test_preprocessing_of_another_kind_is_refused(sdk: Sdk, tmp_path: Path) -> None:
    path = write_tiny_onnx(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    for prop in model.metadata_props:
        if prop.key == "vimdeploy.preprocessing":
            good = json.loads(prop.value)
            prop.value = json.dumps(good | {"interpolation": "nearest"})
    onnx.save(model, str(path))
    assert "only bicubic is known" in refused(sdk.check, "info", path, code=2)


@pytest.mark.parametrize("output", ["features", "tokens"])
def test_models_that_do_not_classify(sdk: Sdk, tmp_path: Path, output: str) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx", tiny_info(output=output))
    text = refused(sdk.check, "classify", model, 5, PHOTOS[0], code=2)
    assert f"puts out {output}" in text and "--output logits" in text


def test_scores_that_are_not_finite_fail(sdk: Sdk, tmp_path: Path) -> None:
    model = write_tiny_onnx(tmp_path / "m.onnx", scale=float("nan"))
    assert "not finite" in refused(sdk.check, "classify", model, 5, PHOTOS[0], code=1)


def test_no_onnxruntime(sdk: Sdk, digits: Path, tmp_path: Path) -> None:
    text = refused(sdk.check, "info", digits, code=3, VIMDEPLOY_ONNXRUNTIME=str(tmp_path / "libonnxruntime.so"))
    assert "VIMDEPLOY_ONNXRUNTIME names" in text and "cannot be loaded" in text
    text = refused(sdk.check, "info", digits, code=3, OPEN_RUNTIME="libc.so.6")
    assert "is not ONNX Runtime" in text
    result = start(sdk.check, "info", digits, VIMDEPLOY_ONNXRUNTIME="")
    if result.returncode != 0:  # this host may have one where the loader looks
        assert result.returncode == 3 and b"ONNX Runtime is not on this host" in result.stderr


def test_oldest_onnxruntime(sdk: Sdk, digits: Path) -> None:
    old = os.environ.get("VIMDEPLOY_ORT_OLD")
    found = sorted(Path(old).glob("onnxruntime/capi/libonnxruntime.so*")) if old else []
    if not found:
        pytest.skip("no ONNX Runtime 1.21 beside the newest: `make setup` installs it")
    output = answer(sdk.check, "info", digits, VIMDEPLOY_ONNXRUNTIME=str(found[0])).decode()
    assert "runtime onnxruntime 1.21" in output
    want = predictions(answer(sdk.check, "classify", digits, 5, PHOTOS[0]))
    got = predictions(answer(sdk.check, "classify", digits, 5, PHOTOS[0], VIMDEPLOY_ONNXRUNTIME=str(found[0])))
    for one, other in zip(got, want, strict=True):
        assert one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-5)


def test_cuda_that_is_not_there_is_not_replaced_by_the_cpu(sdk: Sdk, digits: Path) -> None:
    result = start(sdk.check, "info", digits, OPEN_DEVICE="cuda")
    if result.returncode == 0:
        assert b" CUDA, " in result.stdout
    else:
        assert result.returncode == 3 and b"cannot use CUDA device 0" in result.stderr


# ---- plans, as far as a host without a GPU goes


def write_plan(folder: Path, major: int = 10, **changes: object) -> Path:
    """Bytes that are no plan, and a sidecar that vouches for them."""
    plan = folder / "model.plan"
    plan.write_bytes(b"no plan" * 100)
    sidecar = {
        "format": 1,
        "plan": {"file": plan.name, "sha256": hashlib.sha256(plan.read_bytes()).hexdigest(), "bytes": 700},
        "runtime": {"name": "tensorrt", "version": f"{major}.5.3.1"},
        "device": {"name": "NVIDIA H100", "sm": 90, "driver": "580"},
        "plugin": {"file": "libvimdeploy_trt.so", "sha256": "0" * 64},
        "version_compatible": False,
        "model": tiny_info().to_props(),
    }
    (folder / "model.plan.json").write_text(json.dumps(sidecar | changes))
    return plan


@pytest.fixture(scope="session")
def served(sdk: Sdk, digits: Path) -> int:
    """The major version of TensorRT that the SDK was built for."""
    match = re.search(rb"TensorRT (\d+) \(built with", answer(sdk.check, "info", digits))
    if match is None:
        pytest.skip("the SDK was built without TensorRT: its headers or CUDA's are not on this host")
    return int(match[1])


def test_plans_that_are_refused(sdk: Sdk, served: int, tmp_path: Path) -> None:
    check = functools.partial(refused, sdk.check, "info", code=2)
    write = functools.partial(write_plan, tmp_path, served)
    plan = write()
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "SHA-256 differs" in check(plan)
    assert "format 2" in check(write(format=2))
    assert "engine for tensorrt-rtx" in check(write(runtime={"name": "tensorrt-rtx", "version": "1.0"}))
    assert 'model.plan.json is damaged (no "sm")' in check(write(device={}))
    plan = write()
    (tmp_path / "model.plan.json").write_text("{")
    assert "model.plan.json is damaged" in check(plan)
    (tmp_path / "model.plan.json").unlink()
    assert "has no model.plan.json beside it" in check(plan)


def test_tensorrt_that_is_not_there_or_another(sdk: Sdk, served: int, tmp_path: Path) -> None:
    check = functools.partial(refused, sdk.check, "info", code=3)
    text = check(write_plan(tmp_path, served), VIMDEPLOY_TENSORRT=str(tmp_path / "none.so"))
    assert "VIMDEPLOY_TENSORRT names" in text
    assert "is not TensorRT" in check(write_plan(tmp_path, served), OPEN_RUNTIME="libc.so.6")
    text = check(write_plan(tmp_path, served + 1))
    assert f"built by TensorRT {served + 1}.5.3.1; this library serves TensorRT {served}" in text


def test_classify_trt_says_what_is_missing(sdk: Sdk, tmp_path: Path) -> None:
    """Whatever the SDK was built with: no host of this test has TensorRT 99."""
    result = start(sdk.classify_trt, PHOTOS[0], write_plan(tmp_path, 99))
    assert result.returncode == 3 and b"TensorRT" in result.stderr


@pytest.mark.parametrize("major", ["8", "10", "11"])
def test_tensorrt_backend_compiles(major: str) -> None:
    found, cuda = tensorrt_headers(), cuda_headers()
    headers = next((folder for version, folder in found.items() if version.split(".")[0] == major), None)
    if headers is None:
        pytest.skip(f"no headers of TensorRT {major}: TENSORRT_ROOT, TENSORRT8_ROOT, the kernel-lens package")
    if cuda is None:
        pytest.skip("no cuda_runtime_api.h: CUDA_HOME, /usr/local/cuda")
    source = ROOT / "sdk" / "src" / "tensorrt_backend.cc"
    shell(COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT}/sdk/include",
          "-isystem", headers, "-isystem", cuda / "include", source)  # fmt: skip


# ---- parts that the header does not show


@pytest.fixture(scope="session")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    program = tmp_path_factory.mktemp("units") / "sdk_units"
    sources = [ROOT / "sdk" / "src" / name for name in ("json.cc", "sha256.cc", "element.cc")]
    shell(COMPILER, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
          "-fno-sanitize-recover=all", ROOT / "tests" / "cpp" / "sdk_units.cc", *sources, "-o", program)  # fmt: skip
    return program


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 1 << 20, (1 << 20) + 3])
def test_sha256(units: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(np.random.default_rng(size).bytes(size))
    digest = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert answer(units, "sha256", tmp_path / "file").decode().strip() == digest


def flat(value: object) -> list[str]:
    if isinstance(value, dict):
        return [line for key, item in value.items() for line in (f"key {key}", *flat(item))]
    if isinstance(value, list):
        return [line for item in value for line in flat(item)]
    if isinstance(value, str):
        return [f"string {value}"]
    return [f"number {float(value)!r}"] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


GOOD = ["{}", "[]", " [1, 2.5e-3 , -0, 1E+2]\n", '{"a": {"b": [null, true, false]}}',
        '"\\u00e4\\ud83d\\ude42\\t\\"\\/"',
        '{"ä🙂": "ß"}', "[0.1, 1e308, -1.7976931348623157e308]"]  # fmt: skip
BAD = ["", "{", "[1,]", "{'a': 1}", "01", "+1", "1.", ".5", "1e", "NaN", '"\\x"', '"\\ud83d"', '"\n"', '"abc', "[1] 2",
       '{"a" 1}', "nul", "[" * 100 + "]" * 100, "1e999", '"\\u12g4"']  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_json_is_read_as_python_reads_it(units: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    lines = answer(units, "json", tmp_path / "x.json").decode().splitlines()
    for got, want in zip(lines, flat(json.loads(text)), strict=True):
        if want.startswith("number "):
            assert float(got.removeprefix("number ")) == float(want.removeprefix("number "))
        else:
            assert got == want


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_json_is_refused(units: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    result = start(units, "json", tmp_path / "x.json")
    assert result.returncode == 1 and b"refused: not JSON at byte" in result.stdout


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_conversions_are_numpys(units: Path, kind: str) -> None:
    import ml_dtypes

    narrow = np.dtype(np.float16 if kind == "half" else ml_dtypes.bfloat16)

    def through(command: str, values: np.ndarray) -> bytes:
        return subprocess.run([units, command, kind], input=values.tobytes(), capture_output=True, check=True).stdout

    every = np.arange(65536, dtype=np.uint16)
    wide = np.frombuffer(through("widen", every), np.float32)
    np.testing.assert_array_equal(wide, every.view(narrow).astype(np.float32))
    # Each value, its neighbours, the halfway points between two, and any bits at all.
    noise = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    finite = np.sort(wide[np.isfinite(wide)]).astype(np.float64)
    halfway = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    above = np.nextafter(halfway, np.float32(np.inf))
    values = np.concatenate([noise, wide, halfway, above, np.array([65504, 65519.996, 65520], np.float32)])
    with np.errstate(all="ignore"):
        want = values.astype(narrow)
    got = np.frombuffer(through("narrow", values), np.uint16).view(narrow)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(got[number].view(np.uint16), want[number].view(np.uint16))
    assert np.isnan(got[~number].astype(np.float32)).all()
