"""The exceptions of this package.

::

    LightningLMError
    |-- ConfigurationError (ValueError)     a setting that cannot work: the message has the value, the need and the
    remedy |   `-- UsageError                      a word on the command line or in YAML that means nothing, and its
    place |-- DataError (ValueError)              text, tokens or a store that cannot be used |   `-- FingerprintError
    other data than the run or the store was made with |-- TokenizerError (ValueError)         text that cannot be
    encoded, or a vocabulary that cannot be built |-- CheckpointError (ValueError)        a checkpoint that is
    truncated, foreign or of another configuration |-- DivergenceError (RuntimeError)      a loss, gradient or weight
    that is not finite, which ends a run |-- RemoteError (RuntimeError)          a server that is unreachable, refuses,
    or sends an unusable response `-- MissingDependencyError (ImportError)  an optional package is needed; the message
    has the pip command RunStopped (SystemExit)                 no error: a signal ended the run, and the exit status is
    128 + its number
"""

import signal

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DivergenceError",
    "FingerprintError",
    "LightningLMError",
    "MissingDependencyError",
    "RemoteError",
    "RunStopped",
    "TokenizerError",
    "UsageError",
]


class LightningLMError(Exception):
    """Base of every exception that this package raises on purpose."""


class ConfigurationError(LightningLMError, ValueError):
    """A setting that cannot work."""


class UsageError(ConfigurationError):
    """A word on the command line or in a YAML file that means nothing: a misspelt key, a class that does not exist."""


class DataError(LightningLMError, ValueError):
    """Text, tokens or a token store that cannot be used."""


class FingerprintError(DataError):
    """The data differs from what the run or the store was made with."""


class TokenizerError(LightningLMError, ValueError):
    """Text that cannot be encoded, or a vocabulary that cannot be built."""


class CheckpointError(LightningLMError, ValueError):
    """A checkpoint that is truncated, foreign, or of another configuration."""


class DivergenceError(LightningLMError, RuntimeError):
    """A loss, gradient or weight that is not finite: the run stops before it overwrites a good checkpoint."""


class RemoteError(LightningLMError, RuntimeError):
    """A server that is unreachable, refuses, times out, or sends an unusable response.

    Args:
        message: Received value, and the remedy.
        status: HTTP status of its response; ``None`` if there was none.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class MissingDependencyError(LightningLMError, ImportError):
    """An optional package is needed.

    Args:
        package: The name to install.
        purpose: Purpose of the package, as the end of "... is needed to".
        extra: The extra of ``lightning-lm`` that brings it, if there is one.
    """

    def __init__(self, package: str, purpose: str, extra: str | None = None) -> None:
        target = f'"lightning-lm[{extra}]"' if extra else package
        super().__init__(f"The package {package!r} is needed to {purpose}. Install it with: pip install {target}")


class RunStopped(SystemExit):
    """The end of a run that a signal asked for; uncaught, it ends the process with status 128 + ``signum``.

    Args:
        signum: Number of the signal.
        agreed: True if all ranks stop at the same point of the run, so that they can save together.
        status: Exit status; 128 + ``signum`` by default.
    """

    def __init__(self, signum: int, *, agreed: bool = False, status: int | None = None) -> None:
        super().__init__(128 + signum if status is None else status)
        self.signum, self.agreed = signum, agreed

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"
