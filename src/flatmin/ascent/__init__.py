"""Sharpness-aware gradients."""
