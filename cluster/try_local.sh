#!/usr/bin/env bash
# Tries `local.yaml` for real on this machine alone, and leaves nothing behind: as root on Debian,
#
#   cluster/try_local.sh
#
# In a network, a process table and an /etc of its own it starts an ssh server, PostgreSQL and MLflow, and does what a
# user does on machines of his: ray up, ray submit, the same again, a job, the doctor, ray down. Every command is printed
# before it runs. Needs the project's Python (make .venv/ready); installs Debian's openssh-server, rsync and postgresql
# where they are missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$root/.venv/bin
user=hdml

[ "$(id -u)" = 0 ] || { echo "only root can try this: it needs namespaces and a user of its own" >&2; exit 2; }
[ -x "$bin/python" ] || { echo "$bin/python not found: run make .venv/ready first" >&2; exit 2; }

if [ -z "${HDML_TRY:-}" ]; then
    missing=()
    [ -x /usr/sbin/sshd ] || missing+=(openssh-server)
    command -v rsync > /dev/null || missing+=(rsync)
    compgen -G '/usr/lib/postgresql/*/bin/initdb' > /dev/null || missing+=(postgresql)
    if ((${#missing[@]})); then
        echo "\$ apt-get install ${missing[*]}"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } > /dev/null
    fi
    place=$(mktemp -d /tmp/hdml-try-XXXXXX)
    trap 'rm -rf "$place"' EXIT
    HDML_TRY=$place "$bin/python" "$root/tests/isolated.py" \
        unshare --mount --uts --pid --fork --kill-child --mount-proc bash "${BASH_SOURCE[0]}" "$@"
    exit
fi

# From here on nothing outside is seen or changed.
place=$HDML_TRY
unset HDML_TRY RAY_AUTH_MODE RAY_AUTH_TOKEN
chmod 755 "$place"
hostname try
cp -a /etc "$place/etc" && mount --bind "$place/etc" /etc
echo "127.0.0.1 localhost try" > /etc/hosts
mount -t tmpfs tmpfs /home
mkdir -p /tmp/ray && mount -t tmpfs -o mode=1777 tmpfs /tmp/ray
useradd --create-home --shell /bin/bash "$user"
usermod --password '*' "$user" # no password, and yet not locked

# The user must see the project's Python, which may lie in root's home.
base=$("$bin/python" -c 'import sys; print(sys.base_prefix)')
if ! runuser -u "$user" -- test -x "$base/bin"; then
    mkdir "$place/python" && mount --bind "$base" "$place/python"
    mount -t tmpfs -o mode=755 tmpfs /root
    mkdir -p "$base" && mount --bind "$place/python" "$base"
fi
export HOME=/root PATH=$bin:$PATH
runuser -u "$user" -- "$bin/python" -c '' || { echo "user $user can't run $bin/python: move the project out of closed folders" >&2; exit 2; }

# The project as it is, in a folder of its own: its secrets and layouts are the try's.
project=$place/project
rsync -a --exclude .venv --exclude runs --exclude data --exclude cluster/secrets "$root/" "$project/"
chown -R "$user:" "$project"
git config --global --add safe.directory '*'
cd "$project"
services() { run runuser -u "$user" -- env HOME="/home/$user" cluster/services/services.sh "$@"; }

run() { # a command, as a user types it, and how long it took
    printf '\n$ %s\n' "$*"
    local begun=$SECONDS status=0
    timeout "${LIMIT:-300}" "$@" < /dev/null 2>&1 || status=$?
    printf '(%s s, status %s)\n' $((SECONDS - begun)) "$status"
    return "$status"
}
echo "== an ssh server"
mkdir -p /run/sshd "/home/$user/.ssh"
ssh-keygen -q -t ed25519 -N '' -f "$place/host"
ssh-keygen -q -t ed25519 -N '' -f "$place/key"
cp "$place/key.pub" "/home/$user/.ssh/authorized_keys"
cp "$place/key" "/home/$user/.ssh/id_ed25519"
chown -R "$user:" "/home/$user" && chmod 700 "/home/$user/.ssh"
cat > "$place/sshd_config" << END
HostKey $place/host
ListenAddress 127.0.0.1
AuthorizedKeysFile /home/$user/.ssh/authorized_keys
PasswordAuthentication no
AllowUsers $user
Subsystem sftp internal-sftp
END
/usr/sbin/sshd -f "$place/sshd_config" -E "$place/sshd.log"

echo "== PostgreSQL and MLflow"
services secrets
services start

echo "== the site"
sed -i \
    -e "s|^ledger = .*|ledger = \"postgresql+psycopg://hdml@127.0.0.1:5432/ledger\"|" \
    -e "s|^mlflow = .*|mlflow = \"http://127.0.0.1:5000\"|" \
    -e "/^\[local\]/,/^\[/ { s|^head = .*|head = \"127.0.0.1\"|; s|^workers = .*|workers = []|; s|^user = .*|user = \"$user\"|
        s|^key = .*|key = \"$place/key\"|; s|^python = .*|python = \"$bin\"| }" \
    -e "s|^object_store_gb = .*|object_store_gb = 0.2|" \
    cluster/site.toml
run git --no-pager diff --unified=0 cluster/site.toml
run python -m cluster write
run python -m cluster check cluster/local.yaml
run python -m cluster doctor cluster/local.yaml

echo "== a cluster, and a study on it, twice"
run ray up -y cluster/local.yaml
run ray exec cluster/local.yaml 'python -m cluster doctor'
run ray submit cluster/local.yaml studies/alpha_beta.py -- --tiny
run ray submit cluster/local.yaml studies/alpha_beta.py -- --tiny --trials 6
run ray exec cluster/local.yaml 'python -m studies show alpha_beta-tiny'
run ray exec cluster/local.yaml 'python -m studies verify alpha_beta-tiny'

echo "== a job outlives whoever submitted it"
run ray exec cluster/local.yaml 'ray job submit --no-wait --submission-id tried -- python ~/hdml/studies/baseline.py --tiny'
run ray exec cluster/local.yaml 'ray job logs --follow tried'
run ray exec cluster/local.yaml 'ray job status tried | grep succeeded'

echo "== who has no token or password is refused"
demand_401() { # WHAT, and how curl asks for it
    local what=$1 answer
    shift
    answer=$(curl --silent --output /dev/null --write-out '%{http_code}' "$@")
    [ "$answer" = 401 ] || { echo "NOT REFUSED: $what answers $answer" >&2; exit 1; }
    echo "$what: 401"
}
demand_401 "job submission" --data '{"entrypoint": "id"}' http://127.0.0.1:8265/api/jobs/
demand_401 dashboard http://127.0.0.1:8265/api/version
demand_401 MLflow http://127.0.0.1:5000/api/2.0/mlflow/experiments/get?experiment_id=0
python - << 'END'
import os, psycopg
os.environ["PGPASSFILE"] = "/dev/null"
try:
    psycopg.connect("postgresql://hdml@127.0.0.1/ledger")
except psycopg.OperationalError as error:
    assert "no password supplied" in str(error), error
    print("PostgreSQL: no password supplied")
else:
    raise SystemExit("NOT REFUSED: PostgreSQL")
END

echo "== the end"
run ray down -y cluster/local.yaml
services stop
echo "tried: all of it works"
