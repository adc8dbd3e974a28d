"""The CMake build: what it does on hosts that lack something, and where ONNX Runtime's headers come from."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from ort_library import ROOT

HEADERS = ("onnxruntime_c_api.h", "onnxruntime_cxx_api.h", "onnxruntime_cxx_inline.h", "onnxruntime_float16.h")

_spec = importlib.util.spec_from_file_location("fetch_headers", ROOT / "cmake" / "fetch_onnxruntime_headers.py")
fetch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fetch)


def configure(folder: Path, *arguments: str, check: bool = True, **environment: str) -> str:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    clean = {key: value for key, value in os.environ.items() if key not in ("ONNXRUNTIME_ROOT", "CXX")}
    result = subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, "-DVIMDEPLOY_FETCH_HEADERS=OFF", *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    log = result.stdout + result.stderr
    assert (result.returncode == 0) == check, log
    return " ".join(log.split())  # CMake breaks the lines of its warnings


def install(folder: Path) -> Path:
    subprocess.run(["cmake", "--install", folder, "--prefix", folder / "prefix"], check=True, capture_output=True)
    return folder / "prefix" / "vimdeploy" / "_lib"


def fake_headers(folder: Path, version: int) -> Path:
    folder.mkdir(parents=True)
    for header in HEADERS:
        (folder / header).write_text(f"#define ORT_API_VERSION {version}\n")
    return folder


def test_host_without_compiler_still_installs_and_says_what_is_missing(tmp_path):
    log = configure(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert "no C++ compiler was found" in log
    lib = install(tmp_path)
    assert [file.name for file in lib.iterdir()] == ["MISSING.txt"]
    text = (lib / "MISSING.txt").read_text()
    assert "libvimdeploy_ort.so" in text
    assert "no C++ compiler was found" in text
    assert "install vimdeploy again" in text


def no_system_headers(tmp_path: Path) -> list[str]:
    return [f"-DCMAKE_FIND_ROOT_PATH={tmp_path}", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY",
            "-DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=ONLY"]  # fmt: skip


def test_host_without_headers_still_installs_and_every_step_is_in_the_log(tmp_path):
    log = configure(tmp_path, *no_system_headers(tmp_path))
    for step in (
        "ONNXRUNTIME_ROOT: not set",
        "CMake package: not found",
        "system: not found",
        "fetch: VIMDEPLOY_FETCH_HEADERS is off",
    ):
        assert f"ONNX Runtime headers: {step}" in log
    assert "ONNXRUNTIME_ROOT" in (install(tmp_path) / "MISSING.txt").read_text()


@pytest.mark.parametrize("where", ["include", "include/onnxruntime", "include/onnxruntime/core/session", "."])
def test_root_is_looked_at_first_in_every_layout(tmp_path, where):
    fake_headers(tmp_path / "ort" / where, 23)
    log = configure(tmp_path / "build", ONNXRUNTIME_ROOT=str(tmp_path / "ort"))
    assert "ONNXRUNTIME_ROOT: API version 23" in log
    assert "CMake package" not in log


def test_root_without_headers_is_an_error_that_names_it(tmp_path):
    log = configure(tmp_path / "build", check=False, ONNXRUNTIME_ROOT=str(tmp_path / "nothing"))
    assert f"ONNXRUNTIME_ROOT is set to {tmp_path / 'nothing'}" in log


def test_root_with_older_headers_is_an_error_that_names_both_versions(tmp_path):
    fake_headers(tmp_path / "ort", 20)
    log = configure(tmp_path / "build", check=False, ONNXRUNTIME_ROOT=str(tmp_path / "ort"))
    assert "API version 20" in log
    assert "21 is needed" in log


DEB822 = """\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""


def test_sources_of_the_host_are_carried_to_the_next_release_and_those_of_others_are_not(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://mirror.example/old bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/bookworm-mirror bookworm main contrib\n"
        "deb http://mirror.example/debian bookworm-backports main\n"
        "deb-src http://mirror.example/debian bookworm main\n"
    )
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "other.list").write_text("deb http://other.example/apt nodistro main\n")
    (tmp_path / "sources.list.d" / "off.list.disabled").write_text("deb http://other.example/apt bookworm main\n")
    sources = fetch.sources_for("bookworm", "trixie", tmp_path)
    assert sources.keys() == {"sources.list", "debian.sources"}
    assert sources["sources.list"] == (
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/bookworm-mirror trixie main contrib\n"
    )
    assert "Suites: trixie\n" in sources["debian.sources"]
    assert "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg" in sources["debian.sources"]
    assert "security" not in sources["debian.sources"]


def test_own_release_comes_first_then_the_two_after_it(monkeypatch):
    monkeypatch.setattr(fetch.Path, "is_file", lambda self: False)
    assert fetch.releases_from("debian", "bookworm") == ["bookworm", "trixie", "forky"]
    with pytest.raises(fetch.StepFailed, match="buzz is not a release of debian"):
        fetch.releases_from("debian", "buzz")


def archive(name: str, version: int = 21) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        files = {f"{name}/include/{h}": f"#define ORT_API_VERSION {version}\n" for h in HEADERS}
        for path, text in (files | {f"{name}/include/../../../outside": "x", f"{name}/lib/lib.so": "x"}).items():
            member = tarfile.TarInfo(path)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def offer(monkeypatch, data: bytes, sha256: str) -> None:
    monkeypatch.setattr(fetch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(fetch.platform, "machine", lambda: "x86_64")
    monkeypatch.setitem(fetch.ARCHIVES, "x86_64", ("onnxruntime-x", sha256))
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(data))


def test_release_archive_gives_its_headers_and_nothing_else(monkeypatch, tmp_path):
    data = archive("onnxruntime-x")
    offer(monkeypatch, data, hashlib.sha256(data).hexdigest())
    assert fetch.from_release_archive(tmp_path / "headers", 21) == tmp_path / "headers"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["headers", *HEADERS])


def test_release_archive_of_another_hash_is_not_used(monkeypatch, tmp_path):
    offer(monkeypatch, archive("onnxruntime-x"), "0" * 64)
    with pytest.raises(fetch.StepFailed, match="not used"):
        fetch.from_release_archive(tmp_path / "headers", 21)
    assert list(tmp_path.iterdir()) == []


def test_older_release_archive_is_not_used(monkeypatch, tmp_path):
    data = archive("onnxruntime-x", version=20)
    offer(monkeypatch, data, hashlib.sha256(data).hexdigest())
    with pytest.raises(fetch.StepFailed, match="API version 20 is older than 21"):
        fetch.from_release_archive(tmp_path / "headers", 21)
