"""The images a model is calibrated on: a folder, or a set that calib/index.json names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vimdeploy
from vimdeploy.bundle import ModelInfo
from vimdeploy.errors import ImageError, UsageError
from vimdeploy.images import ImageFolder, is_image_name

if TYPE_CHECKING:
    import numpy as np

#: Names the folder of an index.json; without it, `calib` here, then `calib` beside the package (a source checkout).
ENVIRONMENT = "VIMDEPLOY_CALIB"
#: Fewer say too little: the largest activation of a layer then depends on which few they were.
FEWEST = 16
DEFAULT_LIMIT = 256


@dataclass(frozen=True)
class CalibrationImages:
    """Images ready for the model, (n, 3, H, W) float32, and what is known of them.

    ``targets``: for each image the model's output that stands for its class, None where the folder does not say.
    ``sha256`` is over the files' contents in order of their paths below the folder; ``notices`` are for the user.
    """

    batch: np.ndarray
    targets: np.ndarray | None
    sha256: str
    source: str
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.batch)


def find_set(name: str) -> Path | None:
    """The folder of the set that an index.json calls `name`; None where no index has it."""
    for folder in _calib_folders():
        entry = read_index(folder).get(name)
        if entry is not None:
            return folder / str(entry["folder"])
    return None


def known_sets() -> list[str]:
    """The names of every set an index here offers."""
    return sorted({name for folder in _calib_folders() for name in read_index(folder)})


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """`sets` of the index.json in `folder`: name -> folder, purpose, licence, images, sha256. {} without an index."""
    path = folder / "index.json"
    if not path.is_file():
        return {}
    try:
        sets = json.loads(path.read_text())["sets"]
        for entry in sets.values():
            entry["folder"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(
            f"{path} is not an index of calibration sets ({error})", hint="restore it, or name a folder"
        ) from error
    return dict(sets)


def _calib_folders() -> list[Path]:
    named = os.environ.get(ENVIRONMENT)
    return [Path(named)] if named else [Path("calib"), Path(vimdeploy.__file__).resolve().parents[1] / "calib"]


def load_images(
    source: str | Path,
    info: ModelInfo,
    *,
    limit: int | None = DEFAULT_LIMIT,
    fewest: int = FEWEST,
    labelled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationImages:
    """Read the images of a folder or set for the model that `info` describes.

    A folder of class folders that fit the model's classes brings labels; any other folder is searched for images
    whatever their place. `limit` takes so many, spread evenly over the paths in order. With `labelled`, a folder whose
    images have no labels for this model is refused. Raises ImageError: no such folder or set, no images, fewer than
    `fewest` that are not all one colour, an image that cannot be read; UsageError for a model that does not read RGB.
    """
    import numpy as np

    from vimdeploy.evaluate import load
    from vimdeploy.preprocess import Preprocessing

    if info.config.in_chans != 3:
        raise UsageError(f"the model reads {info.config.in_chans} channels; images give 3 (RGB)")
    folder = _resolve(source)
    preprocessing = Preprocessing.from_dict(info.preprocessing)
    samples, notices = _samples(folder, info, labelled)
    found = len(samples)
    if limit is not None and found > limit:
        samples = [samples[i * found // limit] for i in range(limit)]
    if len(samples) < fewest:
        raise ImageError(
            f"{folder} holds {found} images, too few to say how large activations get: at least {fewest} are needed",
            hint=f"name a folder of {DEFAULT_LIMIT} images like those the model will see",
        )
    digest = hashlib.sha256()
    batch, targets, flat = [], [], []
    for i, (path, target) in enumerate(samples):
        digest.update(path.read_bytes())
        image = load(preprocessing, path)
        batch.append(image)
        targets.append(target)
        if all(float(np.ptp(channel)) == 0 for channel in image):
            flat.append(path)
        if progress is not None:
            progress(i + 1, len(samples))
    if len(samples) - len(flat) < fewest:
        raise ImageError(
            f"{len(flat)} of {len(samples)} images in {folder} are of one colour all over ({flat[0].name}, ...), and "
            f"{len(samples) - len(flat)} others are too few: at least {fewest} are needed",
            hint="name images like those the model will see",
        )
    if flat:
        notices.append(f"{len(flat)} images are of one colour all over, {flat[0].name} first")
    known = all(target is not None for target in targets)
    return CalibrationImages(
        batch=np.stack(batch),
        targets=np.array(targets, np.int64) if known else None,
        sha256=digest.hexdigest(),
        source=str(source),
        notices=tuple(notices),
    )


def _resolve(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    named = find_set(str(source))
    if named is not None and named.is_dir():
        return named
    if named is not None:
        raise ImageError(f"the folder of the set {source}, {named}, is missing", hint="restore it, or name a folder")
    sets = known_sets()
    offered = f"; the sets here: {', '.join(sets)}" if sets else ""
    raise ImageError(f"{source} is neither a folder nor a calibration set{offered}", hint="name a folder of images")


def _samples(folder: Path, info: ModelInfo, labelled: bool) -> tuple[list[tuple[Path, int | None]], list[str]]:
    """(file, the output its class stands for) in order of paths, and notices."""
    try:
        classes = ImageFolder(folder)
        targets = classes.targets(info.config.num_classes, info.labels)
    except ImageError:
        if labelled:
            raise
        files = sorted(path for path in folder.rglob("*") if is_image_name(path) and path.is_file())
        if not files:
            raise ImageError(f"no images in {folder}", hint="name a folder that holds images") from None
        return [(path, None) for path in files], []
    return [(path, targets[number]) for path, number in classes.samples], list(classes.notices)
