from lightning_lm.cli.config.class_paths import class_path, current_class_path
from lightning_lm.models import RMSNorm
from lightning_lm.optim import AdamW


class OfThisFile:
    """A class that nothing exports."""


def test_a_class_is_named_by_the_package_that_exports_it():
    assert class_path(AdamW) == "lightning_lm.optim.AdamW"
    assert class_path(RMSNorm) == "lightning_lm.models.RMSNorm"
    assert class_path(OfThisFile) == f"{__name__}.OfThisFile"


def test_a_path_into_a_file_that_moved_names_what_is_exported():
    assert current_class_path("lightning_lm.optim.parts.AdamW") == "lightning_lm.optim.AdamW"
    assert current_class_path("lightning_lm.models.no_such_file.RMSNorm") == "lightning_lm.models.RMSNorm"
    assert (
        current_class_path("lightning_lm.no_such_package.deeper.RMSNorm")
        == "lightning_lm.no_such_package.deeper.RMSNorm"
    )
    assert current_class_path("torch.optim.adamw.AdamW") == "torch.optim.adamw.AdamW"
    assert current_class_path("RMSNorm") == "RMSNorm"
