"""The model registry as delivery sees it: versions made from a run's models, and requests about them."""

from __future__ import annotations

import difflib
import json
import logging
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from pipeline.errors import NotThere, UserError
from pipeline.journal import Entry
from pipeline.served import bundle
from pipeline.tracking import server
from pipeline.tracking.aliases import there
from pipeline.tracking.faults import Fault, classify, look, outraced
from pipeline.tracking.model_tags import CHALLENGER, CHAMPION, PREVIOUS, TAG_LENGTH, garbled, is_version
from pipeline.tracking.state import State

log = logging.getLogger("asib.delivery")

ANNOUNCED = "asib.announced"
"""Tag of a version that has received its alias."""


# versions ------------------------------------------------------------------------------------------------------------


def register(client: MlflowClient, state: State, entry: Entry) -> str:
    """Make a version of the entry's registered model from its LoggedModel and set the alias, each only once.

    Returns:
        Its number.

    Raises:
        ValueError: the model was refused, or this user may not make versions of it.
    """
    data = entry.data
    if data["alias"] != CHALLENGER:
        raise ValueError(
            f"a run's model becomes {CHALLENGER}, never {data['alias']!r:.50}: that is what a promotion decides"
        )
    model_id = state.models.get(data["entry"])
    if model_id is None:
        raise ValueError(f"there is no model to register as {data['registered']}: it was refused")
    found = _made_of(client, data["registered"], state.run_id, model_id)
    if found is None:
        found = _make_version(client, data, state.run_id, model_id)
    _link(client, model_id, found)
    if ANNOUNCED not in found.tags:
        _announce(client, found, data["alias"])
    return str(found.version)


def _make_version(client: MlflowClient, data: Any, run_id: str, model_id: str) -> ModelVersion:
    name = data["registered"]
    try:
        _make_registered_model(client, name)
        files = client.get_logged_model(model_id).tags.get(bundle.TAG)
        return client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run_id,
            tags={key: str(value)[:TAG_LENGTH] for key, value in data["tags"].items()}
            | ({bundle.TAG: files} if files else {}),
            model_id=model_id,
        )
    except Exception as error:
        if classify(error) is not Fault.NOT_ALLOWED:
            raise
        # Later entries, above all the run's end, must not wait for someone's permission.
        raise ValueError(f"permission denied (403): ask for EDIT permission on the model {name}") from error


def _made_of(client: MlflowClient, name: str, run_id: str, model_id: str) -> ModelVersion | None:
    """The version that an earlier attempt made of a model."""
    query = f"name = '{name}' and run_id = '{run_id}'"
    found = server.all_pages(lambda token: client.search_model_versions(query, page_token=token))
    return next((version for version in found if _model_of(version) == model_id), None)


def _model_of(version: ModelVersion) -> str:
    """The id of the LoggedModel behind a version; MLflow's database stores it only in the source."""
    return str(version.model_id or str(version.source).partition("models:/")[2])


def _make_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise


def _link(client: MlflowClient, model_id: str, version: ModelVersion) -> None:
    """List the version on the LoggedModel's page, as MLflow's own `register_model` does."""
    text = client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS) or "[]"
    try:
        known = json.loads(text)
        names = [(str(item["name"]), str(item["version"])) for item in known]
    except (ValueError, TypeError, KeyError, RecursionError):
        log.warning("%s: %s", model_id, garbled(MLFLOW_MODEL_VERSIONS, text, "rewritten"))
        known, names = [], []
    if (version.name, str(version.version)) not in names:
        known.append({"name": version.name, "version": version.version})
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(known)})


@outraced
def _announce(client: MlflowClient, version: ModelVersion, alias: str) -> None:
    """Give the alias to the newest version: a run delivered late does not take it from a later one."""
    holder = client.get_registered_model(version.name).aliases.get(alias)
    if not is_version(str(holder)) or int(holder) < int(version.version):
        client.set_registered_model_alias(version.name, alias, str(version.version))
    client.set_model_version_tag(version.name, str(version.version), ANNOUNCED, alias)


# requests ------------------------------------------------------------------------------------------------------------


def overview(client: MlflowClient, name: str) -> dict[str, Any]:
    """Aliases (name -> version) and tags of a registered model; `said`: one sentence for each alias without a version.

    Raises:
        UserError: no such model; names the nearest ones.
    """
    model = look(lambda: client.get_registered_model(name))
    if model is None:
        raise UserError(f"name={name}: {_no_such_model(client, name)}")
    aliases = {alias: str(version) for alias, version in model.aliases.items()}
    said = []
    for alias in (CHAMPION, PREVIOUS, CHALLENGER):
        if alias in aliases and not there(client, name, aliases[alias]):
            said.append(f"alias {alias}={aliases.pop(alias)} names no version: ignored")
    return {"aliases": aliases, "tags": dict(model.tags), "said": said}


def _no_such_model(client: MlflowClient, name: str) -> str:
    found = server.all_pages(lambda token: client.search_registered_models(page_token=token))
    known = [model.name for model in found]
    near = difflib.get_close_matches(name, known, n=1) or known[:5]
    hint = f"did you mean {', '.join(near)}?" if near else "register one with -e distill -P register=<name>"
    return f"the registry has no such model; {hint}"


def version(client: MlflowClient, name: str, number: str) -> dict[str, Any]:
    """A version: number, run_id, model_id, status and tags. Raises NotThere: no such version."""
    found = look(lambda: client.get_model_version(name, number))
    if found is None:
        every = server.all_pages(lambda token: client.search_model_versions(f"name = '{name}'", page_token=token))
        numbers = sorted(int(item.version) for item in every)
        has = f"it has {', '.join(map(str, numbers[-10:]))}" if numbers else "it has none"
        raise NotThere(f"version={number}: {name} has no such version; {has}")
    return {
        "number": str(found.version),
        "run_id": found.run_id or "",
        "model_id": _model_of(found),
        "status": str(found.status),
        "tags": dict(found.tags),
    }


def tag_manifest(client: MlflowClient, name: str, number: str, manifest: str) -> None:
    """Tag a version with the manifest of its files."""
    client.set_model_version_tag(name, number, bundle.TAG, manifest)
