"""Attention over a ring of devices, with transfers inside of the kernel.

`tokjax.parallel.ring_attention` is the public function and the plain version.
"""

__all__: list[str] = []
