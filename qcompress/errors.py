"""What can go wrong on the PyTorch side.

QcompressError
├── ModelError       (ValueError)  no supported layer, an output that is no tensor, another model than measured
├── DataError        (ValueError)  calibration data that is empty, cannot be read twice or is not finite
├── OptionsError     (ValueError)  options that do not exist or do not fit
├── ArtefactError    (ValueError)  a compressed-model file that is not whole or does not fit the model
└── MissingError     (ImportError) an optional package is missing; says what to install

Errors of problems and solvers are those of `formulations.errors` and `solvers.errors`.
"""


class QcompressError(Exception):
    """Base of every error this package raises on purpose."""


class ModelError(QcompressError, ValueError):
    """A model that cannot be handled."""


class DataError(QcompressError, ValueError):
    """Calibration data that cannot be used."""


class OptionsError(QcompressError, ValueError):
    """Options that do not exist or do not fit."""


class ArtefactError(QcompressError, ValueError):
    """A compressed-model file that is not whole or does not fit the model."""


class MissingError(QcompressError, ImportError):
    """An optional package is missing."""
