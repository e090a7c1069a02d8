"""The bundled trained test model, the held-out text to evaluate it on, and the code that made both."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "tiny-llama"
"""Hugging Face model directory of the trained model, tokenizer included."""

HELDOUT = Path(__file__).parent / "heldout.txt"
"""Text from files that the model has not been trained on."""
