#!/usr/bin/env bash
# Both databases and the bucket into a folder: deploy/backup.sh <folder>
# The databases come first, so that every artifact they name is in the bucket's copy, which is incremental.
source "$(dirname "$0")/common.sh"
(($# == 1)) || die "give the folder that keeps the backups"

umask 077
dumps=$1/$(date -u +%Y%m%dT%H%M%SZ)
mkdir -p "$dumps.part"
pg_dump --format=custom --no-owner --dbname="$(libpq "$ASIB_DATABASE_URI")" --file="$dumps.part/mlflow.dump"
pg_dump --format=custom --no-owner --dbname="$(libpq "$ASIB_AUTH_DATABASE_URI")" --file="$dumps.part/auth.dump"
"$python" "$here/bucket.py" pull "$ASIB_ARTIFACTS" "$1/bucket"
mv "$dumps.part" "$dumps" # whole, or not there

# dumps that are old go; the bucket's copy keeps what was deleted
find "$1" -mindepth 1 -maxdepth 1 -type d -name '*Z' -mtime "+${ASIB_KEEP_DAYS:-30}" -exec rm -r {} +
echo "$dumps"
