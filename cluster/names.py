"""The names that a layout may use, where no library at hand knows them.

A mapping is an object with these members; a list of one is a list of such; ANY is left unlooked at. From KubeRay's
and Kubernetes' references, as far as a study needs them.
"""

from collections.abc import Mapping
from typing import Any

ANY: Any = None


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


PROVIDERS: Mapping[str, frozenset[str]] = {
    "aws": words(
        "type region availability_zone cache_stopped_nodes use_internal_ips use_external_head_ip key_pair "
        "security_group cloudwatch aws_credentials"
    ),
    "gcp": words("type region availability_zone project_id cache_stopped_nodes use_internal_ips"),
    "local": words("type head_ip worker_ips external_head_ip"),
}
"""What Ray's providers read of `provider`."""

DOCKER_OPTIONS = words(
    "add-host cap-add cap-drop cpus device dns env env-file gpus group-add hostname init ipc label log-driver "
    "log-opt memory memory-swap mount network pid privileged security-opt shm-size tmpfs ulimit user volume "
    "workdir"
)
"""Options of `docker run`, without their dashes."""

SBATCH_OPTIONS = words(
    "account array begin chdir comment constraint container cpus-per-gpu cpus-per-task delay-boot dependency "
    "distribution error exclude exclusive export extra-node-info gpu-bind gpus gpus-per-node gpus-per-socket "
    "gpus-per-task gres hint hold input job-name kill-on-invalid-dep licenses mail-type mail-user mem "
    "mem-per-cpu mem-per-gpu mincpus network nice no-requeue nodefile nodelist nodes ntasks ntasks-per-core "
    "ntasks-per-gpu ntasks-per-node open-mode output overcommit oversubscribe parsable partition prefer priority "
    "profile propagate qos quiet reboot requeue reservation signal spread-job switches threads-per-core time "
    "time-min tmp use-min-nodes verbose wait wait-all-nodes wckey wrap"
)
"""Long options of `sbatch`, without their dashes."""

_REFERENCE = {"name": ANY, "key": ANY, "optional": ANY}
_VARIABLE = {
    "name": ANY,
    "value": ANY,
    "valueFrom": {
        "secretKeyRef": _REFERENCE,
        "configMapKeyRef": _REFERENCE,
        "fieldRef": {"apiVersion": ANY, "fieldPath": ANY},
        "resourceFieldRef": {"containerName": ANY, "resource": ANY, "divisor": ANY},
    },
}
_RESOURCES = {"requests": ANY, "limits": ANY, "claims": ANY}
_RIGHTS = {
    "allowPrivilegeEscalation": ANY,
    "capabilities": {"add": ANY, "drop": ANY},
    "fsGroup": ANY,
    "fsGroupChangePolicy": ANY,
    "privileged": ANY,
    "readOnlyRootFilesystem": ANY,
    "runAsGroup": ANY,
    "runAsNonRoot": ANY,
    "runAsUser": ANY,
    "seccompProfile": {"type": ANY, "localhostProfile": ANY},
    "supplementalGroups": ANY,
}
_HOOK = {"exec": {"command": ANY}, "httpGet": ANY, "sleep": {"seconds": ANY}, "tcpSocket": ANY}
_CONTAINER = {
    "name": ANY,
    "image": ANY,
    "imagePullPolicy": ANY,
    "command": ANY,
    "args": ANY,
    "workingDir": ANY,
    "env": [_VARIABLE],
    "envFrom": ANY,
    "ports": [{"name": ANY, "containerPort": ANY, "protocol": ANY, "hostPort": ANY, "hostIP": ANY}],
    "resources": _RESOURCES,
    "volumeMounts": [
        {"name": ANY, "mountPath": ANY, "subPath": ANY, "readOnly": ANY, "subPathExpr": ANY, "mountPropagation": ANY}
    ],
    "lifecycle": {"postStart": _HOOK, "preStop": _HOOK},
    "livenessProbe": ANY,
    "readinessProbe": ANY,
    "startupProbe": ANY,
    "securityContext": _RIGHTS,
    "stdin": ANY,
    "tty": ANY,
    "terminationMessagePath": ANY,
    "terminationMessagePolicy": ANY,
}
_ITEM = {"key": ANY, "path": ANY, "mode": ANY}
_VOLUME = {
    "name": ANY,
    "configMap": {"name": ANY, "defaultMode": ANY, "items": [_ITEM], "optional": ANY},
    "csi": ANY,
    "emptyDir": {"medium": ANY, "sizeLimit": ANY},
    "ephemeral": ANY,
    "hostPath": {"path": ANY, "type": ANY},
    "nfs": {"server": ANY, "path": ANY, "readOnly": ANY},
    "persistentVolumeClaim": {"claimName": ANY, "readOnly": ANY},
    "projected": ANY,
    "secret": {"secretName": ANY, "defaultMode": ANY, "items": [_ITEM], "optional": ANY},
}
_METADATA = {"name": ANY, "generateName": ANY, "namespace": ANY, "labels": ANY, "annotations": ANY}
_POD = {
    "metadata": _METADATA,
    "spec": {
        "affinity": ANY,
        "automountServiceAccountToken": ANY,
        "containers": [_CONTAINER],
        "dnsPolicy": ANY,
        "hostIPC": ANY,
        "hostNetwork": ANY,
        "imagePullSecrets": [{"name": ANY}],
        "initContainers": [_CONTAINER],
        "nodeName": ANY,
        "nodeSelector": ANY,
        "priorityClassName": ANY,
        "restartPolicy": ANY,
        "runtimeClassName": ANY,
        "schedulerName": ANY,
        "securityContext": _RIGHTS,
        "serviceAccountName": ANY,
        "terminationGracePeriodSeconds": ANY,
        "tolerations": [{"key": ANY, "operator": ANY, "value": ANY, "effect": ANY, "tolerationSeconds": ANY}],
        "topologySpreadConstraints": ANY,
        "volumes": [_VOLUME],
    },
}
_CLUSTER = {
    "rayVersion": ANY,
    "authOptions": {"mode": ANY, "secretName": ANY},
    "enableInTreeAutoscaling": ANY,
    "autoscalerOptions": {
        "version": ANY,
        "upscalingMode": ANY,
        "idleTimeoutSeconds": ANY,
        "image": ANY,
        "imagePullPolicy": ANY,
        "resources": _RESOURCES,
        "env": [_VARIABLE],
        "envFrom": ANY,
        "volumeMounts": ANY,
        "securityContext": _RIGHTS,
    },
    "gcsFaultToleranceOptions": ANY,
    "headServiceAnnotations": ANY,
    "headGroupSpec": {
        "serviceType": ANY,
        "headService": ANY,
        "enableIngress": ANY,
        "labels": ANY,
        "resources": ANY,
        "rayStartParams": ANY,
        "template": _POD,
    },
    "workerGroupSpecs": [
        {
            "groupName": ANY,
            "replicas": ANY,
            "minReplicas": ANY,
            "maxReplicas": ANY,
            "numOfHosts": ANY,
            "idleTimeoutSeconds": ANY,
            "labels": ANY,
            "resources": ANY,
            "rayStartParams": ANY,
            "scaleStrategy": {"workersToDelete": ANY},
            "suspend": ANY,
            "template": _POD,
        }
    ],
}
RAYJOB: Mapping[str, Any] = {
    "apiVersion": ANY,
    "kind": ANY,
    "metadata": _METADATA,
    "spec": {
        "activeDeadlineSeconds": ANY,
        "backoffLimit": ANY,
        "clusterSelector": ANY,
        "deletionStrategy": ANY,
        "entrypoint": ANY,
        "entrypointNumCpus": ANY,
        "entrypointNumGpus": ANY,
        "entrypointResources": ANY,
        "jobId": ANY,
        "managedBy": ANY,
        "metadata": ANY,
        "rayClusterSpec": _CLUSTER,
        "runtimeEnvYAML": ANY,
        "shutdownAfterJobFinishes": ANY,
        "submissionMode": ANY,
        "submitterConfig": {"backoffLimit": ANY},
        "submitterPodTemplate": _POD,
        "suspend": ANY,
        "ttlSecondsAfterFinished": ANY,
    },
}
"""The members of a RayJob of ray.io/v1."""
