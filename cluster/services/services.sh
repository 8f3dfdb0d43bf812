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
#   HDML_ARTIFACTS        where MLflow keeps files              a folder there; or s3://BUCKET/FOLDER, opened by what
#                         the machine may, or by server/aws_credentials among the secrets
#   HDML_SECRETS          where secrets lie                     cluster/secrets in the project
set -euo pipefail
umask 077
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
host=${HDML_SERVICES_HOST:-127.0.0.1}
port=${HDML_MLFLOW_PORT:-5000}
secrets=${HDML_SECRETS:-$root/cluster/secrets}
place=${HDML_SERVICES:-$root/runs/services}
artifacts=${HDML_ARTIFACTS:-$place/artifacts}
# The ledger last: a backup's then knows every trial that the backup's MLflow does.
databases=(mlflow mlflow_auth ledger)

export PGHOST=${HDML_POSTGRES_HOST:-$host} PGPORT=${HDML_POSTGRES_PORT:-5432} PGUSER=hdml PGPASSFILE=$secrets/pgpass
export PYTHONPATH=$root
if [ -x "$root/.venv/bin/python" ]; then PATH=$root/.venv/bin:$PATH; fi
# Debian keeps PostgreSQL's programs off PATH, a folder for each version.
newest=$(compgen -G '/usr/lib/postgresql/*/bin' | sort -V | tail -1 || true)
PATH=$PATH${newest:+:$newest}

die() { echo "error: $*" >&2 && exit 2; }
run() { printf '$ %s\n' "$*" >&2 && "$@"; }
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
url() { echo "postgresql+psycopg://hdml@$PGHOST:$PGPORT/$1"; }
tables() { # DATABASE, CONDITION: how many such tables it has
    psql --quiet --tuples-only --no-align --dbname="$1" --command="SELECT count(*) FROM pg_tables WHERE $2"
}
password() { sed -n 's/^mlflow_tracking_password *= *//p' "$secrets/mlflow_credentials"; }

make_secrets() {
    mkdir -p "$secrets/server"
    local database tracker
    database=$(random) tracker=$(random)
    write() { # FILE, its content on standard input: whole or not at all, and what is there stays
        if [ -e "$secrets/$1" ]; then
            cat > /dev/null && echo "$secrets/$1: there already"
        else
            cat > "$secrets/$1.part" && mv "$secrets/$1.part" "$secrets/$1" && echo "$secrets/$1: made"
        fi
    }
    random | write ray_auth_token
    echo "*:*:*:hdml:$database" | write pgpass
    printf '[mlflow]\nmlflow_tracking_username = hdml\nmlflow_tracking_password = %s\n' "$tracker" | write mlflow_credentials
    # What only the services themselves need, and no node.
    random | write server/flask_secret_key
    random | write server/postgres_password
    sed -n 's/.*:hdml://p' "$secrets/pgpass" | write server/hdml_password
}

own() { [ "$(id -u)" != 0 ] || die "run this as the user who is to own the services: runuser -u USER -- $0 $*"; }
demand() { own "$@" && { [ -e "$secrets/pgpass" ] || die "$secrets/pgpass not found: run $0 secrets first"; }; }

runs() { pg_ctl status --pgdata="$place/postgresql" > /dev/null 2>&1; }

start_postgresql() {
    command -v initdb > /dev/null || die "initdb not found: install postgresql"
    mkdir -p "$place/socket"
    if [ ! -e "$place/postgresql" ]; then
        rm -rf "$place/postgresql.part" # of a start that was interrupted
        # Over the network by password only; the socket lies in a folder that no one else may enter.
        run initdb --pgdata="$place/postgresql.part" --username=postgres --pwfile="$secrets/server/postgres_password" \
            --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --no-locale > "$place/initdb.log"
        echo "host all hdml all scram-sha-256" >> "$place/postgresql.part/pg_hba.conf"
        mv "$place/postgresql.part" "$place/postgresql"
    fi
    runs || run pg_ctl start --wait --silent --pgdata="$place/postgresql" --log="$place/postgresql.log" \
        --options="-c listen_addresses=$host -c port=$PGPORT -c unix_socket_directories=$place/socket"
    PASSWORD_FILE=$secrets/server/hdml_password run psql --quiet --no-psqlrc --host="$place/socket" \
        --username=postgres --dbname=postgres --file="$root/cluster/services/databases.sql"
}

serve() {
    mkdir -p "$place"
    [[ $artifacts == *://* ]] || mkdir -p "$artifacts"
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
    [ ! -e "$secrets/server/aws_credentials" ] || export AWS_SHARED_CREDENTIALS_FILE=$secrets/server/aws_credentials
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
    echo "\$ setsid $0 serve >> $place/mlflow.log &" >&2
    setsid bash "${BASH_SOURCE[0]}" serve >> "$place/mlflow.log" 2>&1 < /dev/null &
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
    # It leads a group, which has its number; after a reboot that may be someone else's.
    if pgrep -g "$leader" -f 'mlflow|services.sh' > /dev/null; then
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
    local to=$1 part database
    [ ! -e "$to" ] || [ -z "$(ls -A "$to")" ] || die "$to must be empty or not there, so that no backup is overwritten"
    mkdir -p "$(dirname "$to")"
    part=$(mktemp -d "$to.part-XXXX") # one that was interrupted keeps this name, and is no backup
    # Databases first: what they name of artifacts is there by then, and stays.
    for database in "${databases[@]}"; do
        run pg_dump --format=custom --no-owner --file="$part/$database.dump" "$database"
    done
    if [[ $artifacts == *://* ]]; then
        echo "artifacts stay in $artifacts: have its versions kept there"
    else
        # Status 1 says that files came, went or grew meanwhile, as they do while studies run.
        run tar --create --file="$part/artifacts.tar" --directory="$artifacts" . || [ $? = 1 ]
    fi
    run cp -R "$secrets" "$part/secrets"
    [ ! -e "$to" ] || rmdir "$to"
    mv "$part" "$to"
    echo "backup in $to: keep it as close as the secrets in it"
}

restore() {
    local from=$1 database count
    for database in "${databases[@]}"; do [ -e "$from/$database.dump" ] || die "$from is no backup: $database.dump not found"; done
    if [ ! -e "$secrets/pgpass" ]; then
        mkdir -p "$secrets" && run cp -R "$from/secrets/." "$secrets/"
    elif ! diff -rq "$from/secrets" "$secrets" > /dev/null; then
        die "$secrets holds other secrets than the backup: move it away first"
    fi
    if [ -z "${HDML_POSTGRES_HOST:-}" ]; then start_postgresql; fi
    for database in "${databases[@]}"; do
        count=$(tables "$database" "schemaname = 'public'")
        [ "$count" = 0 ] || die "database $database must be empty, has $count tables: restore into services that were never started (HDML_SERVICES=NEW)"
    done
    [[ $artifacts == *://* ]] || [ ! -e "$artifacts" ] || [ -z "$(ls -A "$artifacts")" ] || die "$artifacts must be empty"
    for database in "${databases[@]}"; do
        run pg_restore --single-transaction --exit-on-error --no-owner --dbname="$database" "$from/$database.dump"
    done
    if [ -e "$from/artifacts.tar" ] && [[ $artifacts != *://* ]]; then
        mkdir -p "$artifacts" && run tar --extract --file="$from/artifacts.tar" --directory="$artifacts"
    fi
    echo "restored: run $0 start"
}

upgrade() {
    local served=
    ! answers || served=yes
    stop_mlflow
    backup "$place/backups/$(date +%Y-%m-%dT%H-%M-%S)"
    run python -m mlflow db upgrade "$(url mlflow)"
    run python -m mlflow.server.auth db upgrade --url "$(url mlflow_auth)"
    # A ledger that no study has used has no schema yet.
    if [ "$(tables ledger "tablename = 'version_info'")" = 1 ]; then run optuna storage upgrade --storage "$(url ledger)"; fi
    [ -z "$served" ] || start_mlflow
}

case ${1:-} in
secrets) make_secrets ;;
start) demand "$@" && start_postgresql && start_mlflow && status ;;
serve) demand "$@" && serve ;;
stop) demand "$@" && stop ;;
status) demand "$@" && status ;;
backup | restore)
    [ $# = 2 ] || die "usage: $0 $1 DIR"
    if [ "$1" = restore ]; then own "$@"; else demand "$@"; fi
    "$1" "$(realpath -m "$2")"
    ;;
upgrade) demand "$@" && upgrade ;;
*) die "usage: $0 secrets | start | stop | status | backup DIR | restore DIR | upgrade | serve" ;;
esac
