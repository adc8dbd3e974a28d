"""`vimdeploy inspect` and `vimdeploy slim` as a user meets them."""

from __future__ import annotations

import json
import os
import resource
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from official import SMALL, SMALL_NAME, official_content, random_model, write_official, write_small

from vimdeploy.cli.main import cli
from vimdeploy.models.checkpoints import read_checkpoint
from vimdeploy.models.loading import load_model
from vimdeploy.models.variants import REGISTERED, registered_config

SETTINGS = "stride=8,cls=middle,divide=yes,img_size=32"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def refused(result: Result) -> str:
    """The message of a refusal: exit code 2, on stderr, with a next step, and no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    assert result.stderr.startswith("Error: ") and "Try: " in result.stderr and result.stdout == ""
    return result.stderr


def test_inspect_says_it_all() -> None:
    write_small(Path("ckpt.pth"))
    result = call("inspect", "ckpt.pth")
    assert result.exit_code == 0 and result.stderr == ""
    for words in (
        SMALL_NAME,
        f"args.model = {SMALL_NAME}",
        "17 = 4x4 patches; class token (middle) at index 8",
        "both ways, own convolution and projections each (bimamba v2), sum halved",
        "model: 41 tensors, ",
        "ema: 41 tensors, ",
        "float32",
        "epoch        299",
        "optimizer",
        "data_set=IMNET",
        "vimdeploy export ckpt.pth",
        "vimdeploy slim ckpt.pth -o ckpt.safetensors",
    ):
        assert words in result.stdout, words
    parameters = sum(tensor.numel() for tensor in random_model(SMALL).state_dict().values())
    assert f"parameters   {parameters:,}" in result.stdout
    assert "licence" not in result.stdout, "only published models carry the notice"


def test_inspect_json() -> None:
    write_small(Path("ckpt.pth"))
    result = call("inspect", "ckpt.pth", "--json")
    report = json.loads(result.stdout)
    assert report["variant"] == SMALL_NAME and report["config"] == SMALL.to_dict()
    assert (report["tokens"], report["grid"], report["cls_index"], report["epoch"]) == (17, [4, 4], [8], 299)
    assert report["weights"]["ema"]["dtypes"] == ["float32"] and report["weights"]["model"]["non_finite"] == []
    assert report["unknown"] == report["missing"] == report["choices"] == []
    assert {part["name"] for part in report["other"]} == {"optimizer", "lr_scheduler", "scaler"}


def test_inspect_prints_the_licence_notice_for_published_models() -> None:
    write_official(Path("tiny.pth"), registered_config("tiny"), REGISTERED[0], ema=False, optimizer=False)
    result = call("inspect", "tiny.pth")
    assert "parameters   7,148,008" in result.stdout and "(registered name)" in result.stdout
    assert "apache-2.0" in result.stdout and "Non-commercial" in result.stdout


def test_inspect_of_an_ambiguous_file_still_tells_what_it_can() -> None:
    torch.save(random_model(SMALL).state_dict(), "bare.pth")
    result = call("inspect", "bare.pth")
    assert result.exit_code == 0
    assert "ambiguous: " in result.stdout and "where the class token stands" in result.stdout
    assert "--variant stride=8,img_size=32,cls=middle,divide=yes\n" in result.stdout
    assert "d_model 32" in result.stdout and "tokens 17" in result.stdout
    report = json.loads(call("inspect", "bare.pth", "--json").stdout)
    assert report["variant"] is None and report["known"]["depth"] == 2
    for choice in report["choices"]:
        assert call("inspect", "bare.pth", "--variant", choice).exit_code == 0, choice
    chosen = call("inspect", "bare.pth", "--variant", SETTINGS)
    assert f"vimdeploy export bare.pth --variant {SETTINGS}" in chosen.stdout


def test_inspect_lists_missing_unknown_and_broken_tensors() -> None:
    content = official_content(SMALL, SMALL_NAME)
    del content["model"]["norm_f.weight"]
    content["model"]["extra"] = torch.zeros(2)
    content["model"]["head.bias"][0] = torch.nan
    torch.save(content, "x.pth")
    result = call("inspect", "x.pth")
    assert result.exit_code == 0
    assert "missing      1 tensors: norm_f.weight" in result.stdout
    assert "unknown      1 tensors: extra" in result.stdout
    assert "NaN or Inf in head.bias" in result.stdout


def test_the_next_command_can_be_pasted() -> None:
    write_small(Path("my model's.pth"))
    line = next(line for line in call("inspect", "my model's.pth").stdout.splitlines() if "vimdeploy slim" in line)
    words = shlex.split(line, comments=True)
    assert words[:2] == ["vimdeploy", "slim"] and call(*words[1:]).exit_code == 0
    assert Path("my model's.safetensors").exists()


def test_slim() -> None:
    write_small(Path("ckpt.pth"))
    result = call("slim", "ckpt.pth", "-o", "x.safetensors")
    assert result.exit_code == 0
    before, after = Path("ckpt.pth").stat().st_size, Path("x.safetensors").stat().st_size
    assert f"({1 - after / before:.0%} smaller)" in result.stdout
    assert load_model(Path("x.safetensors"))[1].config == SMALL
    again = call("inspect", "x.safetensors")
    assert "vimdeploy.config in the file's metadata" in again.stdout and "vimdeploy slim" not in again.stdout


def test_slim_ema_json_and_default_name() -> None:
    write_small(Path("ckpt.pth"))
    result = call("slim", "ckpt.pth", "--weights", "ema", "--json")
    report = json.loads(result.stdout)
    assert report["file"] == "ckpt.safetensors" and report["bytes_before"] > 2 * report["bytes_after"]
    ema = read_checkpoint("ckpt.pth").weights["ema"]["head.weight"]
    assert torch.equal(read_checkpoint("ckpt.safetensors").weights["model"]["head.weight"], ema)


@pytest.mark.parametrize("command", ["inspect", "slim"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pth", "does not exist"),
        ("text.pth", "is neither a PyTorch checkpoint nor"),
        ("cut.pth", "is truncated"),
    ],
)
def test_bad_files(command: str, name: str, message: str) -> None:
    Path("text.pth").write_text("hello\n")
    write_small(Path("cut.pth"))
    Path("cut.pth").write_bytes(Path("cut.pth").read_bytes()[:5000])
    assert message in refused(call(command, name))
    assert sorted(p.name for p in Path().iterdir()) == ["cut.pth", "text.pth"]


@pytest.mark.parametrize("command", ["inspect", "slim"])
def test_contradictions(command: str) -> None:
    write_small(Path("ckpt.pth"))
    assert "--variant tiny says d_model 192, but the tensors have 32" in refused(
        call(command, "ckpt.pth", "--variant", "tiny")
    )
    assert "no Vision Mamba is called 'giant'" in refused(call(command, "ckpt.pth", "--variant", "giant"))


def test_slim_of_an_ambiguous_file_stops_and_lists_the_choices() -> None:
    torch.save(random_model(SMALL).state_dict(), "bare.pth")
    message = refused(call("slim", "bare.pth", "-o", "x.safetensors"))
    assert "--variant stride=8,img_size=32,cls=middle,divide=yes" in message
    assert not Path("x.safetensors").exists()


def test_slim_refuses_its_own_input_and_folders() -> None:
    write_small(Path("ckpt.pth"))
    before = Path("ckpt.pth").read_bytes()
    assert "is the checkpoint itself" in refused(call("slim", "ckpt.pth", "-o", "ckpt.pth"))
    assert "is a folder" in refused(call("slim", "ckpt.pth", "-o", "."))
    assert Path("ckpt.pth").read_bytes() == before


@pytest.fixture
def nearly_full_disk() -> Iterator[None]:
    """No file may grow beyond 20 kB: a full disk, as far as a writer can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_slim_on_a_full_disk_leaves_nothing(request: pytest.FixtureRequest) -> None:
    write_small(Path("ckpt.pth"))
    Path("x.safetensors").write_bytes(b"the one before")
    request.getfixturevalue("nearly_full_disk")
    message = refused(call("slim", "ckpt.pth", "-o", "x.safetensors"))
    assert "x.safetensors: " in message and "free some space" in message
    assert sorted(p.name for p in Path().iterdir()) == ["ckpt.pth", "x.safetensors"]
    assert Path("x.safetensors").read_bytes() == b"the one before"


def test_slim_into_a_folder_one_may_not_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(Path("ckpt.pth"))
    Path("locked").mkdir(mode=0o555)
    if os.access("locked", os.W_OK):  # root may write anywhere: let the system refuse in its stead

        def refuse(**options: object) -> None:
            raise PermissionError(13, "Permission denied", "locked/x.safetensors")

        monkeypatch.setattr("vimdeploy.bundle.tempfile.mkstemp", refuse)
    message = refused(call("slim", "ckpt.pth", "-o", "locked/x.safetensors"))
    assert "Permission denied" in message and "choose a folder you may write to with -o" in message
    assert list(Path("locked").iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "slim"])
def test_help(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0 and f"vimdeploy {command} ckpt.pth" in result.stdout


# Exported files.


@pytest.mark.parametrize("fusion", ["none", "full"])
def test_inspect_says_which_operators_an_exported_file_has(fusion: str) -> None:
    write_small(Path("ckpt.pth"))
    assert call("export", "ckpt.pth", "--no-verify", "--fusion", fusion, "--precision", "fp16").exit_code == 0
    by_folder, by_file = call("inspect", "ckpt.vim"), call("inspect", "ckpt.vim/model.onnx")
    assert by_folder.exit_code == 0 and by_folder.stderr == "" and by_folder.stdout == by_file.stdout
    report = json.loads(call("inspect", "ckpt.vim", "--json").stdout)
    fused = {"BiSelectiveScan": 2, "BiCausalConv1d": 2, "AddRMSNorm": 2}
    assert report["ops"] == (fused if fusion == "full" else {"SelectiveScan": 4})
    assert report["functions"] == (["SelectiveScan", *fused] if fusion == "full" else ["SelectiveScan"])
    assert (report["fusion"], report["precision"], report["fallback"]) == (fusion, "fp16", "scan")
    assert report["variant"] == SMALL_NAME and report["input"] == {"name": "images", "shape": ["batch", 3, 32, 32]}
    assert report["bytes"] == Path("ckpt.vim/model.onnx").stat().st_size
    words = [SMALL_NAME, "images (batch, 3, 32, 32)", f"{report['nodes']} nodes, opset 18, fp16, fusion {fusion}",
             report["sha256"], report["checkpoint_sha256"], "vimdeploy verify parity ckpt.vim/model.onnx"]  # fmt: skip
    words += [f"{count} vim::{name}" for name, count in report["ops"].items()]
    for text in (*words, f"scan: bodies of vim::SelectiveScan{', vim::BiSelectiveScan' * (fusion == 'full')}"):
        assert text in by_folder.stdout, text


def test_inspect_of_a_file_without_bodies_says_that_it_needs_the_library() -> None:
    write_small(Path("ckpt.pth"))
    call("export", "ckpt.pth", "--no-verify", "--fallback", "none", "-o", "bare.onnx")
    assert "none: needs vimdeploy's library" in call("inspect", "bare.onnx").stdout


def test_inspect_refuses_what_is_no_exported_file() -> None:
    write_small(Path("ckpt.pth"))
    call("export", "ckpt.pth", "--no-verify")
    assert "says itself which model it is" in refused(call("inspect", "ckpt.vim", "--variant", "tiny"))
    assert "gone.vim does not exist" in refused(call("inspect", "gone.vim"))
    Path("empty.vim").mkdir()
    assert "holds no model.onnx" in refused(call("inspect", "empty.vim"))
    Path("text.onnx").write_text("not a model")
    assert "text.onnx is not an ONNX file" in refused(call("inspect", "text.onnx"))
