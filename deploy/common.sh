# Sourced by the other scripts: secrets become the variables that libpq, boto3 and MLflow read, so that no password
# stands in a URL or on a command line, where others could see it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
secrets=${ASIB_SECRETS:-/run/secrets}
export ASIB_DATABASE_URI=${ASIB_DATABASE_URI:-postgresql+psycopg://mlflow@database/mlflow}
export ASIB_AUTH_DATABASE_URI=${ASIB_AUTH_DATABASE_URI:-postgresql+psycopg://mlflow@database/mlflow_auth}
export ASIB_ARTIFACTS=${ASIB_ARTIFACTS:-s3://mlflow}
mlflow=${ASIB_MLFLOW:-mlflow}
python=${ASIB_PYTHON:-python}

die() {
  echo "$0: $*" >&2
  exit 2
}

# secret <variable> <file>: what is set already stays, for those who bring secrets in another way
secret() {
  [[ -n ${!1:-} ]] && return
  [[ -r $secrets/$2 ]] || die "$secrets/$2 cannot be read: run deploy/first_start.sh, or set $1"
  printf -v "$1" %s "$(<"$secrets/$2")"
  export "${1?}"
}

secret PGPASSWORD database_password
secret AWS_ACCESS_KEY_ID s3_access_key
secret AWS_SECRET_ACCESS_KEY s3_secret_key

# libpq knows nothing of SQLAlchemy's drivers
libpq() { echo "${1/+psycopg/}"; }
