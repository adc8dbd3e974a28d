"""Predictions from images, and how often they are right."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimdeploy.errors import CheckFailed, ImageError, UsageError
from vimdeploy.images import ImageFolder, open_image
from vimdeploy.preprocess import Preprocessing

if TYPE_CHECKING:
    import numpy as np

    from vimdeploy.runtimes.base import Session
    from vimdeploy.verify.agreement import Agreement


@dataclass(frozen=True)
class Prediction:
    """One line of a ranked list: output index, label (its number when the model has no labels), softmax probability."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class ClassResult:
    """How one class fared: images seen, and those whose first guess was right."""

    name: str
    n: int
    correct: int


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured.

    ``top1`` and ``topk`` are fractions of ``n`` images, ``k`` is 5 or the number of classes if smaller, and
    ``top1_interval`` is Wilson's 95 % interval. Times are seconds of wall clock: ``decode_s`` from file to array,
    ``inference_s`` in the runtime.
    """

    n: int
    classes: int
    top1: float
    topk: float
    k: int
    top1_interval: tuple[float, float]
    decode_s: float
    inference_s: float
    batch_size: int
    runtime: str
    per_class: tuple[ClassResult, ...]
    against: Agreement | None = None  # the other model on the same images, where there is one

    @property
    def images_per_s(self) -> dict[str, float]:
        """Images per second: decoding alone, the runtime alone, and one after the other."""
        seconds = {
            "decode": self.decode_s,
            "inference": self.inference_s,
            "total": self.decode_s + self.inference_s,
        }
        return {name: self.n / max(value, 1e-9) for name, value in seconds.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "top1_interval": list(self.top1_interval),
            "per_class": [dataclasses.asdict(result) for result in self.per_class],
            "against": None if self.against is None else self.against.to_dict(),
            "images_per_s": self.images_per_s,
        }


def preprocessing_of(session: Session) -> Preprocessing:
    """The preprocessing a session's model names, once it is clear that the model classifies RGB images.

    Raises UsageError for a model that puts out features or tokens, or reads other than three channels;
    ModelFileError when the file contradicts itself.
    """
    info = session.info
    if info.output != "logits" or not info.config.num_classes:
        output = info.output if info.output != "logits" else "features"
        raise UsageError(
            f"the model puts out {output}, not class scores", hint="export the checkpoint with --output logits"
        )
    if info.config.in_chans != 3:
        raise UsageError(f"the model reads {info.config.in_chans} channels; images give 3 (RGB)")
    preprocessing = Preprocessing.from_dict(info.preprocessing)
    (spec,) = session.inputs.values()
    if spec.shape[1:] not in ((3, *preprocessing.img_size), (None, None, None)):
        raise UsageError(
            f"the model takes {spec}, its metadata says {preprocessing.img_size[0]}x{preprocessing.img_size[1]} pixels",
            hint="export it again",
        )
    return preprocessing


def predict(session: Session, batch: np.ndarray) -> np.ndarray:
    """Logits of any number of images: (N, 3, H, W) floats -> (N, classes) float32.

    Casts to the type the model reads and, for a model exported with a fixed batch, fills up the last one. Raises
    CheckFailed when a logit is not finite.
    """
    import numpy as np

    (spec,) = session.inputs.values()
    batch = batch.astype(spec.dtype, copy=False)
    step = spec.shape[0] or max(len(batch), 1)
    parts = []
    for start in range(0, max(len(batch), 1), step):
        part = batch[start : start + step]
        count = len(part)
        if count and count < step:
            part = np.concatenate([part, np.repeat(part[-1:], step - count, axis=0)])
        values = session.run(part)
        logits = values.get("logits")
        if logits is None:
            (logits,) = values.values()
        if logits.shape != (step, session.info.config.num_classes):
            raise UsageError(
                f"the model put out scores of shape {logits.shape} for {step} images and "
                f"{session.info.config.num_classes} classes",
                hint="export it again",
            )
        parts.append(logits[:count].astype(np.float32))
    result = np.concatenate(parts)
    if not np.isfinite(result).all():
        raise CheckFailed(
            f"the model's scores are not finite (NaN or infinite) on {session.describe()}",
            hint="compare it with PyTorch: `vimdeploy verify parity`",
        )
    return result


def classify(session: Session, path: Path, top_k: int = 5) -> list[Prediction]:
    """The `top_k` likeliest classes of an image file, best first. Raises ImageError, UsageError, CheckFailed."""
    image = load(preprocessing_of(session), path)
    return rank(predict(session, image[None])[0], session.info.labels, top_k)


def rank(logits: np.ndarray, labels: Sequence[str], top_k: int) -> list[Prediction]:
    """The `top_k` largest of logits (classes,), with softmax probabilities over all of them."""
    import numpy as np

    wide = logits.astype(np.float64)
    probabilities = np.exp(wide - wide.max())
    probabilities /= probabilities.sum()
    names = labels if len(labels) == len(logits) else [str(index) for index in range(len(logits))]
    best = np.argsort(-wide, kind="stable")[:top_k]
    return [Prediction(int(index), names[index], float(probabilities[index])) for index in best]


def load(preprocessing: Preprocessing, path: Path) -> np.ndarray:
    """An image file as model input, float32 (3, H, W). Raises ImageError with the path in every message."""
    image = open_image(path)
    try:
        return preprocessing(image)
    except ImageError as error:
        raise ImageError(f"{path}: {error.message}", hint=error.hint) from error


def evaluate(
    session: Session,
    folder: ImageFolder,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    against: Session | None = None,
) -> EvalResult:
    """Accuracy of a session over a folder of classes.

    ``limit`` takes that many images, evenly spread over the folder so that every class keeps its share. ``progress``
    is called with (images done, images in all) after each batch. Raises ImageError for the first image that cannot be
    read: accuracy over the readable ones would be another number. Raises UsageError, and CheckFailed for scores that
    are not finite. ``against`` is the session of a model of the same classes, to be compared with image by image: the
    fp32 file an int8 one was made of, say.
    """
    import numpy as np

    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError(f"batch size and limit must be at least 1, not {min(batch_size, limit or batch_size)}")
    preprocessing = preprocessing_of(session)
    classes = session.info.config.num_classes
    if against is not None and (preprocessing_of(against), against.info.config.num_classes) != (preprocessing, classes):
        raise UsageError("the two models take other images or know other classes, so they cannot be compared")
    scores: list[tuple[np.ndarray, np.ndarray]] = []
    targets = folder.targets(classes, session.info.labels)
    samples = folder.samples
    if limit is not None and limit < len(samples):
        samples = [samples[i * len(samples) // limit] for i in range(limit)]
    (spec,) = session.inputs.values()
    batch_size = spec.shape[0] or batch_size
    k = min(5, classes)
    seen, correct = [0] * len(targets), [0] * len(targets)
    hits = 0
    decode_s = inference_s = 0.0
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        begin = time.perf_counter()
        batch = np.stack([load(preprocessing, path) for path, _ in part])
        decoded = time.perf_counter()
        logits = predict(session, batch)
        inference_s += time.perf_counter() - decoded
        decode_s += decoded - begin
        if against is not None:
            scores.append((logits, predict(against, batch)))
        best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        for (_, number), guesses in zip(part, best, strict=True):
            seen[number] += 1
            correct[number] += int(guesses[0] == targets[number])
            hits += int(targets[number] in guesses)
        if progress is not None:
            progress(start + len(part), len(samples))
    n = len(samples)
    return EvalResult(
        n=n,
        classes=classes,
        top1=sum(correct) / n,
        topk=hits / n,
        k=k,
        top1_interval=wilson(sum(correct), n),
        decode_s=decode_s,
        inference_s=inference_s,
        batch_size=batch_size,
        runtime=session.describe(),
        per_class=tuple(map(ClassResult, folder.classes, seen, correct)),
        against=_agreement(scores, np.array([targets[number] for _, number in samples])) if scores else None,
    )


def _agreement(scores: list[tuple[np.ndarray, np.ndarray]], targets: np.ndarray) -> Agreement:
    import numpy as np

    from vimdeploy.verify.agreement import agreement

    got, reference = (np.concatenate(part) for part in zip(*scores, strict=True))
    return agreement(got, reference, targets)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a proportion: unlike p ± 1.96 s it stays in [0, 1] and is not empty at p = 1."""
    z = 1.959963984540054
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
