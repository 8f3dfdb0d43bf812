#!/usr/bin/env bash
# The two services behind a cluster, by plain commands: PostgreSQL (ledger and MLflow's own) and MLflow's server.
#
#   cluster/services/services.sh secrets          # once: passwords and tokens, into cluster/secrets
#   cluster/services/services.sh start            # makes them the first time, and starts what does not run
#   cluster/services/services.sh stop | status
#   cluster/services/services.sh backup DIR       # databases, artifacts and secrets, while the services run
#   cluster/services/services.sh restore DIR      # the same into services that were never started
#   cluster/services/services.sh upgrade          # after a new MLflow or Optuna: a backup, then every schema
#   cluster/services/services.sh serve            # MLflow's server alone, in the foreground: what compose.yaml runs
#
# Every command is printed as it runs, to be typed by whoever would rather. No password is in any of them: PostgreSQL's
# client, MLflow and Ray read theirs from files. Run it as the user who is to own the services, not as root.
#
# Addresses, by environment:
#   HDML_SERVICES_HOST    where both listen                     127.0.0.1
#   HDML_SERVICES_NAMES   by which names MLflow may be called   that address and localhost; comma-separated, HOST:PORT
#   HDML_POSTGRES_HOST    where PostgreSQL is, if not here      HDML_SERVICES_HOST
#   HDML_POSTGRES_PORT    5432
#   HDML_MLFLOW_PORT      5000
#   HDML_SERVICES         where their data lie                  runs/services in the project
#   HDML_ARTIFACTS        where MLflow keeps files              a folder there; or s3://BUCKET/FOLDER
#   HDML_SECRETS          where secrets lie                     cluster/secrets in the project
set -euo pipefail
umask 077
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
host=${HDML_SERVICES_HOST:-127.0.0.1}
port=${HDML_MLFLOW_PORT:-5000}
secrets=${HDML_SECRETS:-$root/cluster/secrets}
place=${HDML_SERVICES:-$root/runs/services}
artifacts=${HDML_ARTIFACTS:-$place/artifacts}
databases=(ledger mlflow mlflow_auth)

export PGHOST=${HDML_POSTGRES_HOST:-$host} PGPORT=${HDML_POSTGRES_PORT:-5432} PGUSER=hdml PGPASSFILE=$secrets/pgpass
export PYTHONPATH=$root
if [ -x "$root/.venv/bin/python" ]; then PATH=$root/.venv/bin:$PATH; fi
# Debian keeps PostgreSQL's programs off PATH, a folder for each version.
newest=$(compgen -G '/usr/lib/postgresql/*/bin' | sort -V | tail -1 || true)
PATH=$PATH${newest:+:$newest}

die() { echo "error: $*" >&2 && exit 2; }
run() { printf '$ %s\n' "$*" >&2 && "$@"; }
random() { python -c 'import secrets; print(secrets.token_hex(32))'; }
url() { echo "postgresql+psycopg://hdml@$PGHOST:$PGPORT/$1"; }
password() { sed -n 's/^mlflow_tracking_password *= *//p' "$secrets/mlflow_credentials"; }

make_secrets() {
    mkdir -p "$secrets/server"
    local database tracker
    database=$(random) tracker=$(random)
    write() { # FILE, its content on standard input; what is there stays
        if [ -e "$secrets/$1" ]; then cat > /dev/null && echo "$secrets/$1: there already"; else cat > "$secrets/$1" && echo "$secrets/$1: made"; fi
    }
    random | write ray_auth_token
    echo "*:*:*:hdml:$database" | write pgpass
    printf '[mlflow]\nmlflow_tracking_username = hdml\nmlflow_tracking_password = %s\n' "$tracker" | write mlflow_credentials
    # What only the services themselves need, and no node.
    random | write server/flask_secret_key
    random | write server/postgres_password
    sed -n 's/.*:hdml://p' "$secrets/pgpass" | write server/hdml_password
    random | write server/minio_password
    printf '[default]\naws_access_key_id = hdml\naws_secret_access_key = %s\n' "$(cat "$secrets/server/minio_password")" |
        write server/minio_credentials
}

demand() {
    [ "$(id -u)" != 0 ] || die "run this as the user who is to own the services: runuser -u USER -- $0 $*"
    [ -e "$secrets/pgpass" ] || die "$secrets not found: run $0 secrets first"
}

runs() { pg_ctl status --pgdata="$place/postgresql" > /dev/null 2>&1; }

start_postgresql() {
    command -v initdb > /dev/null || die "initdb not found: install postgresql"
    local new=
    if [ ! -e "$place/postgresql/PG_VERSION" ]; then
        new=yes
        mkdir -p "$place/postgresql" "$place/socket"
        # Over the network by password only; the socket lies in a folder that no one else may enter.
        run initdb --pgdata="$place/postgresql" --username=postgres --pwfile="$secrets/server/postgres_password" \
            --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --no-locale > "$place/initdb.log"
        echo "host all all all scram-sha-256" >> "$place/postgresql/pg_hba.conf"
    fi
    runs || run pg_ctl start --wait --silent --pgdata="$place/postgresql" --log="$place/postgresql.log" \
        --options="-c listen_addresses=$host -c port=$PGPORT -c unix_socket_directories=$place/socket"
    [ -z "$new" ] || PASSWORD_FILE=$secrets/server/hdml_password run psql --quiet --set=ON_ERROR_STOP=1 \
        --host="$place/socket" --username=postgres --dbname=postgres --file="$root/cluster/services/databases.sql"
}

serve() {
    mkdir -p "$place"
    local names=${HDML_SERVICES_NAMES:-$host:$port,localhost:$port,127.0.0.1:$port}
    cat > "$place/auth.ini" << END
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = $(url mlflow_auth)
admin_username = hdml
admin_password = $(password)
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
END
    # Evaluations that no study asks for would take seven processes more.
    export MLFLOW_AUTH_CONFIG_PATH=$place/auth.ini MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
    MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$secrets/server/flask_secret_key")
    export MLFLOW_FLASK_SERVER_SECRET_KEY
    cd "$place"
    run exec python -m mlflow server --host "$host" --port "$port" --workers 1 --app-name basic-auth \
        --allowed-hosts "$names" --backend-store-uri "$(url mlflow)" --serve-artifacts --artifacts-destination "$artifacts"
}

answers() {
    python - "$host" "$port" << 'END'
import sys, urllib.request
host, port = sys.argv[1:]
host = "127.0.0.1" if host == "0.0.0.0" else host
try:
    urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5)
except OSError:
    sys.exit(1)
END
}

start_mlflow() {
    ! answers || return 0
    [[ $artifacts == *://* ]] || mkdir -p "$artifacts"
    echo "\$ setsid $0 serve > $place/mlflow.log &" >&2
    setsid bash "${BASH_SOURCE[0]}" serve > "$place/mlflow.log" 2>&1 < /dev/null &
    echo $! > "$place/mlflow.pid"
    for _ in $(seq 120); do
        ! answers || return 0
        kill -0 "$(cat "$place/mlflow.pid")" 2> /dev/null || break
        sleep 0.5
    done
    tail -20 "$place/mlflow.log" >&2
    die "MLflow's server does not start: see $place/mlflow.log"
}

stop_mlflow() {
    [ -e "$place/mlflow.pid" ] || return 0
    local leader
    leader=$(cat "$place/mlflow.pid")
    # Its pid is its process group's too; a pid that is another's by now has no such group.
    if kill -0 -- "-$leader" 2> /dev/null; then
        run kill -TERM -- "-$leader"
        for _ in $(seq 40); do kill -0 -- "-$leader" 2> /dev/null && sleep 0.25 || break; done
        ! kill -0 -- "-$leader" 2> /dev/null || run kill -KILL -- "-$leader"
    fi
    rm -f "$place/mlflow.pid"
}

stop() {
    stop_mlflow
    ! runs || run pg_ctl stop --wait --silent --mode=fast --pgdata="$place/postgresql"
}

status() {
    local wrong=0
    if pg_isready --quiet; then echo "PostgreSQL answers at $PGHOST:$PGPORT"; else wrong=3 && echo "PostgreSQL does not answer at $PGHOST:$PGPORT"; fi
    if answers; then echo "MLflow answers at http://$host:$port"; else wrong=3 && echo "MLflow does not answer at http://$host:$port"; fi
    return $wrong
}

backup() {
    local to=$1 database
    [ ! -e "$to" ] || [ -z "$(ls -A "$to")" ] || die "$to must be empty or not there, so that no backup is overwritten"
    mkdir -p "$to"
    # Databases first: what they name of artifacts is there by then, and stays.
    for database in "${databases[@]}"; do
        run pg_dump --format=custom --no-owner --file="$to/$database.dump" "$database"
    done
    if [[ $artifacts == *://* ]]; then
        echo "artifacts stay in $artifacts: have its versions kept there"
    else
        run tar --create --file="$to/artifacts.tar" --directory="$artifacts" .
    fi
    run cp -R "$secrets" "$to/secrets"
    echo "backup in $to: keep it as close as the secrets in it"
}

restore() {
    local from=$1 database tables
    for database in "${databases[@]}"; do [ -e "$from/$database.dump" ] || die "$from is no backup: $database.dump not found"; done
    if [ ! -e "$secrets/pgpass" ]; then
        mkdir -p "$secrets" && run cp -R "$from/secrets/." "$secrets/"
    elif ! diff -rq "$from/secrets" "$secrets" > /dev/null; then
        die "$secrets holds other secrets than the backup: move it away first"
    fi
    if [ -z "${HDML_POSTGRES_HOST:-}" ]; then start_postgresql; fi
    for database in "${databases[@]}"; do
        tables=$(psql --quiet --tuples-only --no-align --dbname="$database" \
            --command="SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        [ "$tables" = 0 ] || die "database $database must be empty, has $tables tables: restore into services that were never started (HDML_SERVICES=NEW)"
    done
    [[ $artifacts == *://* ]] || [ ! -e "$artifacts" ] || [ -z "$(ls -A "$artifacts")" ] || die "$artifacts must be empty"
    for database in "${databases[@]}"; do
        run pg_restore --exit-on-error --no-owner --dbname="$database" "$from/$database.dump"
    done
    if [ -e "$from/artifacts.tar" ]; then
        mkdir -p "$artifacts" && run tar --extract --file="$from/artifacts.tar" --directory="$artifacts"
    fi
    echo "restored: run $0 start"
}

upgrade() {
    backup "$place/backups/$(date +%Y-%m-%dT%H-%M-%S)"
    stop_mlflow
    run python -m mlflow db upgrade "$(url mlflow)"
    run python -m mlflow.server.auth db upgrade --url "$(url mlflow_auth)"
    # A ledger that no study has used has no schema yet.
    if [ "$(psql --quiet --tuples-only --no-align --dbname=ledger --command="SELECT count(*) FROM pg_tables WHERE tablename = 'version_info'")" = 1 ]; then
        run optuna storage upgrade --storage "$(url ledger)"
    fi
    start_mlflow
}

case ${1:-} in
secrets) make_secrets ;;
start) demand "$@" && start_postgresql && start_mlflow && status ;;
serve) demand "$@" && serve ;;
stop) demand "$@" && stop ;;
status) demand "$@" && status ;;
backup | restore)
    [ $# = 2 ] || die "usage: $0 $1 DIR"
    [ "$1" = restore ] || demand "$@"
    "$1" "$(realpath -m "$2")"
    ;;
upgrade) demand "$@" && upgrade ;;
*) die "usage: $0 secrets | start | stop | status | backup DIR | restore DIR | upgrade | serve" ;;
esac
