"""The bundled trained test models, what to evaluate them on, and the code that made all of it."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "tiny-llama"
"""Hugging Face model directory of the trained model, tokenizer included."""

HELDOUT = Path(__file__).parent / "heldout.txt"
"""Text from files that the model has not been trained on."""

BERT_DIR = Path(__file__).parent / "tiny-bert"
"""Hugging Face model directory of the trained sentence classifier; `tasks.text_batch` makes sentences for it."""

VIT_DIR = Path(__file__).parent / "tiny-vit"
"""Hugging Face model directory of the trained image classifier; `tasks.image_batch` makes images for it."""
