"""Uploading a published folder to a hub, through huggingface_hub. The token is read here, and written nowhere."""

import os
from pathlib import Path

from pipeline import secrets, urls
from pipeline.errors import UserError, first_line
from pipeline.publish.request import FILES


def push(folder: Path, repository: str, public: bool) -> str:
    """Make the repository, private unless `public`, if it does not exist; upload the files in one commit.

    Returns the commit's address. Raises UserError: the hub does not answer, or refuses.
    """
    from huggingface_hub import HfApi  # late: only push needs it
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint, token=os.environ["HF_TOKEN"])
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Publish the student",
        )
    except Exception as error:  # its own, its HTTP client's and the transfer library's have no common class
        hub = urls.hidden(endpoint) if endpoint else "the hub"
        reason = secrets.mask(first_line(error))
        raise UserError(f"push={repository}: {hub} did not take it ({reason:.300}); the folder is {folder}") from error
    return secrets.mask(str(commit.commit_url))
