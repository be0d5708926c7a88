"""Bulk image denoising: geometry, formats, models and the Ray pipelines around them."""

__version__ = "0.1.0"
