#!/usr/bin/env bash
# The schema of both databases to that of the installed MLflow: deploy/upgrade.sh <folder for the backup that comes first>
# The server must not run: stop it, install the new version, run this, start it.
source "$(dirname "$0")/common.sh"
(($# == 1)) || die "give the folder that keeps the backups"

"$here/backup.sh" "$1"
"$mlflow" db upgrade "$ASIB_DATABASE_URI"
"$python" -m mlflow.server.auth db upgrade --url "$ASIB_AUTH_DATABASE_URI"
