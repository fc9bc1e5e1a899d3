"""N-gram language models with interpolated modified Kneser-Ney smoothing."""

from lightning_lm.models.ngram.arpa import read_arpa, write_arpa
from lightning_lm.models.ngram.counts import Workspace
from lightning_lm.models.ngram.files import load_ngram, save_ngram
from lightning_lm.models.ngram.kneser_ney import fit_ngram
from lightning_lm.models.ngram.model import NgramModel, Table

__all__ = ["NgramModel", "Table", "Workspace", "fit_ngram", "load_ngram", "read_arpa", "save_ngram", "write_arpa"]
