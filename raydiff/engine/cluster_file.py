"""Cluster files: which workers do which stage, how many there are and on which nodes.

YAML, from configs/clusters by name or from anywhere by path. The roles are one of

    fused                                   encode, denoise and decode in one worker
    encode + denoise_decode                 text encoders elsewhere
    encode + denoise + decode               every stage elsewhere
"""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from raydiff.config import Section, read_yaml, validate
from raydiff.config_files import config_file
from raydiff.engine.messages import Role

SUFFIXES = (".yaml", ".yml")
ROLES: tuple[Role, ...] = ("fused", "encode", "denoise", "denoise_decode", "decode")
"""In the order of the stages."""
SPLITS: tuple[tuple[Role, ...], ...] = (
    ("fused",),
    ("encode", "denoise_decode"),
    ("encode", "denoise", "decode"),
)
ONE_CPU: dict[str, float | str] = {"CPU": 1.0}
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MEMORY = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})?")
LABEL_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
LABEL_KEY = re.compile(rf"(?:[a-z0-9.-]{{1,253}}/)?{LABEL_NAME}")
LABEL_RULE = re.compile(rf"!?(?:{LABEL_NAME}|in\( *{LABEL_NAME}(?: *, *{LABEL_NAME})* *\))")
"""Ray's label selectors: `big`, `!big`, `in(big,huge)`, `!in(big,huge)`."""


class StagePlacement(Section):
    """The workers of one role."""

    count: int | None = Field(None, ge=1, le=10_000)
    """So many workers, all of which the run starts with."""
    max: int | None = Field(None, ge=1, le=10_000)
    """At most so many: the run needs one of them, the others join as nodes come."""
    resources: dict[str, float | str] = Field(default_factory=lambda: dict(ONE_CPU))
    """What each worker takes of its node: CPU (1 unless it is said), GPU (0 or 1), memory
    (16GiB), kinds of your own."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray label selector that the node must match."""
    threads: int | None = Field(None, ge=1)
    """Threads for arithmetic on the CPU; None is one for each CPU that it takes."""

    @property
    def num_workers(self) -> int:
        """How many workers there may be."""
        return self.count or self.max or 1

    @property
    def is_elastic(self) -> bool:
        """Whether the run can do with fewer workers than there may be."""
        return self.max is not None

    @property
    def num_cpus(self) -> float:
        """CPUs of each worker."""
        return float(self.resources.get("CPU", 1))

    @property
    def num_gpus(self) -> int:
        """GPUs of each worker, 0 or 1."""
        return int(self.resources.get("GPU", 0))

    @property
    def memory_bytes(self) -> int | None:
        """Host memory that each worker reserves; None is no reservation."""
        memory = self.resources.get("memory")
        return None if memory is None else _bytes(str(memory))

    @property
    def custom_resources(self) -> dict[str, float]:
        """Resources of kinds that only this cluster has."""
        known = ("CPU", "GPU", "memory")
        return {kind: float(amount) for kind, amount in self.resources.items() if kind not in known}

    @property
    def num_threads(self) -> int:
        """Threads for arithmetic on the CPU, one at least."""
        return self.threads or max(1, int(self.num_cpus))

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, resources: dict[str, float | str]) -> dict[str, float | str]:
        for kind, amount in resources.items():
            if kind == "memory":
                _bytes(str(amount))
            elif not isinstance(amount, float) or amount < 0:
                raise ValueError(f"{kind}: {amount!r} is no amount. Use a number, 0 or more")
            elif kind == "GPU" and amount not in (0, 1):
                raise ValueError(f"GPU: {amount:g}: a worker uses one GPU, alone. Use 0 or 1")
            elif kind.lower() in ("cpu", "gpu", "cpus", "gpus") and kind not in ("CPU", "GPU"):
                raise ValueError(f"{kind}: Ray's kinds are CPU and GPU. Write it in capitals")
        return resources

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for key, rule in labels.items():
            if not LABEL_KEY.fullmatch(key):
                raise ValueError(f"{key!r} is no label key. Use letters, digits, -, _ and .")
            if not LABEL_RULE.fullmatch(rule):
                raise ValueError(
                    f"{key}: {rule!r} is no selector. Use value, !value, in(a,b) or !in(a,b)"
                )
        return labels

    @model_validator(mode="after")
    def _check_number(self) -> "StagePlacement":
        if (self.count is None) == (self.max is None):
            raise ValueError("give either count (always so many) or max (as many as have room)")
        return self


class Stages(Section):
    """Placements by role."""

    fused: StagePlacement | None = None
    encode: StagePlacement | None = None
    denoise: StagePlacement | None = None
    denoise_decode: StagePlacement | None = None
    decode: StagePlacement | None = None

    @property
    def by_role(self) -> dict[Role, StagePlacement]:
        """The placements that there are, in the order of the stages."""
        return {role: placement for role in ROLES if (placement := getattr(self, role)) is not None}

    @model_validator(mode="after")
    def _check_complete(self) -> "Stages":
        if tuple(self.by_role) not in SPLITS:
            given = " + ".join(self.by_role) or "nothing"
            known = ", or ".join(" + ".join(split) for split in SPLITS)
            raise ValueError(f"{given} is not a whole run. Give {known}")
        return self


class ClusterLayout(Section):
    """A cluster file: `load_cluster_file` reads it."""

    description: str = ""
    stages: Stages

    @property
    def by_role(self) -> dict[Role, StagePlacement]:
        """The placement of each role, in the order of the stages."""
        return self.stages.by_role

    @property
    def is_split(self) -> bool:
        """Whether stages have workers of their own."""
        return "fused" not in self.by_role


def load_cluster_file(name_or_path: str) -> ClusterLayout:
    """Read a cluster file: a name from configs/clusters, or the path of a YAML file.

    Raises ConfigError that names the file, the key, the rule and the nearest known key.
    """
    path = Path(name_or_path)
    if path.suffix not in SUFFIXES:
        path = config_file("clusters", name_or_path)
    where = f"cluster file {path}"
    values: dict[str, Any] = read_yaml(path, where, example="stages: {fused: {count: 1}}")
    return validate(ClusterLayout, values, where)


def _bytes(text: str) -> int:
    """Read an amount of memory: bytes, or with a unit."""
    found = MEMORY.fullmatch(text)
    if found is None:
        raise ValueError(f"memory: {text!r} is no amount of memory. Use bytes, or e.g. 16GiB")
    amount, unit = found.groups()
    return int(float(amount) * UNITS.get(unit, 1))
