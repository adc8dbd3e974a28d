"""Fetch the C++ headers of ONNX Runtime into a folder: prints that folder's include folder, and its steps on stderr.

1. Debian and Ubuntu: libonnxruntime-dev from this release of the distribution or one of the next two, by an apt
   configuration of its own derived from the host's sources. Nothing is installed, nothing of the host's apt is
   changed, no root is needed, and the host's keys verify what comes.
2. Linux on x86-64 and 64-bit Arm: the official release archive, checked against its SHA-256.

A folder that has the headers already is left as it is. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

PACKAGE = "libonnxruntime-dev"
HEADER = "onnxruntime_cxx_api.h"
RELEASE = "1.21.0"
ARCHIVES = {  # platform.machine(): (name, SHA-256)
    "x86_64": (
        f"onnxruntime-linux-x64-{RELEASE}",
        "7485c7e7aac6501b27e353dcbe068e45c61ab51fbaf598d13970dfae669d20bf",
    ),
    "aarch64": (
        f"onnxruntime-linux-aarch64-{RELEASE}",
        "4508084bde1232ee1ab4b6fad2155be0ea2ccab1c1aae9910ddb3fb68a60805e",
    ),
}
# For hosts without distro-info-data.
CODENAMES = {
    "debian": ["bullseye", "bookworm", "trixie", "forky", "duke"],
    "ubuntu": ["jammy", "noble", "plucky", "questing", "resolute"],
}


class StepFailed(Exception):
    """This way to the headers is closed; the message says why."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def api_version(include: Path) -> int:
    """The API version of the headers in a folder; 0 when they are not all there."""
    if not (include / HEADER).is_file():
        return 0
    match = re.search(r"^#define ORT_API_VERSION +(\d+)", (include / "onnxruntime_c_api.h").read_text(), re.MULTILINE)
    return int(match.group(1)) if match else 0


def find_include(root: Path, wanted: int) -> Path:
    for header in sorted(root.rglob(HEADER)):
        if api_version(header.parent) >= wanted:
            return header.parent
        raise StepFailed(f"API version {api_version(header.parent)} is older than {wanted}")
    raise StepFailed(f"no {HEADER} in what came")


def os_release() -> dict[str, str]:
    for file in (Path("/etc/os-release"), Path("/usr/lib/os-release")):
        if file.is_file():
            pairs = (line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
            return {key: value.strip("\"'") for key, value in pairs}
    return {}


def releases_from(distribution: str, codename: str) -> list[str]:
    """The host's release and the two after it."""
    table = Path(f"/usr/share/distro-info/{distribution}.csv")
    names = CODENAMES[distribution]
    if table.is_file():
        with table.open(newline="") as lines:
            names = [row["series"] for row in csv.DictReader(lines) if row["version"]]
    if codename not in names:
        raise StepFailed(f"{codename} is not a release of {distribution} known here")
    start = names.index(codename)
    return names[start : start + 3]


def sources_for(codename: str, target: str, etc: Path = Path("/etc/apt")) -> dict[str, str]:
    """The host's sources of its own release, with the codename replaced: file name → text.

    Only entries whose suite is the codename itself: third parties name theirs otherwise, and rarely have the next one.
    """
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    found = {}
    for file in (file for file in files if file.is_file()):
        text = file.read_text(errors="replace")
        if file.suffix == ".list":
            entries = [line for line in text.splitlines() if re.match(rf"deb\s+(\[.*?\]\s+)?\S+\s+{codename}\s", line)]
            kept = [re.sub(rf"(\s){codename}(\s)", rf"\g<1>{target}\g<2>", line) for line in entries]
            separator = "\n"
        elif file.suffix == ".sources":
            stanzas = [
                s for s in re.split(r"\n\s*\n", text) if re.search(rf"^Suites:.*\b{codename}(\s|$)", s, re.MULTILINE)
            ]
            kept = [re.sub(r"^Suites:.*$", f"Suites: {target}", stanza, flags=re.MULTILINE) for stanza in stanzas]
            separator = "\n\n"
        else:
            continue
        if kept:
            found[file.name] = separator.join(kept) + "\n"
    return found


def run_apt(arguments: list[str], options: list[str], folder: Path) -> None:
    result = subprocess.run(
        ["apt-get", "-q", *options, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    if result.returncode != 0:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.startswith("E:")]
        raise StepFailed(f"apt-get {arguments[0]} failed: {lines[0] if lines else result.returncode}")


def fetch_package(sources: dict[str, str], work: Path, destination: Path) -> None:
    for name in ("state/lists/partial", "cache/archives/partial", "sources", "download"):
        (work / name).mkdir(parents=True)
    for name, text in sources.items():
        (work / "sources" / name).write_text(text)
    settings = {
        "Dir::State": work / "state",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": work / "sources",
        "APT::Sandbox::User": "root",  # apt's own user cannot write here; without root this changes nothing
        "APT::Get::List-Cleanup": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "20",
        "Acquire::https::Timeout": "20",
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    try:
        run_apt(["update"], options, work)
    except StepFailed as failure:
        say(f"  {failure} (going on with the lists that came)")
    run_apt(["download", PACKAGE], options, work / "download")
    for archive in (work / "download").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(destination)], check=True, capture_output=True)
        say(f"  {archive.name}")


def from_distribution(destination: Path, wanted: int) -> Path:
    release = os_release()
    distribution, codename = release.get("ID", ""), release.get("VERSION_CODENAME", "")
    if distribution not in CODENAMES:
        raise StepFailed(f"this host is {distribution or 'of no known distribution'}, neither Debian nor Ubuntu")
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise StepFailed(f"no {tool}")
    for target in releases_from(distribution, codename):
        say(f"{PACKAGE} from {distribution} {target}")
        sources = sources_for(codename, target)
        if not sources:
            raise StepFailed(f"no source of {codename} in this host's apt configuration")
        with tempfile.TemporaryDirectory(dir=destination.parent) as work:
            unpacked = Path(work) / "unpacked"
            try:
                fetch_package(sources, Path(work), unpacked)
                find_include(unpacked, wanted)
            except (StepFailed, subprocess.SubprocessError) as failure:
                say(f"  {failure}")
                continue
            os.replace(unpacked, destination)
        return find_include(destination, wanted)
    raise StepFailed(f"no release offers a usable {PACKAGE}")


def from_release_archive(destination: Path, wanted: int) -> Path:
    if platform.system() != "Linux" or platform.machine() not in ARCHIVES:
        raise StepFailed(f"no archive known for {platform.system()} on {platform.machine()}")
    name, sha256 = ARCHIVES[platform.machine()]
    url = f"https://github.com/microsoft/onnxruntime/releases/download/v{RELEASE}/{name}.tgz"
    say(f"official release {name}.tgz")
    with tempfile.TemporaryDirectory(dir=destination.parent) as work:
        archive = Path(work) / "archive.tgz"
        try:
            with urllib.request.urlopen(url, timeout=30) as response, archive.open("wb") as file:
                shutil.copyfileobj(response, file)
        except OSError as failure:
            raise StepFailed(f"download failed: {failure}") from failure
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != sha256:
            raise StepFailed(f"SHA-256 is {digest}, not {sha256}: not used")
        unpacked = Path(work) / "unpacked"
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if member.isfile() and path.parent == Path(name, "include"):
                    data = tar.extractfile(member)
                    assert data is not None
                    (unpacked / path.name).write_bytes(data.read())
        os.replace(unpacked, destination)
    return find_include(destination, wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path)
    parser.add_argument("--api-version", type=int, default=21)
    arguments = parser.parse_args()
    destination = arguments.destination.absolute()

    if destination.exists():
        try:
            print(find_include(destination, arguments.api_version))
            say("fetched earlier")
            return 0
        except StepFailed:
            shutil.rmtree(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    for step in (from_distribution, from_release_archive):
        try:
            print(step(destination, arguments.api_version))
            return 0
        except StepFailed as failure:
            say(f"  {failure}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
