"""Devices and how programs are laid out over them."""

from tokjax.parallel.topologies import (
  CompileReport,
  compile_for,
  environment,
  h100_topology,
  tpu_topology,
)

__all__ = [
  "CompileReport",
  "compile_for",
  "environment",
  "h100_topology",
  "tpu_topology",
]
