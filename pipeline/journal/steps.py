"""What steps add to a journal beside parameters and metrics: data sets, teachers, models, registered versions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.journal.entries import encode_number
from pipeline.journal.folder import relative


class StepEntries:
    """The part of a `Journal` that writes them."""

    folder: Path
    id: str

    def _add(self, kind: str, **values: Any) -> None:
        raise NotImplementedError

    def dataset(
        self,
        name: str,
        digest: str,
        context: str,
        source: str,
        schema: Mapping[str, Any] | None = None,
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """A data set that the run reads; `context` is training, validation or test, `source` a path or a URL."""
        self._add("dataset", name=name, digest=digest, context=context, source=source, schema=schema, profile=profile)

    def model_input(self, run_id: str) -> None:
        """A teacher: the model that the run (an MLflow run id, or a journal id for work off line) has logged."""
        self._add("model_input", run_id=run_id)

    def model(
        self,
        folder: Path,
        name: str,
        *,
        kind: str = "pyfunc",
        python_model: Path | None = None,
        artifacts: Mapping[str, Path] | None = None,
        input_example: Path | None = None,
        pip_requirements: Sequence[str] = (),
        params: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        model_type: str | None = None,
        step: int = 0,
    ) -> None:
        """A prepared folder to become a LoggedModel; every path lies inside the run's folder.

        Args:
            folder: the prepared files.
            name: the LoggedModel's name.
            kind: "pyfunc" (servable; needs `python_model`) or "weights" (the folder's files as they are).
            python_model: a file that ends with `mlflow.models.set_model(…)`.
            artifacts: name → file, as `context.artifacts` gives them to the model.
            input_example: a .json or .npy file.
            pip_requirements: what the served model needs.
            params, metrics, tags: for the LoggedModel; metrics that the run has too are linked to its points.
            step: the epoch that the model is of.

        Raises:
            ValueError: a path lies outside the run's folder, or kind and python_model do not fit.
        """
        if kind not in ("pyfunc", "weights") or (kind == "pyfunc") != (python_model is not None):
            raise ValueError('a model is of kind "pyfunc" with python_model, or of kind "weights" without')
        self._add(
            "model",
            entry=self._model_entry(name, step),
            folder=relative(folder, self.folder),
            name=name,
            model_kind=kind,
            python_model=relative(python_model, self.folder) if python_model else None,
            artifacts={key: relative(path, self.folder) for key, path in (artifacts or {}).items()},
            input_example=relative(input_example, self.folder) if input_example else None,
            pip_requirements=list(pip_requirements),
            params={key: str(value) for key, value in (params or {}).items()},
            metrics={key: encode_number(value) for key, value in (metrics or {}).items()},
            tags=dict(tags or {}),
            model_type=model_type,
            step=step,
        )

    def register(
        self, registered: str, *, model: str, alias: str, tags: Mapping[str, str] | None = None, step: int = 0
    ) -> None:
        """A model that was logged before becomes a new version of a registered model, once, and gets an alias.

        Args:
            registered: the registered model's name; it is made when there is none.
            model, step: the LoggedModel's, as given to `model`.
            alias: moved to the new version, unless a newer one has it.
            tags: of the version.
        """
        self._add(
            "register", entry=self._model_entry(model, step), registered=registered, alias=alias, tags=dict(tags or {})
        )

    def _model_entry(self, name: str, step: int) -> str:
        """What a model is known by: the same when it is logged again."""
        return hashlib.sha256(f"{self.id}/{name}/{step}".encode()).hexdigest()[:32]
