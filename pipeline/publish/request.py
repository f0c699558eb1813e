"""The request of `-e publish`: the step's own keys, checked before the model is fetched."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.config.places import is_uri
from pipeline.errors import UserError
from pipeline.paths import user_path

FILES = ("README.md", "config.json", "model.onnx", "model.safetensors")
"""What a published folder holds."""
TRITON = "triton"
"""The folder in it that `triton=` adds."""
SOURCES = "runs:/<id>, models:/<name>@<alias>, models:/<name>/<version>, or a run's folder"
OWN = {
    "model": f"the student: {SOURCES}",
    "to": "the folder to write, new, empty or published before; `published` in the run's folder by default",
    "license": "of the weights, by the hub's names: apache-2.0, mit, cc-by-4.0, other …; unknown by default",
    "push": "<owner>/<name>: also upload the folder to the hub at HF_ENDPOINT, with the token in HF_TOKEN",
    "triton": f"a name: also write {TRITON}/<name>, as Triton Inference Server and KServe load models",
    "public": "true: everybody may see a repository that push makes; an existing one stays as it is",
}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
NAME = re.compile(r"[A-Za-z0-9][\w-]{0,95}", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,59}", re.ASCII)


@dataclass(frozen=True)
class Request:
    """The step's own keys; no `to`: the files stay in the run's folder; no `push`: nothing is uploaded.

    `triton`: the model's name in a model repository; None: none is written.
    """

    model: str
    to: Path | None
    license: str
    push: str | None
    public: bool
    triton: str | None = None

    def words(self) -> str:
        """What DRY_RUN=1 shows."""
        where = f"as the folder {self.to}" if self.to else "as a folder of the run"
        triton = f", with the Triton model {self.triton}" if self.triton else ""
        upload = f", and upload it to {self.push} as {self.license}" if self.push else ""
        return f"publish {self.model} {where}{triton}{upload}"


def read(config: Config, command: cli.Command) -> tuple[Config, Request]:
    """Read the step's own keys.

    Raises UserError: a key is missing, or names what cannot be used.
    """
    own = command.own
    model, to, push = (own.get(key, "") for key in ("model", "to", "push"))
    if not model:
        raise UserError(f"model is not set: give model={SOURCES}")
    if not is_uri(model):
        _run_folder(model)
    elif re.fullmatch(r"runs:/+[^/]+/?|models:/.+", model) is None:
        raise UserError(f"model={model}: give {SOURCES}")
    elif config.tracking.mode == "offline":
        raise UserError(f"tracking=offline: model={model} is on the tracking server; leave tracking online")
    license = own.get("license") or "unknown"
    if LICENSE.fullmatch(license) is None:
        raise UserError(f"license={license}: give the hub's name of it, such as apache-2.0, mit, cc-by-4.0 or other")
    triton = own.get("triton") or None
    if triton is not None and NAME.fullmatch(triton) is None:
        raise UserError(f"triton={triton}: give a name of letters, digits, '-' and '_'")
    public = cli.flag(own, "public")
    if push:
        _check_push(push)
    elif public:
        raise UserError("public=true is about a repository that push makes: give push=<owner>/<name>, or leave it out")
    cli.one_process("publish", "start it without torchrun")
    return config, Request(model, _target(to) if to else None, license, push or None, public, triton)


def _run_folder(model: str) -> None:
    folder = user_path(model, "model")
    if not folder.is_dir():
        raise UserError(f"model={model}: no such folder; give {SOURCES}")
    if not (folder / "model").is_dir() or not (folder / "journal.jsonl").exists():
        raise UserError(f"model={model}: no run with a model is in it; give the folder of a run with log_model=true")


def _check_push(push: str) -> None:
    if REPOSITORY.fullmatch(push) is None or ".." in push or "--" in push:
        raise UserError(f"push={push}: give <owner>/<name>, each of letters, digits, '-', '_' and '.'")
    if not os.environ.get("HF_TOKEN"):
        raise UserError(f"push={push} needs the hub's token: set it as HF_TOKEN in the environment, never as a key")


def _target(to: str) -> Path:
    path = user_path(to, "to")
    if path.exists() and not path.is_dir():
        raise UserError(f"to={to} is a file: give a new or empty folder")
    odd = sorted(file.name for file in path.iterdir() if file.name not in (*FILES, TRITON)) if path.is_dir() else []
    if odd:
        raise UserError(f"to={to}: {odd[0]} is in it; give a new or empty folder, or one that was published before")
    above = path if path.is_dir() else path.absolute().parent
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"to={to}: cannot write in {above}; give a folder in an existing one")
    return path
