"""GGUF, the file format of llama.cpp: a model, its tokenizer and its chat template in one file, both ways.

Reading gives a folder in the format of Hugging Face and writing takes one: whatever opens such folders opens these.
"""

from lightning_lm.models.gguf.folder import QUANTIZATIONS, export_gguf, import_gguf

__all__ = ["QUANTIZATIONS", "export_gguf", "import_gguf"]
