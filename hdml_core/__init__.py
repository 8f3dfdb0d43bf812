"""Hardness-aware deep metric learning (Zheng et al., CVPR 2019): the science, and nothing that tunes it.

Start at `notation` (the symbols), then `objective` (the paper's section 3 on one screen) and `training` (the loop).
"""
