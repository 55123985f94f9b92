"""What the greedy kernels hold on chip, by rule.

No device has timed these yet: the rules follow from sizes of memories.
"""

from tokjax.checks import in_range

__all__ = [
  "gpu_chunk",
  "table_fits_vmem",
  "tpu_group",
]

# A table and the copy of the next example's must fit beside the state.
_VMEM_TABLE_BYTES = 14 << 20
_GPU_CHUNK = 4096  # values in registers: 32 a thread, of five arrays
_GPU_STEP = 256  # two values a thread, 128 threads


def table_fits_vmem(num_rows: int, num_tokens: int, itemsize: int) -> bool:
  """Whether the TPU kernel can hold a table twice in vector memory.

  Args:
    num_rows: M.
    num_tokens: N.
    itemsize: bytes of a value.

  Returns:
    True up to 14 MiB, rows padded to whole lanes.

  Example:
    >>> table_fits_vmem(576, 576, 4), table_fits_vmem(2880, 2880, 4)
    (True, False)
  """
  lanes = _round_up(num_tokens, 128)
  return _round_up(num_rows, 16) * lanes * itemsize <= _VMEM_TABLE_BYTES


def tpu_group(itemsize: int) -> int:
  """Rows that lie together in a tile of TPU memory and are read at once.

  Args:
    itemsize: bytes of a value, 2 or 4.

  Returns:
    16 for bfloat16, 8 for float32.

  Raises:
    ValueError: for another size.

  Example:
    >>> tpu_group(4)
    8
  """
  in_range(2, 4, itemsize=itemsize)
  return 32 // itemsize


def gpu_chunk(num_tokens: int) -> int:
  """Candidates the GPU kernel works on at once.

  Args:
    num_tokens: N.

  Returns:
    A multiple of 256, at most 4,096. The last chunk of an axis is padded.

  Example:
    >>> gpu_chunk(576), gpu_chunk(2880), gpu_chunk(16384)
    (768, 3072, 4096)
  """
  num_chunks = -(-num_tokens // _GPU_CHUNK)
  return _round_up(-(-num_tokens // num_chunks), _GPU_STEP)


def _round_up(size, multiple):
  return -(-size // multiple) * multiple
