"""The configuration: schema, rules between keys, hash and identity. Needs pydantic only."""

from pipeline.config.describe import explain
from pipeline.config.identity import Identity, config_hash, source_digest
from pipeline.config.schema import (
    AugmentConfig,
    Config,
    DatasetConfig,
    FinetuneConfig,
    MethodConfig,
    OptimConfig,
    ScheduleConfig,
    TeacherConfig,
    flatten,
)

__all__ = [
    "AugmentConfig",
    "Config",
    "DatasetConfig",
    "FinetuneConfig",
    "Identity",
    "MethodConfig",
    "OptimConfig",
    "ScheduleConfig",
    "TeacherConfig",
    "config_hash",
    "explain",
    "flatten",
    "source_digest",
]
