"""The layouts: one site in the words of each system that lends machines.

A layout is a function from a site to the text of its file. What they share, they share here: what a node's environment
holds, which files go there, how Ray starts. Ray's launcher takes AWS, GCP and machines reached by ssh; KubeRay and
Slurm bring launchers of their own.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from cluster.site import Aws, Gcp, Place, Site

SOURCE = (".git", "hdml_core", "studies", "cluster", "dashboards", "pyproject.toml", "constraints.txt")
"""What goes to every node as it is here, committed or not; the rest of the program nodes take from .git. One mount of
the whole folder would do, did Ray not read all of it, .venv and data too, at each `ray up`."""
FAILURES = 3
"""So many health checks in a row have to fail before Ray gives a node up."""
OPEN_FILES = 65536
HOME = "/srv/ray"
"""The home folder in the image of cluster/Dockerfile."""

Document = dict[str, Any]

ENVIRONMENT = """\
cat > ~/.hdml_environment <<'END'
{lines}
END
"""
OWN_DISK = """\
# The machine's own disk, where it has one, becomes /mnt/hdml; else that is a folder of the system's disk.
sudo mkdir -p /mnt/hdml
disk=$(lsblk --noheadings --nodeps --paths --output NAME,MODEL | awk '/Instance Storage/ {print $1; exit}')
if [ -n "$disk" ] && ! mountpoint --quiet /mnt/hdml; then
  place=$(lsblk --noheadings --output MOUNTPOINT "$disk" | awk 'NF {print; exit}')
  if [ -n "$place" ]; then sudo mount --bind "$place" /mnt/hdml
  else sudo blkid "$disk" || sudo mkfs.ext4 -q "$disk"; sudo mount "$disk" /mnt/hdml; fi
fi
sudo chmod 1777 /mnt/hdml
"""
SLURM = """\
set -euo pipefail
(($#)) || {{ echo "usage: sbatch cluster/slurm.sh studies/NAME.py [OPTION ...]" >&2; exit 2; }}
cd "$SLURM_SUBMIT_DIR"
{exports}
bash cluster/node.sh secrets
mkdir -p "$HDML_DATA" "$HDML_OUT"
ulimit -n {open_files} 2>/dev/null || ulimit -n "$(ulimit -Hn)"

# A port and a folder of its own: other jobs, of other users too, may have a Ray on the same nodes.
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$(hostname --ip-address | cut -d' ' -f1):$port"
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --object-store-memory={object_store} --disable-usage-stats --block)
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# This script runs on the first node, which is the head and trains too; srun starts the others.
ray start --head --node-ip-address="${{RAY_ADDRESS%:*}}" --port="$port" --dashboard-host=127.0.0.1 \\
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${{resources[@]}}" &
for _ in $(seq 60); do ray health-check --address "$RAY_ADDRESS" 2>/dev/null && break; sleep 2; done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others)); then
    srun --nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
        ray start --address="$RAY_ADDRESS" "${{resources[@]}}" &
fi

# Told that its time is nearly up, the study saves its state and ends; queued again, the same command goes on.
again=
python "$@" &
study=$!
trap 'again=yes; kill -TERM "$study"' TERM
status=0
wait "$study" || status=$?
while kill -0 "$study" 2>/dev/null; do status=0; wait "$study" || status=$?; done
if [ -n "$again" ] && ((status)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


def gpu(site: Site) -> str:
    """Render gpu.yaml: a head on demand and GPU workers that come and go, on AWS."""
    aws = site.aws
    common: Document = {
        "ImageId": aws.machine_image,
        "SecurityGroupIds": [aws.security_group],
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {"VolumeSize": aws.disk_gb, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True},
            }
        ],
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
    }
    head = {"InstanceType": aws.head_type, "IamInstanceProfile": {"Arn": aws.head_profile}, **common}
    worker = {"InstanceType": aws.worker_type, "IamInstanceProfile": {"Arn": aws.worker_profile}, **common}
    if aws.spot:
        worker["InstanceMarketOptions"] = {"MarketType": "spot"}
    provider = {
        "type": "aws",
        "region": aws.region,
        "availability_zone": ",".join(aws.zones),
        "cache_stopped_nodes": True,
    }
    # What workers have, Ray asks AWS for.
    document = in_containers(site, aws, provider, head, worker, resources={})
    return launched("gpu.yaml", "GPU workers on AWS, started as trials wait for them", document)


def gcp(site: Site) -> str:
    """Render gcp.yaml: the same on Google's Compute Engine."""
    gcp = site.gcp
    common: Document = {
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {
                    "diskSizeGb": gcp.disk_gb,
                    "diskType": f"zones/{gcp.zone}/diskTypes/pd-balanced",
                    "sourceImage": gcp.machine_image,
                },
            }
        ],
        "networkInterfaces": [
            {
                "subnetwork": gcp.subnetwork,
                "accessConfigs": [{"name": "External NAT", "type": "ONE_TO_ONE_NAT"}],
            }
        ],
    }
    # Machines with GPUs can't be moved while they run.
    scheduling: Document = {"onHostMaintenance": "TERMINATE"}
    if gcp.spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE", "automaticRestart": False}
    worker = {
        "machineType": gcp.worker_type,
        "scheduling": scheduling,
        "serviceAccounts": [
            {"email": gcp.worker_account, "scopes": ["https://www.googleapis.com/auth/devstorage.read_only"]}
        ],
        **common,
    }
    provider = {
        "type": "gcp",
        "region": gcp.region,
        "availability_zone": gcp.zone,
        "project_id": gcp.project,
        "cache_stopped_nodes": True,
    }
    resources = {"CPU": gcp.worker_cpus, "GPU": gcp.worker_gpus}
    document = in_containers(site, gcp, provider, {"machineType": gcp.head_type, **common}, worker, resources)
    return launched("gcp.yaml", "GPU workers on Google Cloud, started as trials wait for them", document)


def local(site: Site) -> str:
    """Render local.yaml: machines that are there, reached by ssh."""
    local = site.local
    auth = {"ssh_user": local.user, "ssh_private_key": local.key}
    if local.proxy_command:
        auth["ssh_proxy_command"] = local.proxy_command
    python = local.python or "$HOME/hdml-venv/bin"
    document = {
        "cluster_name": site.cluster.name,
        "provider": {"type": "local", "head_ip": local.head, "worker_ips": list(local.workers)},
        "auth": auth,
        "max_workers": len(local.workers),
        "upscaling_speed": float(max(1, len(local.workers))),
        "idle_timeout_minutes": site.cluster.idle_minutes,
        **node(site, local, {"PATH": f"{python}:$PATH"}),
    }
    return launched("local.yaml", "machines that are there, reached by ssh", document)


def in_containers(
    site: Site, place: Aws | Gcp, provider: Document, head: Document, worker: Document, resources: Mapping[str, int]
) -> Document:
    """What layouts on rented machines have in common."""
    cluster = site.cluster
    shared = [place.mount] if place.mount else []
    return {
        "cluster_name": cluster.name,
        "provider": provider,
        "auth": {"ssh_user": "ubuntu"},
        "max_workers": cluster.max_workers,
        "upscaling_speed": cluster.upscaling_speed,
        "idle_timeout_minutes": cluster.idle_minutes,
        "docker": {
            "image": place.image,
            "container_name": cluster.name,
            "pull_before_run": True,
            "run_options": [
                f"--shm-size={math.ceil(cluster.object_store_gb) + 2}g",
                f"--ulimit=nofile={OPEN_FILES}:{OPEN_FILES}",
                "--volume=/mnt:/mnt",
            ],
        },
        "head_node_type": "head",
        "available_node_types": {
            # Without CPUs of Ray's no trial runs there: the head is small, and must stay.
            "head": {"min_workers": 0, "max_workers": 0, "resources": {"CPU": 0}, "node_config": head},
            "worker": {
                "min_workers": cluster.min_workers,
                "max_workers": cluster.max_workers,
                "resources": dict(resources),
                "node_config": worker,
            },
        },
        "initialization_commands": [OWN_DISK, *shared],
        **node(site, place, {}),
    }


def node(site: Site, place: Place, path: Mapping[str, str]) -> Document:
    """What goes to a node of Ray's launcher, how it is set up there and how Ray starts."""
    size = f"--object-store-memory={int(site.cluster.object_store_gb * 2**30)}"
    # The launcher's own OMP_NUM_THREADS=1 would hold for all trials; Ray sets one by the CPUs that a trial asks for.
    ready = f"unset OMP_NUM_THREADS; ulimit -n {OPEN_FILES} 2>/dev/null || ulimit -n $(ulimit -Hn);"
    return {
        "file_mounts": {
            **{f"~/hdml/{name}": name for name in SOURCE},
            "~/.hdml_secrets": "cluster/secrets",
        },
        "rsync_exclude": ["__pycache__", "/secrets", "/server"],
        "setup_commands": [
            ENVIRONMENT.format(lines=exports({**path, **environment(site, place)})),
            "bash ~/hdml/cluster/node.sh",
        ],
        "head_setup_commands": ["hostname > ~/.hdml_head"],
        "worker_setup_commands": ["bash ~/hdml/cluster/node.sh worker"],
        "head_start_ray_commands": [
            "ray stop",
            f"{ready} ray start --head --port=6379 --dashboard-host=127.0.0.1 {size}"
            " --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{ready} ray start --address=$RAY_HEAD_IP:6379 {size}"],
    }


def environment(site: Site, place: Place) -> dict[str, str]:
    """What every process on a node finds in its environment, as a shell writes it."""
    archives = {"HDML_ARCHIVES": place.archives} if place.archives else {}
    return {
        "PYTHONPATH": "$HOME/hdml",
        "RAY_AUTH_MODE": "token",
        "RAY_ADDRESS": "auto",
        "RAY_USAGE_STATS_ENABLED": "0",
        **health(site.cluster.lost_after_seconds),
        "HDML_DATA": place.data,
        **archives,
        "HDML_OUT": place.out,
        "HDML_LEDGER": site.services.ledger,
        "MLFLOW_TRACKING_URI": site.services.mlflow,
    }


def health(lost_after: float) -> dict[str, str]:
    """Ray's settings for a node to count as lost after so many seconds without an answer.

    Ray waits `period` before a check, and `timeout` for its answer: lost_after = FAILURES (period + timeout).
    """
    each = round(1000 * lost_after / FAILURES / 2)
    return {
        "RAY_health_check_initial_delay_ms": str(each),
        "RAY_health_check_period_ms": str(each),
        "RAY_health_check_timeout_ms": str(each),
        "RAY_health_check_failure_threshold": str(FAILURES),
    }


def exports(variables: Mapping[str, str]) -> str:
    """Variables as a shell sets them."""
    return "\n".join(f'export {name}="{value}"' for name, value in variables.items())


def kuberay(site: Site) -> str:
    """Render kuberay.yaml: one study as a RayJob, with GPU workers for as long as it runs."""
    place, cluster = site.kuberay, site.cluster
    theirs = ("RAY_AUTH_MODE", "RAY_ADDRESS")  # KubeRay sets them
    variables = {name: value for name, value in environment(site, place).items() if name not in theirs}
    variables["PYTHONPATH"] = f"{HOME}/hdml"
    store = {"object-store-memory": str(int(cluster.object_store_gb * 2**30))}
    mounts = [{"name": "data", "mountPath": place.data}, {"name": "runs", "mountPath": place.out}]
    volumes: list[Document] = [
        {"name": "data", "emptyDir": {}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": place.claim}},
    ]

    def pod(name: str, limits: Document, more: Document, mounts: list[Document], volumes: list[Document]) -> Document:
        return {
            "spec": {
                "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
                "containers": [
                    {
                        "name": name,
                        "image": place.image,
                        "env": [{"name": name, "value": value} for name, value in variables.items()],
                        "resources": {"requests": limits, "limits": limits},
                        "volumeMounts": mounts,
                        **more,
                    }
                ],
                "volumes": volumes,
            }
        }

    head = pod(
        "ray-head",
        {"cpu": place.head_cpus, "memory": f"{place.head_memory_gb}Gi"},
        # The libraries want their secrets in files that no one else may read, which a mounted Secret can't give.
        {"lifecycle": {"postStart": {"exec": {"command": ["bash", f"{HOME}/hdml/cluster/node.sh", "secrets"]}}}},
        [*mounts, {"name": "secrets", "mountPath": f"{HOME}/.hdml_secrets", "readOnly": True}],
        [*volumes, {"name": "secrets", "secret": {"secretName": f"{cluster.name}-secrets", "defaultMode": 0o440}}],
    )
    worker = pod(
        "ray-worker",
        {"cpu": place.worker_cpus, "memory": f"{place.worker_memory_gb}Gi", "nvidia.com/gpu": place.worker_gpus},
        {},
        mounts,
        volumes,
    )
    worker["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    document = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": cluster.name, "namespace": place.namespace},
        "spec": {
            "entrypoint": f"python {HOME}/hdml/{place.study}",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            # A retry is the same command again, and so goes on where the study stopped.
            "backoffLimit": 3,
            "rayClusterSpec": {
                "rayVersion": "2.60.0",
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "serviceType": "ClusterIP",
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0", **store},
                    "template": head,
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "worker",
                        # The cluster lives for this one study, and has all its workers from the start.
                        "replicas": cluster.max_workers,
                        "minReplicas": cluster.max_workers,
                        "maxReplicas": cluster.max_workers,
                        "rayStartParams": store,
                        "template": worker,
                    }
                ],
            },
        },
    }
    use = [
        f"kubectl -n {place.namespace} create secret generic {cluster.name}-secrets \\",
        "  --from-file=cluster/secrets/pgpass --from-file=cluster/secrets/mlflow_credentials",
        "kubectl apply -f cluster/kuberay.yaml",
        f"kubectl -n {place.namespace} logs -f job/{cluster.name}",
    ]
    return header("kuberay.yaml", "one study on Kubernetes, by the KubeRay operator 1.5.1 or later", use) + dump(
        document
    )


def slurm(site: Site) -> str:
    """Render slurm.sh: one study on nodes that a Slurm lends, queued again until it is done."""
    place, cluster = site.slurm, site.cluster
    options = {
        "job-name": cluster.name,
        "partition": place.partition,
        "nodes": place.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": place.gpus_per_node,
        "cpus-per-task": place.cpus_per_node,
        "mem": f"{place.memory_gb_per_node}G",
        "time": f"{place.hours}:00:00",
        "output": f"{cluster.name}-%j.log",
        "open-mode": "append",
        "signal": "B:TERM@300",
    }
    directives = [f"#SBATCH --{name}={value}" for name, value in options.items()] + ["#SBATCH --requeue"]
    variables = {"PATH": f"{place.python}:$PATH"} | environment(site, place)
    variables["PYTHONPATH"] = "$SLURM_SUBMIT_DIR"
    del variables["RAY_ADDRESS"]
    use = [
        "sbatch cluster/slurm.sh studies/alpha_beta.py --trials 40",
        f"tail -f {cluster.name}-JOB.log",
        "scancel JOB",
    ]
    body = SLURM.format(
        exports=exports(variables), open_files=OPEN_FILES, object_store=int(cluster.object_store_gb * 2**30)
    )
    title = header("slurm.sh", "one study on nodes that Slurm lends, queued again until it is done", use)
    return "#!/usr/bin/env bash\n" + title + "\n".join(directives) + "\n\n" + body


LAYOUTS: Mapping[str, Callable[[Site], str]] = {
    "gpu.yaml": gpu,
    "gcp.yaml": gcp,
    "local.yaml": local,
    "kuberay.yaml": kuberay,
    "slurm.sh": slurm,
}

COMMENTS = {
    "provider": "Where machines come from.",
    "auth": "How they are reached; without a key named here, Ray makes one and keeps it in ~/.ssh.",
    "max_workers": "How many there may be, and how soon they come and go.",
    "docker": "What all commands below run in. GPUs are given to it where the machine has any.",
    "available_node_types": "The head runs no trials; workers come when trials wait for them.",
    "initialization_commands": "On the machine itself, before the container starts.",
    "file_mounts": "The program as it is here, and what opens the services.",
    "setup_commands": "The environment of all that runs on a node, and the Python that studies need.",
    "head_setup_commands": "Only the head may know how to open database and tracker.",
    "head_start_ray_commands": "Ray itself, its dashboard on the loopback alone.",
}


def launched(file: str, what: str, document: Document) -> str:
    """The text of a file for Ray's launcher."""
    use = [
        f"ray up cluster/{file}",
        f"ray submit cluster/{file} studies/alpha_beta.py -- --trials 40",
        f"ray down cluster/{file}",
    ]
    parts = []
    for key, value in document.items():
        comment = f"\n# {COMMENTS[key]}\n" if key in COMMENTS else ""
        parts.append(comment + dump({key: value}))
    return header(file, what, use) + "".join(parts)


def header(file: str, what: str, use: list[str]) -> str:
    """What stands at the top of each layout."""
    lines = [
        f"{file}: {what}.",
        "",
        "Rendered from cluster/site.toml by `python -m cluster write`: change that, not this. In the project's folder:",
        "",
        f"  python -m cluster check cluster/{file}",
        *[f"  {command}" for command in use],
        "",
        "See cluster/README.md.",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML comes without types
    """Texts of several lines stand as they are; equal parts are written out each time, not by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def dump(document: Document) -> str:
    """A document as YAML, in the order in which it was made."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
