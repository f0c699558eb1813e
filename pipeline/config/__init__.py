"""The configuration: schema, rules between keys, hash and identity. Needs pydantic only."""

from pipeline.config.base import Section, flatten, key
from pipeline.config.datasets import AugmentConfig, DatasetConfig
from pipeline.config.identity import Identity, config_hash, source_digest, sources_of
from pipeline.config.inactive import inactive
from pipeline.config.methods.base import MethodConfig
from pipeline.config.model import ModelConfig, TeacherConfig
from pipeline.config.schema import (
    Config,
    UnknownKey,
    configure,
    explain,
    field_of,
    for_nested,
    known_names,
    schema,
    schema_for,
    student_alone,
)
from pipeline.config.training import FinetuneConfig, OptimConfig, ScheduleConfig

__all__ = [
    "AugmentConfig",
    "Config",
    "DatasetConfig",
    "FinetuneConfig",
    "Identity",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "ScheduleConfig",
    "Section",
    "TeacherConfig",
    "UnknownKey",
    "config_hash",
    "configure",
    "explain",
    "field_of",
    "flatten",
    "for_nested",
    "inactive",
    "key",
    "known_names",
    "schema",
    "schema_for",
    "source_digest",
    "sources_of",
    "student_alone",
]
