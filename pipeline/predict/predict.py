"""Predictions for a folder of pictures, with a logged student: its ONNX file and the server's preprocessing."""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.predict.request import Request, model_folder
from pipeline.reporting import tables
from pipeline.served import bundle
from pipeline.served.picture_files import told
from pipeline.served.pictures import Refused
from pipeline.served.student_pyfunc import BATCH, Classifier

if TYPE_CHECKING:
    import pandas

    from pipeline.runs.run import Run

logger = logging.getLogger("asib")
TOP = 5
SHOWN = 10
"""Skipped files named in the log; skipped.csv lists all of them."""


# the job -------------------------------------------------------------------------------------------------------------


def predict(run: "Run", request: Request) -> float | None:
    """Write the table, log it, and link the model; pictures that cannot be read are listed and left out.

    Raises UserError: no such model, a model that is not a student, no readable picture.
    """
    if run.follower:
        return None  # one process is enough
    model, classifier = load(request.model, run.fetch, run.folder / "fetched")
    run.ready()
    if request.ignored:
        logger.info("images=%s: %s", request.images, told(request.ignored, request.images))
    if model.run_id:
        run.journal.model_input(model.run_id)
    tags = {"asib.model": model.version or request.model, "asib.student": model.run_id, "asib.model_id": model.model_id}
    run.journal.tags({key: value for key, value in tags.items() if value})
    started = time.perf_counter()
    skipped: dict[str, str] = {}
    digest = hashlib.sha256()
    parts = []
    for names, images in _read(request, classifier, digest, skipped):
        try:
            parts.append(table(names, classifier.probabilities(images), classifier.classes))
        except Refused as error:
            raise UserError(f"model={request.model}: {names[0]} and what follows {error}; register it again") from error
    seconds = time.perf_counter() - started
    reasons = _tell(run, request, skipped)
    if not parts:
        raise UserError(
            f"images={request.images}: none of its {len(request.files)} pictures can be read; see {reasons}"
        )
    written = _write(run, request, parts)
    count = sum(len(part) for part in parts)
    profile = {"images": count, "skipped": len(skipped)}
    source = str(request.images.absolute())
    run.journal.dataset(request.images.absolute().name, digest.hexdigest(), "prediction", source, profile=profile)
    run.journal.hold()
    speed = {"predict/images_per_second": count / seconds}
    run.journal.metrics({f"predict/{name}": float(n) for name, n in profile.items()} | speed, 0)
    print(f"{count} pictures classified, {len(skipped)} skipped: {written}", flush=True)
    if skipped:
        print(f"{len(skipped)} pictures that cannot be read, with reasons: {reasons}", flush=True)
    return None


def _read(
    request: Request, classifier: Classifier, digest: "hashlib._Hash", skipped: dict[str, str]
) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    """Names and images (n, size, size, channels) by batches; fills `digest` and `skipped` (name -> reason)."""

    def read(path: Path) -> tuple[bytes, NDArray[np.uint8] | str]:
        try:
            file = path.read_bytes()
            return hashlib.sha256(file).digest(), classifier.picture(file)
        except (Refused, OSError) as error:
            return b"", str(error)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(request.files), BATCH):
            names, images = [], []
            files = request.files[start : start + BATCH]
            for path, (content, image) in zip(files, pool.map(read, files), strict=True):
                name = path.relative_to(request.images).as_posix()
                if isinstance(image, str):
                    skipped[name] = image
                else:
                    digest.update(name.encode() + b"\0" + content)
                    names.append(name)
                    images.append(image)
            if images:
                yield names, np.stack(images)


def table(names: Sequence[str], probabilities: NDArray[np.float32], classes: Sequence[str]) -> "pandas.DataFrame":
    """file, class, probability, then class_2, probability_2 and so on up to 5, from probabilities (n, N)."""
    import pandas

    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    columns: dict[str, Any] = {"file": list(names)}
    for rank in range(order.shape[1]):
        suffix = f"_{rank + 1}" if rank else ""
        columns[f"class{suffix}"] = [classes[k] for k in order[:, rank]]
        columns[f"probability{suffix}"] = np.take_along_axis(probabilities, order[:, rank : rank + 1], axis=1)[:, 0]
    return pandas.DataFrame(columns)


def _write(run: "Run", request: Request, parts: Sequence["pandas.DataFrame"]) -> Path:
    """Write the table to the run's folder, as an artifact, and where it was requested; return that path."""
    import pandas

    everything = pandas.concat(parts, ignore_index=True)
    path = run.folder / f"predictions{request.to.suffix.lower() if request.to else '.csv'}"
    if path.suffix == ".parquet":
        everything.to_parquet(path, index=False)
    else:
        tables.write_csv(everything, path, index=False, float_format="%.6f")
    run.journal.artifact(path)
    if request.to is None:
        return path
    try:
        shutil.copyfile(path, request.to)
    except OSError as error:
        raise UserError(f"to={request.to}: cannot be written ({error.strerror}); the table is in {path}") from error
    return request.to


def _tell(run: "Run", request: Request, skipped: Mapping[str, str]) -> Path:
    """Warn of files left out, and list all of them in `skipped.csv`, if there are any; return its path."""
    import pandas

    path = run.folder / "skipped.csv"
    if not skipped:
        return path
    for name, reason in list(skipped.items())[:SHOWN]:
        logger.warning("skipped: %s: %s", request.images / name, reason)
    if len(skipped) > SHOWN:
        logger.warning("skipped: %d more, all of them in skipped.csv", len(skipped) - SHOWN)
    tables.write_csv(pandas.DataFrame(skipped.items(), columns=["file", "reason"]), path, index=False)
    run.journal.artifact(path)
    return path


# the model -----------------------------------------------------------------------------------------------------------


def load(source: str, fetch: Callable[[str, Path], Path], to: Path) -> tuple[bundle.Student, Classifier]:
    """The student that `model=` names, and its network; `fetch` downloads from a server into the folder `to`.

    Raises UserError: it does not exist, or is not a student as it was registered.
    """
    student = bundle.read(fetched(source, fetch, to), f"model={source}")
    return student, bundle.load(student, f"model={source}")


def fetched(source: str, fetch: Callable[[str, Path], Path], to: Path) -> Path:
    """The logged model's folder that `model=` names, downloaded if it is on a server. Raises UserError."""
    if source.startswith(("models:/", "runs:/")):
        uri = source.rstrip("/")
        if source.startswith("runs:/") and "/" not in uri.removeprefix("runs:/"):
            uri += "/student"
        try:
            return fetch(uri, to)
        except UserError as error:
            raise UserError(f"model={source}: {str(error).removeprefix(uri).lstrip(': ')}") from error
    return model_folder(source)
