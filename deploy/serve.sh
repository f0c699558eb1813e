#!/usr/bin/env bash
# The team's MLflow server; what may be set is in README.md. Runs in the container and, the same, natively.
source "$(dirname "$0")/common.sh"

[[ -n ${ASIB_ALLOWED_HOSTS:-} ]] || die "ASIB_ALLOWED_HOSTS is empty: name the hosts under which clients know the server"
[[ ${ASIB_WRONG_PASSWORDS:-10} =~ ^[1-9][0-9]{0,3}$ ]] || die "ASIB_WRONG_PASSWORDS=$ASIB_WRONG_PASSWORDS: give 1 to 9999"
secret MLFLOW_FLASK_SERVER_SECRET_KEY secret_key

# Only an empty user table needs it; afterwards the file can go.
if [[ -z ${MLFLOW_AUTH_ADMIN_PASSWORD:-} && -s $secrets/admin_password ]]; then
  MLFLOW_AUTH_ADMIN_PASSWORD=$(<"$secrets/admin_password")
  export MLFLOW_AUTH_ADMIN_PASSWORD
fi
if [[ -n ${MLFLOW_AUTH_ADMIN_PASSWORD:-} && ${#MLFLOW_AUTH_ADMIN_PASSWORD} -lt 12 ]]; then
  die "the first password of the user admin has ${#MLFLOW_AUTH_ADMIN_PASSWORD} characters: give at least 12"
fi

MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = ${ASIB_DEFAULT_PERMISSION:-READ}
database_uri = $ASIB_AUTH_DATABASE_URI
admin_username = admin
# A password is checked once a minute and not at every request: a batch of metrics takes 15 ms instead of 260.
auth_cache_ttl_seconds = ${ASIB_AUTH_CACHE_SECONDS:-60}
authorization_function = wrong_passwords:authenticate
INI
export MLFLOW_AUTH_CONFIG_PATH
ASIB_WRONG_PASSWORDS_FILE=$(mktemp)
export ASIB_WRONG_PASSWORDS_FILE ASIB_WRONG_PASSWORDS=${ASIB_WRONG_PASSWORDS:-10} PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export MLFLOW_BACKEND_STORE_URI=$ASIB_DATABASE_URI MLFLOW_ARTIFACTS_DESTINATION=$ASIB_ARTIFACTS
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
# Who delivers a run tries again by himself: a store that is away need not hold a worker for minutes.
export AWS_MAX_ATTEMPTS=${AWS_MAX_ATTEMPTS:-2} AWS_RETRY_MODE=${AWS_RETRY_MODE:-standard}

[[ -z ${ASIB_MAKE_BUCKET:-} ]] || "$python" "$here/bucket.py" make "$ASIB_ARTIFACTS"

exec "$mlflow" server --app-name basic-auth --serve-artifacts \
  --host "${ASIB_HOST:-127.0.0.1}" --port "${ASIB_PORT:-5000}" --workers "${ASIB_WORKERS:-4}" \
  --allowed-hosts "$ASIB_ALLOWED_HOSTS" \
  --cors-allowed-origins "${ASIB_ALLOWED_ORIGINS:-https://${ASIB_ALLOWED_HOSTS%%,*}}"
