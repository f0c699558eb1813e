"""Networks and the fusion: torch and timm only, nothing of the pipeline.

Empty on purpose: `models.ib_mbm` and `models.adapter` are importable without paying for timm.
"""
