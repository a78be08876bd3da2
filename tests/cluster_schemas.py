"""JSON schemas of the files in clusters/ whose tools are not installed here: KubeRay's RayJob, SkyPilot's task.

They have only the fields that the templates use, so any other field is an error: look it up, and add it. Sources: the
types RayJobSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec and AuthOptions of KubeRay 1.5
(ray-operator/apis/ray/v1), the pod template of Kubernetes 1.34, and `get_task_schema` of SkyPilot 0.14 (sky/utils).
"""

from typing import Any

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[mkMGTPE])?$"}
VARIABLE = "^[a-zA-Z_][a-zA-Z0-9_]*$"


def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others. required: names of those that must be there."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def items(of: dict[str, Any]) -> dict[str, Any]:
    """A list of one kind of thing, with at least one."""
    return {"type": "array", "items": of, "minItems": 1}


QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = fields(
    "name image",
    name=NAME,
    image=TEXT,
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    env=items(fields("name", name={**TEXT, "pattern": VARIABLE}, value=TEXT)),
    envFrom=items(fields("secretRef", secretRef=fields("name", name=TEXT))),
    volumeMounts=items(fields("name mountPath", name=NAME, mountPath=TEXT)),
)
VOLUME = fields(
    "name",
    name=NAME,
    configMap=fields("name", name=TEXT),
    emptyDir=fields(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
POD = fields("spec", spec=fields("containers", containers=items(CONTAINER), volumes=items(VOLUME)))
HEAD = fields("template", rayStartParams=TEXTS, template=POD)
WORKERS = fields(
    "groupName minReplicas maxReplicas template",
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    labels=TEXTS,
    template=POD,
)
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["token", "disabled"]}),
    headGroupSpec=HEAD,
    workerGroupSpecs=items(WORKERS),
)
RAY_JOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name=NAME),
    spec=fields(
        "rayClusterSpec",
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        entrypoint=TEXT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=CLUSTER,
    ),
)

VARIABLES = {"type": "object", "patternProperties": {VARIABLE: {"type": ["string", "null"]}},
             "additionalProperties": False}  # fmt: skip
SKYPILOT_TASK = fields(
    name=TEXT,
    num_nodes={"type": "integer", "minimum": 1},
    resources=fields(accelerators=TEXT, disk_size={"type": "integer"}),
    workdir=TEXT,
    envs=VARIABLES,
    secrets=VARIABLES,
    setup=TEXT,
    run=TEXT,
)
