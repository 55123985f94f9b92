"""Compiles the kernels of tokjax for TPUs that are not attached.

  python tpu/aot_compile.py --topology v5e:16x16 --shape rerank

takes the options of `tokjax compile`; without any it compiles for v5e, v6e and
v7x. The settings of the compiler stand in the environment before jax is
imported, which is why the import of tokjax stands inside.
"""

import os
import sys

TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")


def main() -> int:
  os.environ["JAX_PLATFORMS"] = "cpu"
  from tokjax.cli import compile as command

  words = sys.argv[1:]
  if not any(word.startswith("--topology") for word in words):
    for topology in TOPOLOGIES:
      words += ["--topology", topology]
  return command.main(words)


if __name__ == "__main__":
  sys.exit(main())
