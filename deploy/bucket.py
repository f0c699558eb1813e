"""The artifacts' bucket: `make` it, `pull` it into a folder, `push` a folder into it. Deletes nothing.

    python deploy/bucket.py make|pull|push <from> [<to>]        a bucket is s3://<name>[/<prefix>]

`pull` copies what is new; `push` copies everything.
Address and keys as boto3 and MLflow read them: MLFLOW_S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def parts(uri: str) -> tuple[str, str]:
    """Bucket and prefix; the prefix is empty or ends with a slash. SystemExit for anything else."""
    split = urlsplit(uri)
    if split.scheme != "s3" or not split.netloc:
        raise SystemExit(f"{uri}: give s3://<bucket>[/<prefix>]")
    prefix = split.path.strip("/")
    return split.netloc, f"{prefix}/" if prefix else ""


def make(s3: Any, uri: str) -> None:
    """The bucket, unless it is there."""
    from botocore.exceptions import ClientError

    bucket, _ = parts(uri)
    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise SystemExit(f"{uri}: {error}: check the keys") from error
        s3.create_bucket(Bucket=bucket)


def pull(s3: Any, uri: str, folder: Path) -> int:
    """Copy what is not in the folder with the same size and time; the number of files copied."""
    (bucket, prefix), copied = parts(uri), 0
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", ()):
            path = folder / item["Key"].removeprefix(prefix)
            if ".." in path.parts:
                raise SystemExit(f"{uri}: {item['Key']} leads out of {folder}")
            changed = item["LastModified"].timestamp()
            if path.exists() and (path.stat().st_size, path.stat().st_mtime) == (item["Size"], changed):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            s3.download_file(bucket, item["Key"], str(part))
            os.utime(part, (changed, changed))
            part.replace(path)
            copied += 1
    return copied


def push(s3: Any, folder: Path, uri: str) -> int:
    """Copy everything, whatever is there: checkpoints of a run have the same size. The number of files copied."""
    bucket, prefix = parts(uri)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")
    for path in files:
        s3.upload_file(str(path), bucket, prefix + path.relative_to(folder).as_posix())
    return len(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "pull", "push"])
    parser.add_argument("source")
    parser.add_argument("target", nargs="?")
    options = parser.parse_args()
    if (options.target is None) != (options.what == "make"):
        parser.error("make takes a bucket; pull and push take from and to")
    import boto3

    s3 = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    if options.what == "make":
        make(s3, options.source)
    elif options.what == "pull":
        print(f"{pull(s3, options.source, Path(options.target))} files copied", file=sys.stderr)
    else:
        print(f"{push(s3, Path(options.source), options.target)} files copied", file=sys.stderr)


if __name__ == "__main__":
    main()
