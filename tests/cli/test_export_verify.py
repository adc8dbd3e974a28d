"""`vimdeploy export` and `vimdeploy verify parity` as a user meets them: what works, and every refusal."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from official import SMALL, SMALL_NAME, official_content, random_model, write_small

import vimdeploy
from vimdeploy.bundle import read_info, read_manifest
from vimdeploy.cli.main import COMMANDS, cli
from vimdeploy.runtimes import library

SETTINGS = "stride=8,cls=middle,divide=yes,img_size=32"
PACKAGE = Path(vimdeploy.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_a_folder_with_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # These tests are about the commands, so all hosts compare the same runtime; tests/verify has the library.
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "_folders", lambda: iter([tmp_path / "no_lib"]))
    write_small(Path("ckpt.pth"), optimizer=False)


def call(*args: object) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def listing(folder: str = ".") -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


def refused(*args: object, code: int = 2) -> str:
    """The one error of a refused command, with its next step, on stderr; nothing on stdout, no file touched."""
    before = {name: Path(name).stat().st_mtime_ns for name in listing() if Path(name).is_file()}
    folders = listing()
    result = call(*args)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("Error: ") == 1
    assert "Try: " in result.stderr and "Traceback" not in result.output and result.stdout == ""
    assert listing() == folders, "something was left behind"
    assert {name: Path(name).stat().st_mtime_ns for name in before} == before
    return result.stderr


def python(code: str, *args: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs `code` with these arguments."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *(str(arg) for arg in args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


RUN = "from vimdeploy.cli.main import main; main()"


def without(*modules: str) -> str:
    """Code that runs vimdeploy where these modules are not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r})); {RUN}"


# What works.


def test_the_two_commands_of_the_mission_in_an_empty_folder() -> None:
    exported = python(RUN, "export", "ckpt.pth")
    assert exported.returncode == 0, exported.stderr
    assert exported.stderr == "", "no progress and no warnings off a terminal"
    for words in (SMALL_NAME, "images (batch, 3, 32, 32) fp32, 17 tokens", "opset 18, fp32, fusion full",
                  "2 vim::BiSelectiveScan, 2 vim::BiCausalConv1d, 2 vim::AddRMSNorm", "pass",
                  "Wrote ckpt.vim. Next:", "  vimdeploy verify parity\n"):  # fmt: skip
        assert words in exported.stdout, words
    made = ["manifest.json", "model.onnx", "report.json"]
    assert listing() == ["ckpt.pth", "ckpt.vim", *(f"ckpt.vim/{name}" for name in made)]
    verified = python(RUN, "verify", "parity")
    assert verified.returncode == 0, verified.stderr
    assert verified.stderr == "" and "pass" in verified.stdout and "FAIL" not in verified.stdout


def test_the_commands_that_come_next_can_be_pasted() -> None:
    """Whatever the path: spaces, brackets that rich would take for markup, and longer than a line."""
    folder = Path("it's [bold] in here") / ("a" * 100)
    folder.mkdir(parents=True)
    shutil.copy("ckpt.pth", folder / "my model.pth")
    result = call("export", str(folder / "my model.pth"), "-o", str(folder / "my model.vim"), "--no-verify")
    assert result.exit_code == 0
    commands = [shlex.split(line) for line in result.stdout.split("Next:\n")[1].splitlines()]
    assert [words[:2] for words in commands] == [["vimdeploy", name] for name in ("verify", "run", "eval")]
    assert commands[0][3:] == [str(folder / "my model.pth"), str(folder / "my model.vim")]
    assert all(Path(words[2]) == folder / "my model.vim" for words in commands[1:])


def test_export_json_is_all_of_stdout() -> None:
    result = call("export", "ckpt.pth", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert (report["path"], report["model"]) == ("ckpt.vim", "ckpt.vim/model.onnx")
    assert report["variant"] == SMALL_NAME and report["config"] == SMALL.to_dict()
    assert (report["precision"], report["opset"], report["fusion"]) == ("fp32", 18, "full")
    assert report["ops"] == {"BiSelectiveScan": 2, "BiCausalConv1d": 2, "AddRMSNorm": 2}
    assert report["file_bytes"] == Path("ckpt.vim/model.onnx").stat().st_size > report["weight_bytes"]
    assert report["parity"]["passed"] and len(report["parity"]["rows"]) == 2
    kept = json.loads(Path("ckpt.vim/report.json").read_text())
    assert kept["passed"] and kept["artifact"] == "ckpt.vim", "the report names the folder, not a scratch one"


def test_verify_json_is_all_of_stdout() -> None:
    call("export", "ckpt.pth", "--no-verify")
    result = call("verify", "parity", "--json", "--samples", 2)
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and result.stderr == "" and report["passed"]
    assert {row["images"] for row in report["rows"]} == {"random", "real"}
    assert all(row["errors"]["n"] == 2 for row in report["rows"])


def test_no_verify_says_so_and_json_has_no_parity() -> None:
    result = call("export", "ckpt.pth", "--no-verify")
    assert "Not verified" in result.stdout and not Path("ckpt.vim/report.json").exists()
    assert json.loads(call("export", "ckpt.pth", "--no-verify", "--json").stdout)["parity"] is None


def test_to_a_file() -> None:
    result = call("export", "ckpt.pth", "-o", "out/model.onnx")
    assert result.exit_code == 0, result.output
    assert listing() == ["ckpt.pth", "out", "out/model.onnx"]
    assert "vimdeploy verify parity ckpt.pth out/model.onnx" in result.stdout
    assert call("verify", "parity", "ckpt.pth", "out/model.onnx", "--samples", 1).exit_code == 0
    assert call("verify", "parity", "out/model.onnx", "ckpt.pth", "--samples", 1).exit_code == 0
    assert "name the checkpoint first" in refused("verify", "parity", "out/model.onnx")


@pytest.mark.parametrize("out", ["other.vim", "deep/er/other.vim", "plain-name", "trailing.vim/"])
def test_to_a_folder(out: str) -> None:
    result = call("export", "ckpt.pth", "-o", out, "--no-verify")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in Path(out).iterdir()) == ["manifest.json", "model.onnx"]
    assert call("verify", "parity", out, "--samples", 1).exit_code == 0
    source = read_manifest(Path(out) / "model.onnx")["checkpoint"]["path"]
    assert not os.path.isabs(source), "a folder that can be moved together with its checkpoint"


def test_into_an_empty_folder_and_over_an_earlier_export() -> None:
    Path("mine").mkdir()
    for _ in range(2):
        assert call("export", "ckpt.pth", "-o", "mine", "--no-verify").exit_code == 0
    assert listing("mine") == ["manifest.json", "model.onnx"]


@pytest.mark.parametrize(
    "options,says",
    [
        (["--precision", "fp16"], {"precision": "fp16"}),
        (["--precision", "bf16"], {"precision": "bf16"}),
        (["--output", "features"], {"output": "features"}),
        (["--output", "tokens"], {"output": "tokens"}),
        (["--weights", "ema"], {"weights": "ema"}),
        (["--fallback", "linear-attention"], {"fallback": "linear-attention"}),
        (["--fusion", "none"], {"fusion": "none"}),
        (["--fusion", "bidirectional"], {"fusion": "bidirectional"}),
        (["--img-size", "40x48"], {"trained_size": (32, 32)}),
        (["--img-size", "64", "--pos-embed-mode", "repo"], {"pos_embed_mode": "repo"}),
        (["--static-batch", "2"], {}),
        (["--opset", "16"], {}),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_options_export_and_verify_without_being_named_again(options: list[str], says: dict[str, object]) -> None:
    result = call("export", "ckpt.pth", *options)
    assert result.exit_code == 0, result.output
    info = read_info(Path("ckpt.vim/model.onnx"))
    assert {name: getattr(info, name) for name in says} == says
    verified = call("verify", "parity")
    assert verified.exit_code == 0, verified.output


def test_labels_and_images() -> None:
    Path("labels.txt").write_text("ant\nbee\n\n cat \ndog\nÖ\n", encoding="utf-8")
    Path("photos").mkdir()
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 30, 90)).save("photos/a.png")
    result = call("export", "ckpt.pth", "--labels", "labels.txt", "--images", "photos", "--json")
    assert read_info(Path("ckpt.vim/model.onnx")).labels == ("ant", "bee", "cat", "dog", "Ö")
    rows = json.loads(result.stdout)["parity"]["rows"]
    assert {row["images"]: row["errors"]["n"] for row in rows} == {"random": 4, "real": 1}


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("verify", "parity")], ids=" ".join)
def test_help(command: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        result = call(*command, flag)
        assert result.exit_code == 0 and result.stdout.startswith("Usage: ") and result.stderr == ""
    assert flag and "\b" not in result.stdout


def test_help_and_version_need_no_torch_and_no_runtime() -> None:
    code = without("torch", "onnxruntime", "safetensors", "tensorrt")
    for args in (["--help"], ["export", "--help"], ["verify", "parity", "--help"]):
        result = python(code, *args)
        assert result.returncode == 0 and "Usage: " in result.stdout, result.stderr
    version = python(code, "--version")
    assert version.returncode == 0 and vimdeploy.__version__ in version.stdout


# Checkpoints that cannot be exported.


def bare(weights: dict[str, torch.Tensor] | None = None, path: str = "bare.pth") -> str:
    torch.save(weights or dict(random_model(SMALL).state_dict()), path)
    return path


def deit() -> dict[str, torch.Tensor]:
    shapes = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "patch_embed.proj.weight": (32, 3, 8, 8),
              "patch_embed.proj.bias": (32,), "blocks.0.norm1.weight": (32,), "blocks.0.attn.qkv.weight": (96, 32),
              "blocks.0.attn.proj.weight": (32, 32), "blocks.0.mlp.fc1.weight": (128, 32), "norm.weight": (32,),
              "head.weight": (5, 32), "head.bias": (5,)}  # fmt: skip
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def broken(case: str) -> Path:
    path = Path("bad.pth")
    state = dict(random_model(SMALL).state_dict())
    if case == "truncated":
        path.write_bytes(Path("ckpt.pth").read_bytes()[:20_000])
    elif case == "empty":
        path.touch()
    elif case == "text":
        path.write_text("these are not the weights")
    elif case == "zip":
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif case == "payload":

        class Payload:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
                return os.system, ("touch owned",)

        torch.save({"model": state, "extra": Payload()}, path)
    elif case == "deit":
        torch.save({"model": deit()}, path)
    elif case == "nan":
        content = official_content(SMALL, SMALL_NAME, ema=False)
        content["model"]["layers.1.mixer.D"][3] = float("nan")
        torch.save(content, path)
    elif case == "shape":
        content = official_content(SMALL, SMALL_NAME, ema=False)
        content["model"]["layers.1.mixer.D_b"] = torch.ones(63)
        torch.save(content, path)
    elif case == "a tensor missing":
        content = official_content(SMALL, SMALL_NAME, ema=False)
        del content["model"]["layers.1.mixer.x_proj_b.weight"]
        torch.save(content, path)
    elif case == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "case,words",
    [
        ("missing", "bad.pth does not exist"),
        ("folder", "is a folder"),
        ("empty", "is empty"),
        ("text", "neither a PyTorch checkpoint nor"),
        ("truncated", "truncated or damaged"),
        ("zip", "not a PyTorch checkpoint"),
        ("payload", "could run any code"),
        ("deit", "bad.pth"),
        ("nan", "layers.1.mixer.D holds NaN"),
        ("shape", "layers.1.mixer.D_b"),
        ("a tensor missing", "layers.1.mixer.x_proj_b.weight"),
    ],
)
def test_a_bad_checkpoint_is_refused(case: str, words: str) -> None:
    broken(case)
    assert words in refused("export", "bad.pth", "--no-verify")
    assert not Path("owned").exists()


def test_a_bad_checkpoint_is_refused_by_the_real_command_too() -> None:
    broken("truncated")
    before = listing()
    result = python(RUN, "export", "bad.pth")
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: bad.pth is truncated") and "Try: " in result.stderr
    assert listing() == before


def test_deit_is_told_apart() -> None:
    broken("deit")
    assert "Vision Mamba" in refused("export", "bad.pth")


def test_weights_that_are_not_there() -> None:
    write_small(Path("ckpt.pth"), ema=False, optimizer=False)
    assert "no 'ema' weights" in refused("export", "ckpt.pth", "--weights", "ema")


def test_an_ambiguous_state_dict_stops_then_works_with_variant_and_verify_needs_none() -> None:
    bare()
    message = refused("export", "bare.pth", "--no-verify")
    assert "--variant" in message and "stride=8" in message
    result = call("export", "bare.pth", "--variant", SETTINGS)
    assert result.exit_code == 0, result.output
    assert read_info(Path("bare.vim/model.onnx")).config == SMALL
    assert call("verify", "parity").exit_code == 0


@pytest.mark.parametrize(
    "variant,words",
    [
        ("small", "d_model 384"),
        ("stride=4", "stride"),
        ("cls=head", "cls_position"),
        ("divide=no", "divide_out"),
        ("bimamba=v1", "bimamba"),
        ("nonsense", "no Vision Mamba is called 'nonsense'"),
        ("stride=big", "takes a number"),
        ("colour=red", "no setting is called 'colour'"),
    ],
)
def test_a_variant_that_contradicts_the_file_is_refused(variant: str, words: str) -> None:
    assert words in refused("export", "ckpt.pth", "--variant", variant)


@pytest.mark.parametrize(
    "size,words",
    [
        ("4", "smaller than a patch (8 px)"),
        ("32x4", "smaller than a patch"),
        ("36", "does not fit patches of 8 px every 8 px"),
        ("40x33", "does not fit"),
        ("0", "not an image size"),
        ("-32", "not an image size"),
        ("32x32x32", "not an image size"),
        ("large", "not an image size"),
    ],
)
def test_an_image_size_that_does_not_fit_is_refused(size: str, words: str) -> None:
    assert words in refused("export", "ckpt.pth", f"--img-size={size}")


# Options that cannot be.


@pytest.mark.parametrize(
    "options,words",
    [
        (["--opset", "15"], "opset 15 cannot be written"),
        (["--opset", "99"], "choose 16 to"),
        (["--static-batch", "0"], "a static batch is at least 1"),
        (["--precision", "bf16", "--opset", "18"], "bf16 needs opset 22"),
        (["--labels", "gone.txt"], "gone.txt is not a file"),
        (["--images", "gone"], "gone does not exist"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_options_that_cannot_be_are_refused(options: list[str], words: str) -> None:
    assert words in refused("export", "ckpt.pth", *options)


def test_labels_that_cannot_be_are_refused() -> None:
    Path("two.txt").write_text("ant\nbee\n")
    assert "2 labels for 5 classes" in refused("export", "ckpt.pth", "--labels", "two.txt")
    Path("latin.txt").write_bytes("Öl\n".encode("latin-1"))
    assert "not UTF-8" in refused("export", "ckpt.pth", "--labels", "latin.txt")


def test_images_that_are_none_are_refused_and_nothing_is_left() -> None:
    Path("photos").mkdir()
    assert "no images in photos" in refused("export", "ckpt.pth", "--images", "photos")
    Path("photos/a.jpg").write_bytes(b"\xff\xd8 broken")
    assert "photos/a.jpg" in refused("export", "ckpt.pth", "--images", "photos")


def test_choices_are_clicks_own() -> None:
    for option in ("--precision", "--weights", "--fallback", "--output", "--pos-embed-mode"):
        result = call("export", "ckpt.pth", option, "nonsense")
        assert result.exit_code == 2 and "Invalid value" in result.stderr
    assert listing() == ["ckpt.pth"]


# Places that cannot be written to.


@pytest.mark.parametrize("name", ["x.vim", "deep/x.vim", "x.onnx"])
def test_a_place_below_a_file_is_refused(name: str) -> None:
    Path("file").write_text("in the way")
    message = refused("export", "ckpt.pth", "--no-verify", "-o", f"file/{name}")
    assert "file" in message and "a file stands where a folder would have to be" in message
    assert Path("file").read_text() == "in the way"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc on this host")
@pytest.mark.parametrize("name", ["x.vim", "x.onnx"])
def test_a_file_system_that_takes_no_files_is_refused(name: str) -> None:
    assert f"/proc/{name}: " in refused("export", "ckpt.pth", "--no-verify", "-o", f"/proc/{name}")


@pytest.mark.parametrize(
    "number,hint",
    [(errno.EACCES, "change the permissions"), (errno.EROFS, "a folder you may write to"),
     (errno.EPERM, "change the permissions"), (errno.ENOSPC, "free some space"), (errno.EIO, "check that the path")],
    ids=lambda v: errno.errorcode[v] if isinstance(v, int) else "",
)  # fmt: skip
@pytest.mark.parametrize("out", ["ckpt.vim", "new/x.onnx"])
def test_a_folder_that_may_not_be_written_is_refused(
    number: int, hint: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: tests may run as root, whom permissions do not stop."""

    def no(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), ".scratch")

    monkeypatch.setattr(tempfile, "mkdtemp", no)
    monkeypatch.setattr(tempfile, "mkstemp", no)
    message = refused("export", "ckpt.pth", "--no-verify", "-o", out)
    assert os.strerror(number) in message and hint in message


@pytest.mark.parametrize("out", ["ckpt.vim", "new/x.onnx"])
def test_a_full_disk_leaves_nothing(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        if path.suffix != ".onnx":
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    message = refused("export", "ckpt.pth", "-o", out)
    assert f"{out}: No space left on device" in message and "free some space" in message


def test_a_disk_that_fills_up_while_an_earlier_export_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("export", "ckpt.pth", "--no-verify").exit_code == 0
    content = Path("ckpt.vim/model.onnx").read_bytes()
    test_a_full_disk_leaves_nothing("ckpt.vim", monkeypatch)
    assert Path("ckpt.vim/model.onnx").read_bytes() == content


def test_a_file_size_limit_leaves_nothing() -> None:
    """A real EFBIG from the kernel, half-way through the file."""
    out, before = "ckpt.vim", listing()
    limit = 50_000
    assert Path("ckpt.pth").stat().st_size > 2 * limit
    result = python(
        RUN, "export", "ckpt.pth", "--no-verify", "-o", out,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"Error: {out}: File too large") and "ulimit" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert listing() == before


@pytest.mark.parametrize("inside", ["photo.jpg", "sub/model.onnx", "model.onnx"])
def test_a_folder_that_vimdeploy_did_not_make_is_not_replaced(inside: str) -> None:
    path = Path("mine") / inside
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    assert "did not make" in refused("export", "ckpt.pth", "-o", "mine")
    assert path.read_text() == "precious"


def test_a_default_name_is_not_replaced_either() -> None:
    Path("ckpt.vim").mkdir()
    Path("ckpt.vim/notes.txt").write_text("precious")
    assert "did not make" in refused("export", "ckpt.pth")


@pytest.mark.parametrize("name,words", [("kept", "is a file; an export is a folder"), ("dir.onnx", "is a folder")])
def test_a_name_of_the_other_kind_is_refused(name: str, words: str) -> None:
    Path("kept").write_text("precious")
    Path("dir.onnx").mkdir()
    assert words in refused("export", "ckpt.pth", "-o", name)


@pytest.mark.parametrize("out", [".", "..", "ckpt.pth"])
def test_places_that_would_swallow_the_checkpoint_are_refused(out: str) -> None:
    assert "Error: " in refused("export", "ckpt.pth", "-o", out)
    assert Path("ckpt.pth").is_file()


def test_the_current_folder_is_not_replaced_when_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    assert "current folder" in refused("export", "../ckpt.pth", "-o", ".", "--no-verify")


# Interrupts.


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_leaves_nothing() -> None:
    """While the scratch copy is there and being verified."""
    out = "deep/ckpt.vim"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN, "export", "ckpt.pth", "-o", out]
    parent = Path(out).parent
    # A suite that a shell started in the background inherits Ctrl-C ignored, and would hand that on.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 90
    while not (parent.is_dir() and [p for p in parent.iterdir() if p.name.startswith(f".{Path(out).name}.")]):
        assert process.poll() is None and time.monotonic() < until, "it never came to writing"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Interrupted; nothing was left half-written." in stderr and "Traceback" not in stderr and stdout == ""
    assert listing() == ["ckpt.pth"]


@pytest.mark.parametrize("out", ["ckpt.vim", "deep/x.onnx"])
@pytest.mark.parametrize(
    "stage",
    ["reading the checkpoint", "tracing the network", "writing the graph", "writing the file",
     "reference: loading"],
)  # fmt: skip
def test_ctrl_c_at_each_stage(stage: str, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from vimdeploy.cli import render

    @contextmanager
    def steps():  # type: ignore[no-untyped-def]
        def step(text: str) -> None:
            if text == stage:
                raise KeyboardInterrupt

        yield step

    monkeypatch.setattr(render, "steps", steps)
    result = call("export", "ckpt.pth", "-o", out)
    assert result.exit_code == 130 and "Interrupted" in result.stderr and result.stdout == ""
    assert listing() == ["ckpt.pth"]


# What is not installed.


def test_without_torch_export_and_verify_say_how_to_get_it() -> None:
    assert call("export", "ckpt.pth", "--no-verify").exit_code == 0
    before = listing()
    for args in (["export", "ckpt.pth", "-o", "more.vim"], ["verify", "parity"]):
        result = python(without("torch"), *args)
        assert result.returncode == 3 and result.stdout == "", result.stderr
        assert "needs torch, which is not installed" in result.stderr and "Traceback" not in result.stderr
        assert "pip install 'vimdeploy[torch]'" in result.stderr
    assert listing() == before


def test_without_onnxruntime_an_export_needs_no_verify() -> None:
    result = python(without("onnxruntime"), "export", "ckpt.pth")
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    assert "ONNX Runtime is not installed" in result.stderr and "pip install 'vimdeploy[onnxruntime]'" in result.stderr
    assert listing() == ["ckpt.pth"]
    result = python(without("onnxruntime"), "export", "ckpt.pth", "--no-verify")
    assert result.returncode == 0 and "Not verified" in result.stdout, result.stderr
    onnx.checker.check_model(onnx.load("ckpt.vim/model.onnx"))


# verify parity: which artifact, which checkpoint.


def test_verify_without_a_folder_says_how_to_make_one() -> None:
    assert "vimdeploy export CKPT" in refused("verify", "parity")


def test_verify_with_several_folders_lists_them() -> None:
    for name in ("a", "b"):
        call("export", "ckpt.pth", "-o", f"{name}.vim", "--no-verify")
    assert "a.vim, b.vim" in refused("verify", "parity")
    assert call("verify", "parity", "b.vim", "--samples", 1).exit_code == 0


def test_verify_when_the_checkpoint_is_gone() -> None:
    call("export", "ckpt.pth", "--no-verify")
    Path("ckpt.pth").rename("moved.pth")
    message = refused("verify", "parity")
    assert "ckpt.pth, is gone" in message and "name the checkpoint" in message
    assert call("verify", "parity", "moved.pth", "--samples", 1).exit_code == 0


def test_verify_follows_a_folder_moved_with_its_checkpoint() -> None:
    call("export", "ckpt.pth", "--no-verify")
    Path("elsewhere").mkdir()
    for name in ("ckpt.pth", "ckpt.vim"):
        Path(name).rename(f"elsewhere/{name}")
    assert call("verify", "parity", "elsewhere/ckpt.vim", "--samples", 1).exit_code == 0


@pytest.mark.parametrize(
    "args,words",
    [
        (["ckpt.pth", "ckpt.pth"], "cannot tell which"),
        (["a.vim", "b.vim"], "cannot tell which"),
        (["ckpt.pth", "gone.onnx"], "gone.onnx does not exist"),
        (["gone.pth", "ckpt.vim"], "gone.pth does not exist"),
        (["--runtime", "tensorflow"], "no runtime is called 'tensorflow'"),
        (["--images", "gone"], "gone does not exist"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_verify_refuses_what_it_cannot_compare(args: list[str], words: str) -> None:
    call("export", "ckpt.pth", "--no-verify")
    assert words in refused("verify", "parity", *args)


@pytest.mark.parametrize("damage", ["model missing", "manifest damaged", "manifest a list", "model truncated"])
def test_verify_refuses_a_damaged_folder(damage: str) -> None:
    call("export", "ckpt.pth", "--no-verify")
    model, manifest = Path("ckpt.vim/model.onnx"), Path("ckpt.vim/manifest.json")
    if damage == "model missing":
        model.unlink()
    elif damage == "manifest damaged":
        manifest.write_text("{")
    elif damage == "manifest a list":
        manifest.write_text("[]")
    else:
        model.write_bytes(model.read_bytes()[:1000])
    refused("verify", "parity")


def test_a_failed_check_exits_1_and_says_that_nothing_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from vimdeploy.export import functions

    scan = functions._SCAN
    monkeypatch.setattr(
        functions, "_SCAN", tuple(line.replace("Exp (exponent)", "Sigmoid (exponent)") for line in scan)
    )
    message = refused("export", "ckpt.pth", code=1)
    assert "does not match the PyTorch reference" in message and "Nothing was written" in message
    assert "--no-verify" in message
    # kept on request, and then found by verify
    assert call("export", "ckpt.pth", "--no-verify").exit_code == 0
    result = call("verify", "parity")
    assert result.exit_code == 1 and "FAIL" in result.stdout and "Traceback" not in result.output
