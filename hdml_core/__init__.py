"""Hardness-aware deep metric learning (Zheng et al., CVPR 2019): the science, and nothing that tunes it.

Start at `notation` (the symbols), then `methods/hdml` (the paper's section 3 on one screen) and `training` (the loop).
"""

import os

# Large tensors on huge pages where the kernel has them: by small ones it takes longer to map their memory than to fill
# it. torch reads this once, before its first large tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
