"""Pictures on disk: one file, or a folder of classes. Decoding is PIL's, as upstream's is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vimdeploy.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

# torchvision's list, so that both see the same files.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = ("val", "validation", "valid", "test", "train")


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, decoded (of several frames the first).

    Raises ImageError, naming the path, when it is missing, a folder, not an image, truncated, or so large that
    decoding it could exhaust the memory (PIL's limit).
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not an image", hint=f"name the files: {path}/*")
    if not path.exists():
        raise ImageError(f"{path} does not exist", hint="check the path")
    try:
        with warnings.catch_warnings():
            # PIL warns at half the size it refuses. Upstream evaluates such images, so they are no error here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image
            with Image.open(path) as image:
                image.load()
            return image
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image", hint="JPEG, PNG, BMP, TIFF, PPM and WebP are read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is refused: {error}", hint="scale it down first") from error
    except PermissionError:
        raise
    except Exception as error:  # decoders of damaged bytes raise whatever comes to hand
        raise ImageError(f"{path} is damaged: {error or type(error).__name__}", hint="replace or remove it") from error


def is_image_name(path: str | Path) -> bool:
    """Whether the name ends like an image's; the file is not looked at."""
    return str(path).lower().endswith(EXTENSIONS)


class ImageFolder:
    """A folder of class folders, read as torchvision's ImageFolder reads it.

    ``classes`` are the names of the folders in sorted order, ``samples`` the (file, class number) pairs, class by
    class with paths sorted, sub-folders included. ``notices`` are sentences worth showing to the user: classes with
    no image, images that lie outside any class. Hidden folders are no classes (torchvision counts them, and every
    label is off by one).

    Raises ImageError for a folder that is missing, empty, flat (images directly in it: there is nothing to say which
    class they belong to, vim-spec.md section 6), or that holds data splits instead of classes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.notices: list[str] = []
        if not self.folder.is_dir():
            what = "is a file, not a folder of images" if self.folder.exists() else "does not exist"
            raise ImageError(f"{self.folder} {what}", hint="name a folder with one sub-folder for each class")
        with os.scandir(self.folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        self.classes = [entry.name for entry in found if entry.is_dir() and not entry.name.startswith(".")]
        loose = sum(entry.is_file() and is_image_name(entry.name) for entry in found)

        if not self.classes and loose:
            raise ImageError(
                f"{self.folder} is flat: {loose} images lie directly in it, and no class folders. A label is the "
                "position of an image's folder among the sorted class folders, so every label would be wrong",
                hint=f"sort the images into one folder for each class: {self.folder}/CLASS/image.jpg",
            )
        self._refuse_splits()
        self.samples: list[tuple[Path, int]] = []
        empty = []
        for index, name in enumerate(self.classes):
            files = _images_under(self.folder / name)
            self.samples += [(file, index) for file in files]
            if not files:
                empty.append(name)
        if not self.samples:
            raise ImageError(
                f"{self.folder} holds no images" + (" in its class folders" if self.classes else ""),
                hint="it needs one sub-folder for each class, with files ending in " + ", ".join(EXTENSIONS),
            )
        if empty:
            shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            self.notices.append(f"class folders without images: {shown}")
        if loose:
            self.notices.append(f"{loose} images directly in {self.folder} belong to no class and are left out")

    def _refuse_splits(self) -> None:
        """`DATA` instead of `DATA/val`: its folders would pass for classes called train and val."""
        splits = [name for name in SPLITS if name in self.classes]
        if not splits or len(splits) != len(self.classes):
            return
        deeper = [name for name in splits if any(path.is_dir() for path in (self.folder / name).iterdir())]
        if deeper:
            raise ImageError(
                f"{self.folder} holds data splits ({', '.join(splits)}), not classes",
                hint=f"name the split: {self.folder / deeper[0]}",
            )

    def targets(self, num_classes: int, labels: Sequence[str] = ()) -> list[int]:
        """For each class folder, the model output that stands for it.

        When every folder is named after one of the model's ``labels``, the names decide (and some classes may be
        absent); otherwise the sorted position does, as in training, and `num_classes` folders are required. Raises
        ImageError when that is not so: labels would be wrong without anything else going wrong.
        """
        if labels and len(set(labels)) == len(labels) and set(self.classes) <= set(labels):
            return [labels.index(name) for name in self.classes]
        if len(self.classes) != num_classes:
            raise ImageError(
                f"{self.folder} has {len(self.classes)} class folders, the model {num_classes} classes: a label is the "
                "position of its folder among all classes, so labels would be wrong",
                hint="name the folder with every class the model was trained on, or a model trained on these classes",
            )
        return list(range(num_classes))


def _images_under(folder: Path) -> list[Path]:
    # os.walk sorted by folder, then by name: torchvision's order, which `--limit` and reports rely on.
    files: list[Path] = []
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        files += [Path(root, name) for name in sorted(names) if is_image_name(name)]
    return files
