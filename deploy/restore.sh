#!/usr/bin/env bash
# A backup into empty databases, and the bucket's copy into the bucket: deploy/restore.sh <folder>/<date>
# The server must not run. Start it afterwards with the same MLflow version, or run upgrade.sh first.
source "$(dirname "$0")/common.sh"
(($# == 1)) && [[ -r $1/mlflow.dump && -r $1/auth.dump ]] || die "give a folder that backup.sh has made: <folder>/<date>"

query="select count(*) from information_schema.tables where table_schema = 'public'"
for uri in "$ASIB_DATABASE_URI" "$ASIB_AUTH_DATABASE_URI"; do
  tables=$(psql --no-psqlrc --tuples-only --no-align --command="$query" "$(libpq "$uri")")
  ((tables == 0)) || die "$uri has $tables tables: restore into empty databases (dropdb, createdb)"
done
"$python" "$here/bucket.py" make "$ASIB_ARTIFACTS"
"$python" "$here/bucket.py" push "$(dirname "$1")/bucket" "$ASIB_ARTIFACTS"
restore=(pg_restore --exit-on-error --single-transaction --no-owner)
"${restore[@]}" --dbname="$(libpq "$ASIB_DATABASE_URI")" "$1/mlflow.dump"
"${restore[@]}" --dbname="$(libpq "$ASIB_AUTH_DATABASE_URI")" "$1/auth.dump"
