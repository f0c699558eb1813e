#!/usr/bin/env bash
# Makes the secrets and the settings of a new server; what is there already stays.
#   deploy/first_start.sh <site> [<file with the admin's first password>]
# <site>: the name under which the server is known, such as mlflow.example.org. Without a file the password is asked for.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
secrets=${ASIB_SECRETS:-$here/secrets}

die() {
  echo "$0: $*" >&2
  exit 2
}

(($# == 1 || $# == 2)) || die "give the server's name, and perhaps a file with the admin's first password"
site=$1 file=${2:-}
[[ $site =~ ^[A-Za-z0-9.-]+$ ]] || die "$site is no host name"

umask 077
mkdir -p "$secrets"

if [[ ! -e $secrets/admin_password ]]; then
  if [[ -n $file ]]; then
    [[ -r $file ]] || die "$file cannot be read"
    password=$(<"$file")
  else
    read -rsp "first password of the user admin (at least 12 characters): " password && echo
    read -rsp "once more: " again && echo
    [[ $password == "$again" ]] || die "the two differ: nothing is set"
  fi
  ((${#password} >= 12)) || die "the password has ${#password} characters: give at least 12"
  [[ $password != *$'\n'* ]] || die "the password has several lines: give one"
  printf %s "$password" >"$secrets/admin_password"
fi

# random <file>: made once
random() { [[ -e $secrets/$1 ]] || openssl rand -hex 24 | tr -d '\n' >"$secrets/$1"; }
for name in secret_key database_password s3_access_key s3_secret_key; do random "$name"; done

# What the object store reads: one user, the server.
cat >"$secrets/s3.json" <<JSON
{"identities": [{"name": "mlflow", "actions": ["Admin", "Read", "Write", "List", "Tagging"], "credentials": [
  {"accessKey": "$(<"$secrets/s3_access_key")", "secretKey": "$(<"$secrets/s3_secret_key")"}]}]}
JSON

# What compose reads. The server's container runs as who owns the secrets.
[[ -e $here/.env || -n ${ASIB_NO_ENV:-} ]] || cat >"$here/.env" <<ENV
ASIB_SITE=$site
ASIB_UID=$(id -u)
ASIB_GID=$(id -g)
ASIB_WORKERS=4
# A certificate of its own authority, for names that are not public: ASIB_TLS=tls internal
ASIB_TLS=
ENV
echo "secrets are in $secrets"
